"""Documents from the rows of Parquet and Arrow files, as Hugging Face `datasets` and others write them."""

from __future__ import annotations

import bisect
import hashlib
import json
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ar_unified import storage
from ar_unified.data import images
from ar_unified.data.files import folder_at
from ar_unified.data.items import BadItem
from ar_unified.data.sources import unpacked_sizes
from ar_unified.data.sources.columns import PICTURES, Columns
from ar_unified.data.sources.records import Record, RecordSource, together
from ar_unified.data.sources.shard_names import TABLES, named, shards
from ar_unified.data.sources.splits import EmptySplit, parse_split
from ar_unified.errors import UserError
from ar_unified.storage import AnyPath

_BAD = (pa.ArrowException, OSError, ValueError, NotImplementedError)


class Tables(RecordSource):
    """The rows of Parquet and Arrow files, in order. Arrow files may be IPC files, or streams such as `save_to_disk`
    writes.

    Opening reads only the metadata and the last 64 KiB of each file, and keeps 24 bytes for every group of rows. A row
    is read together with its neighbours, so reading in order is fast, but a random read has to read a part of a group.
    Without `columns`, names are recognised as `Columns` says. Class numbers become names if Hugging Face's header has
    names for them. A file that cannot be read is one bad item.

    Args:
        path: a file, a folder, or a name with braces or wildcards (`shards`).
        columns: maps a document part to a column; see `Columns`.
        split: "train" takes the files whose name or folder begins with it, if there are any. "train[:95%]" and "[95%:]"
            are parts of the rows in their order, as in TFDS. Rows that must be in the same part must follow each other.

    Raises:
        UserError: if there is no such file, no file can be read, the columns make no document, or no row is in `split`.
    """

    def __init__(
        self,
        path: str | AnyPath,
        *,
        columns: Mapping[str, str] | None = None,
        links: bool = False,
        split: str | None = None,
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        root, found = shards(path, TABLES, links=links)
        name, low, high = parse_split(split or "")
        chosen = [file for file in found if _is_of(file.name, name)] if name else found
        if name and not chosen and any(_is_of(file.name, each) for file in found for each in _SPLITS):
            names = ", ".join(file.name for file in found[:8])
            raise UserError(f"{path}: expected a file of split {name!r}, found {names}")
        folder = folder_at(root, links)
        label = label or named(path, root)
        super().__init__(Columns(columns), folder, label, reversible=reversible, limits=limits)
        self._files: list[_File | BadItem] = []
        # For every group of rows: the number of its first row, its file, and its number in the file.
        self._first, self._file, self._group = array("q"), array("i"), array("q")
        rows, digest, size = 0, hashlib.sha256(), 0
        for entry in chosen or found:
            file = self._open(root, entry)
            digest.update(f"{entry.name} {entry.size}\n".encode(errors="surrogateescape"))
            for group, count in enumerate([1] if isinstance(file, BadItem) else file.rows):
                self._first.append(rows)
                self._file.append(len(self._files))
                self._group.append(group)
                rows += count
            if not isinstance(file, BadItem):
                digest.update(file.head)
                size += entry.size
            self._files.append(file)
        whole = next((file for file in self._files if not isinstance(file, BadItem)), None)
        if whole is None:
            raise UserError(f"{path}: no file can be read: {next(iter(self._files))}")
        self._used = self.columns.names(whole.names, str(path))
        self.has_images = bool({*PICTURES, "messages", "segments", "prompt", "chosen"} & self._used.keys())
        self.together = together(size / max(rows, 1))
        self._low, self._high = round(low * rows), round(high * rows)
        if self._low >= self._high:
            raise (EmptySplit if rows else UserError)(f"{path}: no row is in split {split!r} ({rows} rows in all)")
        self.fingerprint: dict[str, object] = {
            "kind": "tables",
            "items": len(self),
            "split": split,
            "sha256": digest.hexdigest(),
            **({"columns": dict(columns)} if columns else {}),
        }
        self._lock, self._cursors = threading.Lock(), dict[bool, _Cursor]()

    def _open(self, root: AnyPath, entry: Any) -> _File | BadItem:
        path = root / entry.name
        if entry.error:
            return BadItem(entry.error.kind, str(path), entry.error.reason)
        try:
            return _Parquet(path) if entry.name.lower().endswith(".parquet") else _Arrow(path)
        except _BAD as error:
            return BadItem(
                "unreadable_file", str(path), f"expected a whole {path.suffix[1:]} file: {_first_line(error)}"
            )

    def __len__(self) -> int:
        return self._high - self._low

    def _place(self, i: int) -> tuple[int, int]:
        """The group that item i is in, and the number of its row in the group."""
        if not 0 <= i < len(self):
            raise IndexError(f"item {i}: {self.name} has {len(self)} items")
        group = bisect.bisect_right(self._first, i + self._low) - 1
        return group, i + self._low - self._first[group]

    def origin(self, i: int) -> str:
        """The file, and the number of the row in it, counted from 1."""
        group, row = self._place(i)
        file = self._files[self._file[group]]
        if isinstance(file, BadItem):
            return file.origin
        begin = self._first[bisect.bisect_left(self._file, self._file[group])]
        return f"{file.path}:{self._first[group] - begin + row + 1}"

    def language(self, i: int) -> str:
        """The value of the column "language" in row i; "" without this column."""
        return super().language(i) if "language" in self._used else ""

    def read(self, indices: Sequence[int], pictures: bool = True) -> list[Record | BadItem]:
        """Rows as records, in the order of `indices`; a BadItem takes the place of a row that cannot be read."""
        with self._lock:  # one thread at a time, because groups are read forward
            return [self._row(i, pictures) for i in indices]

    def _row(self, i: int, pictures: bool) -> Record | BadItem:
        group, row = self._place(i)
        file = self._files[self._file[group]]
        if isinstance(file, BadItem):
            return BadItem(file.kind, file.origin, file.reason)
        if reason := file.bombs.get(self._group[group]):
            return BadItem("too_large", self.origin(i), reason)
        cursor = self._cursors.get(pictures)
        if cursor is None or cursor.group != group or row < cursor.start:
            unread = () if pictures else tuple(column for part in PICTURES for column in self._used.get(part, ()))
            names = [name for name in file.names if name not in unread and (pictures or self._is_used(name))]
            cursor = self._cursors[pictures] = _Cursor(group, file, self._group[group], names, self.together)
        try:
            return cursor.row(row)
        except UnicodeDecodeError as error:
            return BadItem("bad_utf8", self.origin(i), f"expected UTF-8: {error}")
        except _BAD as error:
            return BadItem("unreadable_file", self.origin(i), f"the rows cannot be read: {_first_line(error)}")

    def _is_used(self, name: str) -> bool:
        return any(name in names for names in self._used.values())


_SPLITS = ("train", "validation", "valid", "val", "test")


def _is_of(name: str, split: str) -> bool:
    """Whether a file belongs to a split by its name. Examples for "train" are data/train-00000-of-00002.parquet,
    train.parquet and train/0000.parquet.
    """
    return any(part == split or part.startswith((f"{split}-", f"{split}.", f"{split}_")) for part in name.split("/"))


class _File(ABC):
    """One file of a table.

    Attributes:
        rows: the number of rows in each group.
        names: the names of the columns.
        head: bytes that change when the rows change.
        bombs: the groups that are not unpacked, each with the reason why (`unpacked_sizes`).
    """

    def __init__(self, path: AnyPath, schema: pa.Schema, rows: list[int], bombs: dict[int, str]):
        self.path, self.rows, self.names, self.head = path, rows, list(schema.names), _tail(path)
        self.bombs = {group: reason for group, reason in bombs.items() if reason}
        self.classes = _classes(schema)

    @abstractmethod
    def batches(self, group: int, names: list[str], size: int) -> Iterator[pa.RecordBatch]:
        """The rows of a group, in order."""


class _Parquet(_File):
    def __init__(self, path: AnyPath):
        with pq.ParquetFile(_source(path)) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            bombs = {i: unpacked_sizes.of_group(group) for i, group in enumerate(groups)}
            super().__init__(path, file.schema_arrow, [group.num_rows for group in groups], bombs)

    def batches(self, group: int, names: list[str], size: int) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(_source(self.path)) as file:
            yield from file.iter_batches(size, [group], names, use_threads=False)


class _Arrow(_File):
    """An IPC file or an IPC stream. The batches of a stream are found by reading it once. Images are not read, because
    the file is memory-mapped."""

    def __init__(self, path: AnyPath):
        self._places = array("q")
        rows, bombs = list[int](), dict[int, str]()
        with _mapped(path) as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                schema = file.schema
                source.seek(8)  # the file contains a stream, which has more information than the footer
                pa.ipc.read_schema(source)
                while len(rows) < file.num_record_batches:
                    if found := unpacked_sizes.of_message(pa.ipc.read_message(source)):
                        bombs[len(rows)] = found[1]
                        rows.append(found[0])
            else:
                source.seek(0)
                schema = pa.ipc.read_schema(source)
                while source.tell() < source.size():
                    place = source.tell()
                    try:
                        found = unpacked_sizes.of_message(pa.ipc.read_message(source))
                    except EOFError:  # the mark that ends a stream
                        break
                    except _BAD:  # cut short: the rows before can be read, and the rest is one bad item
                        found = 1, ""
                    count, bombs[len(rows)] = found or (1, "")
                    self._places.append(place)
                    rows.append(count)
                    if count == 1 and source.tell() <= place:
                        break
        self._schema = schema
        super().__init__(path, schema, rows, bombs)

    def batches(self, group: int, names: list[str], size: int) -> Iterator[pa.RecordBatch]:
        with _mapped(self.path) as source:
            if self._places:
                source.seek(self._places[group])
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), self._schema)
            else:
                batch = pa.ipc.open_file(source).get_batch(group)
            batch = batch.select(names)
            for start in range(0, len(batch), size):
                yield batch.slice(start, size)


