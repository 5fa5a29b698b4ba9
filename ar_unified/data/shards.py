"""Documents as tokens on disk, in ArrayRecord shards. Each shard has an index of what a loader must know before it
reads documents.

<folder>/manifest.json                     what the tokens mean and what is in the folder; written last
         <source>/00000.array_record       one record per document: its item's number, int32 tokens, uint8 marks
                  00000.index.npy          INDEX, one row for each document
                  00000.skipped.jsonl      {"origin", "kind", "reason"}, one line for each item that was left out
                  index.npy                the indexes of all shards joined; all processes of a host map this file
                  starts.npy               int64 [shards + 1], documents before each shard; the last number counts all
                  rows-*.npy               which documents share a row (`packing.blocks`)
"""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
from ar_tokenizers.files import unfinished, whole
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ar_unified import storage, workdir
from ar_unified.data.stored import Stored, take
from ar_unified.errors import UserError, about
from ar_unified.language.encoded import Encoded

INDEX = np.dtype(
    [
        ("length", "<i4"),  # tokens
        ("text_bytes", "<i4"),  # UTF-8 bytes of all its text
        ("task", "i1"),  # index into TASKS
        ("images", "<i2"),
        ("part", "<i2"),  # number within its item (long documents are split); in a pair, CHOSEN or REJECTED
        ("pair", "?"),  # one text and one image that may be read in both directions
    ]
)
CHOSEN, REJECTED = -1, -2
_INDEX, _STARTS = "index.npy", "starts.npy"
_OPEN, _THREADS = 128, 16  # how many shards of a source may be open; how many are read at the same time
_QUICKLY = 0.05  # seconds; a batch that takes longer reads several shards at the same time
_HEADER = struct.Struct("<Q")  # the item of the source from which the document was made


class ShardWriter:
    """Writes one shard; use as a context manager. The shard appears only when the block ends without an error.

    The array_record file is written last, so if it exists, the other two files exist.
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
        """Adds a document. item: the item from which it was made. The other args are fields of INDEX."""
        tokens, marks = document.tokens.astype("<i4"), document.marks.astype(np.uint8)
        self._records.write(_HEADER.pack(item) + tokens.tobytes() + marks.tobytes())
        self._index.append((len(document), text_bytes, task, images, part, pair))

    def skip(self, origin: str, kind: str, reason: str) -> None:
        """Records an item that is left out: where it comes from, the kind of fault, and the reason."""
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
        storage.tell(self._path)


def shard_path(folder: Path, number: int) -> Path:
    """The ArrayRecord file of shard `number` in a source's folder."""
    return folder / _name(number)


def _name(number: int) -> str:
    return f"{number:05d}.array_record"


def index_path(shard: Path) -> Path:
    """The path of a shard's index. The index is complete before the shard gets its final name."""
    return shard.with_suffix(".index.npy")


def skipped_path(shard: Path) -> Path:
    """The path of the list of items that a shard leaves out."""
    return shard.with_suffix(".skipped.jsonl")


def read_index(shard: Path) -> np.ndarray:
    """The index of a shard, INDEX [n]."""
    with about(f"{index_path(shard)} cannot be read (delete its folder, and prepare the data again)"):
        return np.load(storage.fetch(index_path(shard)), allow_pickle=False)


def read_skipped(shard: Path) -> list[dict[str, str]]:
    """The items that a shard leaves out, as `ShardWriter.skip` noted them."""
    with open(storage.fetch(skipped_path(shard)), encoding="utf-8") as rows:
        return [json.loads(row) for row in rows]


def join_indexes(folder: Path, count: int) -> np.ndarray:
    """Puts the indexes of a source's shards into one file, unless that is done. Returns INDEX [n], mapped from this
    file."""
    if not storage.exists(folder / _STARTS):
        starts = np.cumsum([0, *(len(read_index(path)) for path in _paths(folder, count))])
        with whole(folder / _INDEX) as file:
            facts = {"descr": np.lib.format.dtype_to_descr(INDEX), "fortran_order": False, "shape": (int(starts[-1]),)}
            np.lib.format.write_array_header_1_0(file, facts)
            for path in _paths(folder, count):
                file.write(read_index(path).tobytes())
        with whole(folder / _STARTS) as file:
            np.save(file, starts)
    return _mapped(folder / _INDEX)


class Lengths:
    """The number of tokens in each group of documents that always share a row, int32 [n]. A group has `answers`
    documents: 2 for preference pairs, else 1. Slices are read when they are needed.
    """

    def __init__(self, index: np.ndarray | Stored, answers: int):
        self._index, self._answers = index, answers

    def __len__(self) -> int:
        return len(self._index) // self._answers

    def __getitem__(self, stretch: slice) -> np.ndarray:
        start, stop, _ = stretch.indices(len(self))
        lengths = self._index[start * self._answers : stop * self._answers]["length"]
        return lengths if self._answers == 1 else lengths.reshape(-1, self._answers).sum(1, dtype=np.int32)


