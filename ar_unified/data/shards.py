"""Documents as tokens on disk: ArrayRecord shards, each with an index of what a loader must know beforehand.

<folder>/manifest.json                     what the tokens mean and what is in the folder; written last
         <source>/00000.array_record       one record a document: its item's number, int32 tokens, uint8 marks
                  00000.index.npy          INDEX, one row a document
                  00000.skipped.jsonl      {"origin", "kind", "reason"}, one row an item that was left out
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from ar_tokenizers.files import unfinished
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from ar_unified import workdir
from ar_unified.errors import UserError, about
from ar_unified.language.encoded import Encoded

INDEX = np.dtype(
    [
        ("length", "<i4"),  # tokens
        ("text_bytes", "<i4"),  # UTF-8 bytes of all its text
        ("task", "i1"),  # index into TASKS
        ("images", "<i2"),
        ("part", "<i2"),  # of its item: long documents are split
        ("pair", "?"),  # one text and one image that may be read either way
    ]
)
_HEADER = struct.Struct("<Q")  # item of the source that the document was made of


class ShardWriter:
    """One shard; use as a context manager. Nothing of it can be seen before the block has ended without an error.

    The array_record file appears last: where it is, the other two are.
    """

    def __init__(self, folder: Path, number: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = shard_path(folder, number)
        self._unfinished = unfinished(self._path)
        self._records = ArrayRecordWriter(str(self._unfinished), "group_size:1")
        self._index: list[tuple[int, int, int, int, int, bool]] = []
        self._skipped: list[Mapping[str, str]] = []

    def write(
        self, document: Encoded, *, item: int, part: int, text_bytes: int, task: int, images: int, pair: bool
    ) -> None:
        """Adds a document; the rest as in INDEX."""
        tokens, marks = document.tokens.astype("<i4"), document.marks.astype(np.uint8)
        self._records.write(_HEADER.pack(item) + tokens.tobytes() + marks.tobytes())
        self._index.append((len(document), text_bytes, task, images, part, pair))

    def skip(self, origin: str, kind: str, reason: str) -> None:
        self._skipped.append({"origin": origin, "kind": kind, "reason": reason})

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._records.close()
        if kind is not None:
            self._unfinished.unlink(missing_ok=True)
            return
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._skipped)
        workdir.write_text(skipped_path(self._path), rows)
        index = io.BytesIO()
        np.save(index, np.array(self._index, INDEX), allow_pickle=False)
        workdir.write_bytes(index_path(self._path), index.getvalue())
        with open(self._unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._unfinished, self._path)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.array_record"


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.npy")


def skipped_path(shard: Path) -> Path:
    return shard.with_suffix(".skipped.jsonl")


def read_index(shard: Path) -> np.ndarray:
    """INDEX [n] of a shard."""
    with about(f"{index_path(shard)}: delete the folder and prepare the data again"):
        return np.load(index_path(shard), allow_pickle=False)


def read_skipped(shard: Path) -> list[dict[str, str]]:
    with open(skipped_path(shard), encoding="utf-8") as rows:
        return [json.loads(row) for row in rows]


class Shards:
    """The documents of one prepared source, by index. Safe to read from many threads.

    Attributes:
        index: INDEX [n].
    """

    def __init__(self, folder: Path, count: int):
        paths = [shard_path(folder, number) for number in range(count)]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]}: no such file, but the manifest names it; delete {folder} and prepare again")
        self.index = np.concatenate([np.zeros(0, INDEX), *map(read_index, paths)])
        # A reader of a shard without records cannot be asked for any; ArrayRecordDataSource skips over it.
        self._records = ArrayRecordDataSource([str(path) for path in paths])
        if len(self._records) != len(self.index):
            raise UserError(
                f"{folder}: the shards hold {len(self._records)} documents, their index {len(self.index)}: "
                "a file was changed; delete the folder and prepare the data again"
            )

    def __len__(self) -> int:
        return len(self.index)

    def read(self, documents: Sequence[int] | np.ndarray) -> list[Encoded]:
        """Each of `documents`."""
        records = self._records.__getitems__([int(i) for i in documents]) if len(documents) else []
        lengths = self.index["length"][np.asarray(documents, np.int64)]
        return [_encoded(record, length) for record, length in zip(records, lengths, strict=True)]

    def item(self, document: int) -> int:
        """Item of the source that a document was made of."""
        return _HEADER.unpack_from(self._records[document])[0]


def _encoded(record: bytes, length: int) -> Encoded:
    tokens = np.frombuffer(record, "<i4", length, offset=_HEADER.size).astype(np.int32)
    return Encoded(tokens, np.frombuffer(record, np.uint8, length, offset=_HEADER.size + tokens.nbytes))
