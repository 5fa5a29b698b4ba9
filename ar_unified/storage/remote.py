"""Paths of local files or of objects in a store, and random-access reading of both."""

from __future__ import annotations

import functools
import io
import os
import posixpath
import threading
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ar_unified.storage import stores

_BLOCK = 1 << 19  # bytes of a block; a request reads one block, or several if reads are sequential
_KEPT = 8  # blocks that an open file keeps
_AHEAD = 8  # the most blocks that one request reads


@functools.total_ordering
class Remote:
    """The path of an object or of a folder of objects, with the methods of `Path` that a reader needs."""

    def __init__(self, url: str):
        scheme, _, rest = url.partition("://")
        self._top, self._path = f"{scheme}://", PurePosixPath(rest.lstrip("/"))

    def __str__(self) -> str:
        return f"{self._top}{self._path}"

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __lt__(self, other: Remote) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> Remote:
        # The operator / of PurePosixPath does not work here, because an absolute name would replace the path.
        return self._with(PurePosixPath(posixpath.join(str(self._path), name.lstrip("/"))))

    def _with(self, path: PurePosixPath) -> Remote:
        return Remote(f"{self._top}{path}")

    @property
    def name(self) -> str:
        """The last part of the path, as in `pathlib.Path`."""
        return self._path.name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self._path.stem

    @property
    def suffix(self) -> str:
        """The end of the name, from its last dot."""
        return self._path.suffix

    @property
    def parent(self) -> Remote:
        """The folder that contains it."""
        return self._with(self._path.parent)

    def with_suffix(self, suffix: str) -> Remote:
        """The same path with another suffix."""
        return self._with(self._path.with_suffix(suffix))

    def relative_to(self, other: Remote) -> PurePosixPath:
        """This path, relative to `other`. Raises ValueError if it is not below `other`."""
        return self._path.relative_to(other._path)

    def resolve(self) -> Remote:
        """Returns itself, because a store has no links."""
        return self

    def absolute(self) -> Remote:
        """Returns itself, because a URL is absolute."""
        return self

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return stores.facts(str(self)) is not None

    def is_dir(self) -> bool:
        """Whether there are objects below this path."""
        return any(stores.listed(str(self)))

    def exists(self) -> bool:
        """Whether there is an object of this name, or an object below this path."""
        return self.is_file() or self.is_dir()

    def read_bytes(self, most: int | None = None) -> bytes:
        """The object's bytes. Raises OSError, or ValueError if there are more than `most` bytes."""
        return stores.read(str(self), most=most)


AnyPath = Path | Remote


def path(text: str | os.PathLike[str] | Remote) -> AnyPath:
    """The path that a user named: a path on this machine, or a store's URL."""
    if isinstance(text, Remote):
        return text
    return Remote(os.fspath(text)) if stores.is_url(os.fspath(text)) else Path(text)


def size_of(path: AnyPath) -> int:
    """The size of a file or an object, in bytes. Raises OSError."""
    if isinstance(path, Path):
        return os.path.getsize(path)
    found = stores.facts(str(path))
    if found is None:
        raise FileNotFoundError(2, "no such object", str(path))
    return found.size


def open_binary(path: AnyPath) -> BinaryIO:
    """Opens a file or an object for reading. Raises OSError."""
    if isinstance(path, Path):
        return open(path, "rb")
    return io.BufferedReader(_Stream(Opened(path)), 1 << 16)  # type: ignore[return-value]


class Opened:
    """An open file or object that any thread can read at any place. Raises OSError.

    An object is read in blocks. While reads are sequential, one request reads several blocks.
    """

    def __init__(self, path: AnyPath):
        self._url = "" if isinstance(path, Path) else str(path)
        self.size = size_of(path)
        if isinstance(path, Path):
            self._descriptor = os.open(path, os.O_RDONLY)
        self._lock, self._blocks = threading.Lock(), OrderedDict[int, bytes]()
        self._next, self._ahead = 0, 1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, at: int, size: int) -> bytes:
        """Reads `size` bytes, beginning with byte `at`. It returns fewer bytes only at the end of the file."""
        if not self._url:
            return os.pread(self._descriptor, size, at)
        stop = min(at + size, self.size)
        if stop - at > _AHEAD * _BLOCK:
            return stores.read(self._url, at, stop)
        with self._lock:
            parts = []
            while at < stop:
                number = at // _BLOCK
                if number not in self._blocks:
                    self._fetch(number)
                block = self._blocks[number]
                parts.append(block[at - number * _BLOCK : stop - number * _BLOCK])
                at = (number + 1) * _BLOCK
        return b"".join(parts)

    def _fetch(self, number: int) -> None:
        self._ahead = min(2 * self._ahead, _AHEAD) if number == self._next else 1
        start = number * _BLOCK
        data = stores.read(self._url, start, min(start + self._ahead * _BLOCK, self.size))
        for i in range(0, len(data), _BLOCK):
            self._blocks[number + i // _BLOCK] = data[i : i + _BLOCK]
        self._next = number + self._ahead
        while len(self._blocks) > max(_KEPT, self._ahead):
            self._blocks.popitem(last=False)


class _Stream(io.RawIOBase):
    """An open object as a stream."""

    def __init__(self, opened: Opened):
        self._opened, self._at = opened, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, at: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = at + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._opened.size}[whence]
        return self._at

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        data = self._opened.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
