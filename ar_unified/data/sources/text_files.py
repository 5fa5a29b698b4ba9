"""Documents of text alone from plain files: whole .txt and .md files or their lines, and the rows of .jsonl files."""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ar_unified import storage
from ar_unified.data import encoding
from ar_unified.data.files import Found, folder_at
from ar_unified.data.items import BadItem
from ar_unified.data.sources import packed
from ar_unified.data.sources.splits import Split
from ar_unified.errors import UserError
from ar_unified.language.document import Document, TextPart
from ar_unified.manifests import Json
from ar_unified.storage import AnyPath

FILES = ("*.txt", "*.md", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
_BLOCK = 1 << 14  # bytes that share an entry of the index and are read at once
_LARGEST = 1 << 26  # the most bytes of a document


class TextFiles:
    """The texts of the files under `path`, in the order of their names. They may be far larger than memory.

    Opening reads the files once, or twice if `split` is a part. It keeps in memory the names of the files and 40 bytes
    for every 16 KiB of text, at least 40 bytes per file. Line ends are not part of a line, a byte order mark is not
    part of a text, and blank lines are not items; nothing else is changed. A file that is not UTF-8 (`encoding`) or
    cannot be read is one bad item. The rest of a compressed file (.jsonl.gz, .jsonl.zst) that is cut short is one bad
    item, too; this rest begins up to 16 KiB before the cut.

    `split` is as for `Rows`. Whole files and lines belong to the split "train". The name of a whole file decides its
    part; for lines, the text decides.

    Args:
        path: a folder, or one file.
        files: patterns of names, ignoring case. Folders below are searched too; `files.Folder` says which.
        by: what one document is, "file" or "line". In a .jsonl file, a document is always a row.
        field: the key of a row's text. The other keys become `meta`.
        language: "file" means that a file's short name (`languages`) is the language of its texts. Any other value is
            the key of the language in a row.
        links: whether links that lead out of the folder are followed.

    Raises:
        UserError: if there is no such path, no file with these names or no text in `split`, or if an argument is out of
            range.
    """

    has_images = False

    def __init__(
        self,
        path: str | AnyPath,
        *,
        files: Sequence[str] = FILES,
        by: str = "file",
        field: str = "text",
        language: str = "language",
        links: bool = False,
        split: str | None = None,
        label: str | None = None,
        reversible: bool = True,
    ):
        if by not in ("file", "line"):
            raise UserError(f"by: expected file or line, found {by!r}")
        path = storage.path(path)
        alone = path.is_file()
        self.name, self.reversible = label or (path.stem if alone else path.resolve().name), reversible
        self._by, self._field, self._language_from = by, field, language
        self._split = None if split is None else Split(split)
        self._root = path.parent if alone else path
        found = [Found(path.name)] if alone else find(path, files, links)
        self._names = [file.name for file in found]
        self._files = [self._root / name for name in self._names]
        self._languages = languages(self._files)

        if self._split and self._split.by_part:
            self._index(found)
            self._split.settle()
        sha256 = self._index(found)
        if self._split and not self._items:
            raise self._split.empty(path, "text")
        self.fingerprint: dict[str, object] = {
            "kind": "text",
            "items": self._items,
            "by": by,
            "field": field,
            "split": split,
            "sha256": sha256,
            **(self._split.fingerprint() if self._split else {}),
        }
        self._reader = functools.lru_cache(maxsize=16)(packed.Reader)
        self._block = functools.lru_cache(maxsize=4)(self._read_block)

    def __len__(self) -> int:
        return self._items

    def origin(self, i: int) -> str:
        """The text's file, and its line if a file has many texts."""
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
        return Document.of((TextPart(text),), id=str(row.get("id", "")), origin=self.origin(i), meta=meta)

    def texts(self, i: int) -> list[str]:
        """The one text of item i. Raises BadItem."""
        return [self._read(i)[0]]

    def language(self, i: int) -> str:
        """The language of item i; "" if it is not known."""
        if self._language_from == "file":
            return self._languages[self._file[self._block_of(i)]]
        try:
            known = self._read(i)[1].get(self._language_from)
        except BadItem:
            return ""
        return known if isinstance(known, str) else ""

    # ---- one item -------------------------------------------------------------------------------------------------

    def _block_of(self, i: int) -> int:
        if not 0 <= i < self._items:
            raise IndexError(f"item {i}: {self.name} has {self._items} items")
        return bisect.bisect_right(self._first, i) - 1

    def _read(self, i: int) -> tuple[str, Mapping[str, Json]]:
        """The text of item i, and the row that contains it."""
        block = self._block_of(i)
        if block in self._problems:
            kind, reason = self._problems[block]
            raise BadItem(kind, self.origin(i), reason)
        try:
            _, start, data = self._block(block)[i - self._first[block]]
        except (OSError, IndexError) as error:
            reason = f"the file has changed since it was opened: {error}"
            raise BadItem("unreadable_file", str(self._files[self._file[block]]), reason) from error
        if problem := _too_large(len(data), "one line"):
            raise BadItem(problem[0], self.origin(i), problem[1])
        try:
            text = encoding.text(data, start)
        except encoding.EncodingError as error:
            raise BadItem("bad_utf8", self.origin(i), str(error)) from error
        row: Mapping[str, Json] = {}
        if _is_jsonl(self._files[self._file[block]]):
            text, row = self._parse(i, text)
        if not text.strip():
            raise BadItem("empty_text", self.origin(i), "the text is empty")
        return text, row

    def _parse(self, i: int, line: str) -> tuple[str, Mapping[str, Json]]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"expected one JSON object, found {line[:40]!r}: {error}"
            raise BadItem("bad_json", self.origin(i), reason) from error
        text = row.get(self._field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = f"the keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
            reason = f"expected an object with a text under the key {self._field!r}, found {found}"
            raise BadItem("bad_row", self.origin(i), reason)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            reason = f"{self._field!r} has a lone surrogate at character {error.start}"
            raise BadItem("bad_text", self.origin(i), reason) from error
        return text, row

    def _read_block(self, block: int) -> list[tuple[int, int, bytes]]:
        """The number of the line, the offset in the file and the bytes of each item in a block."""
        file, start = self._files[self._file[block]], self._start[block]
        data = self._reader(file).read(start, self._stop[block] - start)
        if not self._in_lines(file):
            return [(1, start, data)]
        items = []
        for number, line in enumerate(data.split(b"\n"), self._line[block]):
            if self._is_item(file, line):
                items.append((number, start, line.removesuffix(b"\r")))
            start += len(line) + 1
        return items

    # ---- the index ------------------------------------------------------------------------------------------------

    def _index(self, found: Sequence[Found]) -> str:
        """Reads all files to find their items; returns the sha256 of names and contents."""
        # For every block: its first item, its file, where in the file it starts and stops, the number of its first
        # line.
        self._first, self._file, self._start, self._stop, self._line = (array("q") for _ in range(5))
        self._problems: dict[int, tuple[str, str]] = {}  # kind and reason of each block that is one bad item
        self._items = 0
        digest = hashlib.sha256()
        for number, (file, entry) in enumerate(zip(self._files, found, strict=True)):
            digest.update(entry.name.encode(errors="surrogateescape"))
            if entry.error:
                self._add(number, problem=(entry.error.kind, entry.error.reason))
                continue
            try:
                with packed.open_binary(file) as stream:
                    index = self._index_lines if self._in_lines(file) else self._index_file
                    index(number, encoding.begin(stream), _Digested(stream, digest))
            except encoding.EncodingError as error:
                self._add(number, problem=("bad_utf8", str(error)))
            except OSError as error:  # no permission, a disk that fails
                self._add(number, problem=("unreadable_file", str(error)))
        return digest.hexdigest()

    def _in_lines(self, file: AnyPath) -> bool:
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

    def _index_file(self, number: int, start: int, stream: _Digested) -> None:
        size = 0
        while data := stream.read(1 << 20):
            size += len(data)
        if self._in_split({"id": self._names[number]}, b""):
            problem = _too_large(size, "one file; by='line' makes every line a document")
            self._add(number, start, start + size, problem=problem)

    def _index_lines(self, number: int, start: int, stream: _Digested) -> None:
        line = 1
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

    def _is_item(self, file: AnyPath, line: bytes) -> bool:
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

    def _in_split(self, row: Mapping[str, Json], data: bytes) -> bool:
        return self._split is None or self._split.has(row, data)


class _Digested:
    """A file that adds all bytes that are read from it to a digest."""

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


def _is_jsonl(file: AnyPath) -> bool:
    return packed.unpacked(file).suffix.lower() == ".jsonl"


def languages(files: Sequence[AnyPath]) -> list[str]:
    """A short name for each file: its name without the ending. If another file of its folder would get the same short
    name, the ending is kept.
    """
    stems = Counter((file.parent, file.stem) for file in files)
    return [file.stem if stems[file.parent, file.stem] == 1 else file.name for file in files]


def find(root: AnyPath, patterns: Sequence[str], links: bool) -> list[Found]:
    """The files under a folder that match one of these patterns, sorted. Raises UserError if there are none."""
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UserError(f"files: expected patterns of names inside {root}, found {pattern!r}")
    wanted = [("**", *PurePosixPath(pattern.lower()).parts) for pattern in patterns]
    found = folder_at(root, links).search(
        lambda name: any(_matches(name.lower().split("/"), parts) for parts in wanted)
    )
    if not found:
        raise UserError(f"{root}: expected files named {', '.join(patterns)} in it, found none")
    return found


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a pattern in which ** stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