class _Cursor:
    """Reads the rows of one group forward, a batch at a time."""

    def __init__(self, group: int, file: _File, number: int, names: list[str], size: int):
        self.group, self.start = group, 0
        self._file, self._batches = file, file.batches(number, names, size)
        self._batch: pa.RecordBatch | None = None
        self._error: Exception | None = None

    def row(self, row: int) -> dict[str, object]:
        """Row `row` of the group. It must not be before `start`, because rows are only read forward. If reading fails,
        the error is raised for that row and all rows after it.
        """
        while self._batch is None or row >= self.start + len(self._batch):
            if self._error:
                raise self._error
            try:
                batch = next(self._batches)
            except StopIteration:
                self._error = ValueError("the group ends before its last row")
            except _BAD as error:
                self._error = error
            else:
                self.start += len(self._batch) if self._batch is not None else 0
                self._batch = batch
        (found,) = self._batch.slice(row - self.start, 1).to_pylist()
        for name, classes in self._file.classes.items():
            if isinstance(found.get(name), int) and 0 <= found[name] < len(classes):
                found[name] = classes[found[name]]
        return found


def _classes(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of class numbers, for columns that Hugging Face calls ClassLabel."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _tail(path: AnyPath) -> bytes:
    """The last bytes of a file, which contain its footer or its last rows."""
    with storage.open_binary(path) as file:
        file.seek(max(storage.size_of(path) - (1 << 16), 0))
        return file.read()


def _source(path: AnyPath) -> Any:
    """Returns what PyArrow can open: a path, or an object in a store, of which only the needed ranges are read."""
    return path if isinstance(path, Path) else storage.open_binary(path)


def _mapped(path: AnyPath) -> Any:
    return pa.memory_map(str(path)) if isinstance(path, Path) else pa.PythonFile(storage.open_binary(path), mode="r")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
