"""Text-only documents from plain files: whole .txt and .md files or their lines, and the rows of .jsonl files."""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ar_unified.data.items import BadItem
from ar_unified.data.splits import Split
from ar_unified.document import Document, TextPart
from ar_unified.errors import UserError

FILES = ("*.txt", "*.md", "*.jsonl")
_BLOCK = 1 << 14  # bytes that share an entry of the index, and are read at once
_LARGEST = 1 << 26  # bytes of a document


class TextFiles:
    """The texts of the files under `path`, in the order of their names; may be far larger than memory.

    The files are read once at opening, twice for a part. What is kept of them is their names and 40 bytes for every
    16 KiB, or for every file if files are smaller. Line ends are not part of a line, blank lines are no items; nothing
    else is changed.

    `split` is as for `Rows`: lines and files have no name but "train", and a part takes files by their name and lines
    by their text.

    Args:
        path: a folder, or one file.
        files: patterns of names; folders below are searched too, hidden ones are not.
        by: what one document is, "file" or "line". Of a .jsonl file it is a row.
        field: the key of a row's text. The others become `meta`.
        language: "file": a file's name, without its ending, is the language of its texts; else the key of a row's.

    Raises:
        UserError: no such path, no file of these names, no text in `split`, or an argument out of range.
    """

    has_pictures = False

    def __init__(
        self,
        path: str | Path,
        *,
        files: Sequence[str] = FILES,
        by: str = "file",
        field: str = "text",
        language: str = "language",
        split: str | None = None,
        label: str | None = None,
        reversible: bool = True,
    ):
        if by not in ("file", "line"):
            raise UserError(f"by: expected file or line, found {by!r}")
        path = Path(path)
        alone = path.is_file()
        self.name, self.reversible = label or (path.stem if alone else path.resolve().name), reversible
        self._by, self._field, self._language_from = by, field, language
        self._split = None if split is None else Split(split)
        self._root = path.parent if alone else path
        self._files = [path] if alone else _find(path, files)
        inside = path.resolve().parent if alone else path.resolve()

        if self._split and self._split.by_part:
            self._index(path, inside)
            self._split.settle()
        sha256 = self._index(path, inside)
        if self._split and not self._items:
            raise self._split.empty(path, "text")
        self.fingerprint: dict[str, Any] = {
            "kind": "text",
            "items": self._items,
            "by": by,
            "field": field,
            "split": split,
            "sha256": sha256,
            **(self._split.fingerprint() if self._split else {}),
        }
        self._block = functools.lru_cache(maxsize=4)(self._read_block)

    def __len__(self) -> int:
        return self._items

    def origin(self, i: int) -> str:
        block = self._block_of(i)
        file = self._files[self._file[block]]
        if not self._in_lines(file) or not self._stop[block]:
            return str(file)
        if block in self._problems:
            return f"{file}:{self._line[block]}"
        return f"{file}:{self._block(block)[i - self._first[block]][0]}"

    def __getitem__(self, i: int) -> Document:
        text, row = self._read(i)
        meta = {key: value for key, value in row.items() if key not in ("id", self._field)}
        return Document((TextPart(text),), id=str(row.get("id", "")), origin=self.origin(i), meta=meta)

    def texts(self, i: int) -> list[str]:
        return [self._read(i)[0]]

    def language(self, i: int) -> str:
        """What language item i is in, "" where that is not known."""
        if self._language_from == "file":
            return self._files[self._file[self._block_of(i)]].stem
        try:
            known = self._read(i)[1].get(self._language_from)
        except BadItem:
            return ""
        return known if isinstance(known, str) else ""

    # ---- one item -------------------------------------------------------------------------------------------------

    def _block_of(self, i: int) -> int:
        if not 0 <= i < self._items:
            raise IndexError(f"item {i}: {self.name} has {self._items}")
        return bisect.bisect_right(self._first, i) - 1

    def _read(self, i: int) -> tuple[str, Mapping[str, Any]]:
        """The text of item i, and the row it stands in."""
        block = self._block_of(i)
        if block in self._problems:
            kind, reason = self._problems[block]
            raise BadItem(kind, self.origin(i), reason)
        _, start, data = self._block(block)[i - self._first[block]]
        if problem := _too_large(len(data), "one line"):
            raise BadItem(problem[0], self.origin(i), problem[1])
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"found {data[error.start]:#04x} at byte {start + error.start} of the file"
            raise BadItem("bad_utf8", self.origin(i), f"expected UTF-8, {found}") from error
        row: Mapping[str, Any] = {}
        if _is_jsonl(self._files[self._file[block]]):
            text, row = self._parse(i, text)
        if not text.strip():
            raise BadItem("empty_text", self.origin(i), "the text is empty")
        return text, row

    def _parse(self, i: int, line: str) -> tuple[str, Mapping[str, Any]]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"expected one JSON object, found {line[:40]!r}: {error}"
            raise BadItem("bad_json", self.origin(i), reason) from error
        text = row.get(self._field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = f"the keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
            reason = f"expected an object with a string {self._field!r}, found {found}"
            raise BadItem("bad_row", self.origin(i), reason)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            reason = f"{self._field!r} has a lone surrogate at character {error.start}"
            raise BadItem("bad_text", self.origin(i), reason) from error
        return text, row

    def _read_block(self, block: int) -> list[tuple[int, int, bytes]]:
        """Number of the line, offset in the file and bytes of every item of a block."""
        file, start = self._files[self._file[block]], self._start[block]
        with open(file, "rb") as stream:
            stream.seek(start)
            data = stream.read(self._stop[block] - start)
        if not self._in_lines(file):
            return [(1, 0, data)]
        items = []
        for number, line in enumerate(data.split(b"\n"), self._line[block]):
            if self._is_item(file, line):
                items.append((number, start, line.removesuffix(b"\r")))
            start += len(line) + 1
        return items

    # ---- the index ------------------------------------------------------------------------------------------------

    def _index(self, path: Path, inside: Path) -> str:
        """Reads all files for the places of their items; returns the sha256 of names and contents."""
        # Of every block: its first item, its file, where in the file it starts and stops, the number of its first line.
        self._first, self._file, self._start, self._stop, self._line = (array("q") for _ in range(5))
        self._problems: dict[int, tuple[str, str]] = {}  # blocks that are one bad item: kind and reason
        self._items = 0
        digest = hashlib.sha256()
        for number, file in enumerate(self._files):
            digest.update(self._name(file).encode(errors="surrogateescape"))
            try:
                if not file.resolve().is_relative_to(inside):
                    self._add(number, problem=("path_escapes", f"expected a file inside {path}, found a link"))
                    continue
                with open(file, "rb") as stream:
                    index = self._index_lines if self._in_lines(file) else self._index_file
                    index(number, _Digested(stream, digest))
            except (OSError, RuntimeError) as error:  # no permission, a loop of links
                self._add(number, problem=("unreadable_file", str(error)))
        return digest.hexdigest()

    def _name(self, file: Path) -> str:
        return file.relative_to(self._root).as_posix()

    def _in_lines(self, file: Path) -> bool:
        return self._by == "line" or _is_jsonl(file)

    def _add(
        self,
        file: int,
        start: int = 0,
        stop: int = 0,
        line: int = 1,
        items: int = 1,
        problem: tuple[str, str] | None = None,
    ) -> None:
        if problem:
            self._problems[len(self._first)] = problem
        if items:
            entries = (self._items, file, start, stop, line)
            columns = (self._first, self._file, self._start, self._stop, self._line)
            for column, entry in zip(columns, entries, strict=True):
                column.append(entry)
            self._items += items

    def _index_file(self, number: int, stream: _Digested) -> None:
        size = 0
        while data := stream.read(1 << 20):
            size += len(data)
        if self._in_split({"id": self._name(self._files[number])}, b""):
            self._add(number, 0, size, problem=_too_large(size, "one file; by='line' makes every line a document"))

    def _index_lines(self, number: int, stream: _Digested) -> None:
        start, line = 0, 1
        while data := stream.read(_BLOCK):
            head = data.rfind(b"\n") + 1  # where the last line begins
            data += stream.readline(_LARGEST)
            size = len(data)
            if too_large := size - head >= _LARGEST and not data.endswith(b"\n"):
                while (more := stream.readline(1 << 20)) and not more.endswith(b"\n"):
                    size += len(more)
                size, data = size + len(more), data[:head]
            items = sum(self._is_item(self._files[number], text) for text in data.split(b"\n"))
            self._add(number, start, start + len(data), line, items)
            line += data.count(b"\n")
            if too_large:
                self._add(number, start + head, start + size, line, problem=_too_large(size - head, "one line"))
                line += 1
            start += size

    def _is_item(self, file: Path, line: bytes) -> bool:
        line = line.strip()
        if not line or self._split is None:
            return bool(line)
        if not _is_jsonl(file):
            return self._in_split({}, line)
        try:
            row = json.loads(line)
            return self._in_split(row, line)
        except (ValueError, RecursionError, AttributeError):
            return True  # a row that cannot be read is in every split, so that it is reported

    def _in_split(self, row: Mapping[str, Any], data: bytes) -> bool:
        return self._split is None or self._split.has(row, data)


class _Digested:
    """A file whose bytes go through a digest as they are read."""

    def __init__(self, stream: BinaryIO, digest: Any):
        self._stream, self._digest = stream, digest

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        return data

    def readline(self, size: int) -> bytes:
        data = self._stream.readline(size)
        self._digest.update(data)
        return data


def _too_large(size: int, what: str) -> tuple[str, str] | None:
    if size <= _LARGEST:
        return None
    return "too_large", f"expected at most {_LARGEST >> 20} MiB, found {size / 2**20:.0f} MiB in {what}"


def _is_jsonl(file: Path) -> bool:
    return file.suffix == ".jsonl"


def _find(root: Path, patterns: Sequence[str]) -> list[Path]:
    """The files under a folder that have one of these names, sorted."""
    if not root.is_dir():
        raise UserError(f"{root}: no such file or folder")
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UserError(f"files: expected patterns of names inside {root}, found {pattern!r}")
    found = {path for pattern in patterns for path in root.rglob(pattern) if not path.is_dir()}
    shown = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not shown:
        raise UserError(f"{root}: expected files named {', '.join(patterns)} in it, found none")
    return sorted(shown, key=lambda path: path.relative_to(root).as_posix())