def _paths(folder: Path, count: int) -> Iterator[Path]:
    return (shard_path(folder, number) for number in range(count))


def _mapped(path: Path) -> np.ndarray:
    with about(f"{path} cannot be read (delete this file and starts.npy next to it, and start again)"):
        return np.asarray(np.load(storage.fetch(path), mmap_mode="r"))


class Shards:
    """The documents of one prepared source, by index. Safe to read from many threads.

    It takes little memory: only the needed part of the index is read, and only the most recently used shards are open.

    Attributes:
        index: INDEX [n], mapped from its file, for code that needs all of it.
    """

    def __init__(self, folder: Path, count: int):
        self._folder = folder
        there = storage.names(folder)
        if missing := next((name for name in map(_name, range(count)) if name not in there), ""):
            raise UserError(
                f"{folder / missing}: no such file, but the manifest names it; delete {folder} and prepare again"
            )
        if _STARTS in there:
            self.index, self._starts = _mapped(folder / _INDEX), np.load(storage.fetch(folder / _STARTS))
            self._facts: np.ndarray | Stored = Stored(folder / _INDEX)
        else:  # an early version prepared the folder without the joint file, and the folder may be read-only
            parts = [read_index(path) for path in _paths(folder, count)]
            self.index = np.concatenate([np.zeros(0, INDEX), *parts])
            self._starts = np.cumsum([0, *map(len, parts)])
            self._facts = self.index
        if len(self._starts) != count + 1 or self._starts[-1] != len(self.index):
            raise UserError(
                f"{folder}: index.npy belongs to other shards than these {count}: delete this folder, and prepare again"
            )
        self._reader = functools.lru_cache(maxsize=_OPEN)(self._opened)

    def __len__(self) -> int:
        return len(self.index)

    def facts(self, documents: np.ndarray) -> np.ndarray:
        """The rows of INDEX for `documents`, int64 [k]."""
        return take(self._facts, documents)

    def lengths(self, answers: int = 1) -> Lengths:
        """Tokens of each document, or of each group of `answers` documents."""
        return Lengths(self._facts, answers)

    def read(self, documents: Sequence[int] | np.ndarray, lengths: np.ndarray | None = None) -> list[Encoded]:
        """The content of each of `documents`, read-only. lengths: tokens of each; None reads them from the index."""
        wanted = np.asarray(documents, np.int64)
        records = [b""] * len(wanted)
        shard = np.searchsorted(self._starts, wanted, "right") - 1
        order = np.argsort(wanted, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(shard[order])) + 1) if len(order) else []

        def fetch(part: np.ndarray) -> None:
            number = int(shard[part[0]])
            found = self._reader(number).read((wanted[part] - self._starts[number]).tolist())
            for at, record in zip(part.tolist(), found, strict=True):
                records[at] = record

        began = time.perf_counter()
        while parts and time.perf_counter() - began < _QUICKLY:
            fetch(parts.pop())
        if parts:  # reading is slow, so several shards are read at the same time
            with ThreadPoolExecutor(min(len(parts), _THREADS)) as pool:
                list(pool.map(fetch, parts))
        lengths = self.facts(wanted)["length"] if lengths is None else lengths
        return [_encoded(record, length) for record, length in zip(records, lengths.tolist(), strict=True)]

    def item(self, document: int) -> int:
        """The item of the source from which a document was made."""
        number = int(np.searchsorted(self._starts, document, "right")) - 1
        (record,) = self._reader(number).read([document - int(self._starts[number])])
        return _HEADER.unpack_from(record)[0]

    def _opened(self, number: int) -> _Records:
        path = storage.fetch(shard_path(self._folder, number))
        reader = _Records(path)
        if (found := reader.count) != (known := self._starts[number + 1] - self._starts[number]):
            raise UserError(
                f"{path}: found {found} documents, but its index has {known}, so a file was changed: delete "
                f"{self._folder} and prepare the data again"
            )
        return reader


class _Records:
    """The records of an open shard. `count` is their number. Many threads may use it; one of them reads at a time.

    Records are read one by one, without read-ahead and without ArrayRecord's threads. These threads wait for one
    another, which takes two thirds of the processor time when a list of records is read.
    """

    def __init__(self, path: Path):
        alone = "readahead_buffer_size:0,max_parallelism:0"
        self._reader = ArrayRecordReader(str(path), alone, file_reader_buffer_size=2**13)
        self.count: int = self._reader.num_records()
        self._lock = threading.Lock()

    def read(self, numbers: Iterable[int]) -> list[bytes]:
        """The records with these numbers."""
        found = []
        with self._lock:
            for number in numbers:
                self._reader.seek(number)
                found.append(self._reader.read())
        return found


def _encoded(record: bytes, length: int) -> Encoded:
    tokens = np.frombuffer(record, "<i4", length, offset=_HEADER.size).astype(np.int32, copy=False)
    return Encoded(tokens, np.frombuffer(record, np.uint8, length, offset=_HEADER.size + tokens.nbytes))
