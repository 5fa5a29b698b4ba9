"""Finds how large the values of a table become when they are unpacked, without unpacking them.

A few kilobytes of Zstandard may unpack to gigabytes of zeros. Parquet states the unpacked size of each column of a
group in its footer. Arrow states it in the first eight bytes of each buffer.
"""

from __future__ import annotations

import struct
from typing import Any

from ar_unified.data.files import LARGEST

_RATIO = 256  # real data stays below this ratio: packing hardly shrinks images, and texts shrink to about a tenth
_RECORD_BATCH = 3  # the number of this type of message


def excess(packed: int, unpacked: int) -> str:
    """Returns the reason why data of these sizes may not be unpacked, or "" if it may. Sizes are in bytes."""
    if unpacked <= LARGEST or unpacked <= _RATIO * packed:
        return ""
    return f"expected {packed} packed bytes to become at most {LARGEST >> 20} MiB, found {unpacked >> 20} MiB"


def of_group(group: Any) -> str:
    """Like `excess`, for the columns of a Parquet group of rows, from the group's metadata."""
    columns = (group.column(i) for i in range(group.num_columns))
    found = (excess(each.total_compressed_size, each.total_uncompressed_size) for each in columns)
    return next(filter(None, found), "")


def of_message(message: Any) -> tuple[int, str] | None:
    """Returns the number of rows of an Arrow record batch, and the `excess` of its buffers. Returns None if the message
    is not a record batch.

    Raises:
        ValueError: if the message does not have Arrow's format.
    """
    try:
        table = _Table(message.metadata.to_pybytes(), None)
        if table.number(1, "B") != _RECORD_BATCH:
            return None
        batch = table.inner(2)
        rows, (at, count) = batch.number(0, "q"), batch.vector(2)
        if not batch.has(3):  # nothing is packed
            return rows, ""
        body = memoryview(message.body) if message.body is not None else memoryview(b"")
        for i in range(count):
            start, length = struct.unpack_from("<qq", batch.data, at + 16 * i)
            unpacked = struct.unpack_from("<q", body, start)[0] if length >= 8 else 0
            if reason := excess(length, unpacked):
                return rows, reason
        return rows, ""
    except (struct.error, IndexError) as error:
        raise ValueError(f"expected a message in Arrow's format: {error}") from error


class _Table:
    """A table in a flatbuffer. Fields are numbered in the order of Arrow's Message.fbs."""

    def __init__(self, data: bytes, at: int | None):
        self.data = data
        self._at: int = self._read("I", 0) if at is None else at
        self._fields = self._at - self._read("i", self._at)
        self._size = self._read("H", self._fields)

    def _read(self, kind: str, at: int) -> int:
        if at < 0:
            raise IndexError(f"byte {at}")
        return int(struct.unpack_from(f"<{kind}", self.data, at)[0])

    def _place(self, field: int) -> int:
        """The offset of a field; 0 if the field has its default value."""
        slot = 4 + 2 * field
        away = self._read("H", self._fields + slot) if slot < self._size else 0
        return self._at + away if away else 0

    def has(self, field: int) -> bool:
        return self._place(field) != 0

    def number(self, field: int, kind: str) -> int:
        return self._read(kind, at) if (at := self._place(field)) else 0

    def inner(self, field: int) -> _Table:
        at = self._place(field)
        return _Table(self.data, at + self._read("I", at))

    def vector(self, field: int) -> tuple[int, int]:
        """Where the vector's elements begin, and how many there are."""
        if not (at := self._place(field)):
            return 0, 0
        begin = at + self._read("I", at)
        return begin + 4, self._read("I", begin)
