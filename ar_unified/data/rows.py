"""Documents from JSONL files whose rows refer to pictures in the same folder, or carry them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified.data import encoding, images
from ar_unified.data.files import FileError, Folder, require_file
from ar_unified.data.items import BadItem
from ar_unified.document import Document, DocumentError, TextPart, document_from_json


class Rows:
    """Rows of JSONL files (`document.document_from_json`), with pictures under `root` or in the row as data: URLs.

    The files are read once at opening, for the place of every line; memory is 24 bytes a row. They are UTF-8: a file
    that is not (`encoding`) is one bad item. What a picture's name means, and `links`: `files.Folder`.

    `split`, as in TFDS, is a name, a part in percent, or both: rows without the key "split" are all "train", and a part
    takes rows by a hash of their (first) picture's reference, else of their id, else of the line: the same picture is
    never on both sides of a border. A row that cannot be read is in every split, so that it is reported.

    Raises:
        UserError: a file is missing.
        ValueError: no row is in `split`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        root: Path,
        *,
        links: bool = False,
        split: str | None = None,
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        for file in files:
            require_file(file)
        self.files, self.root, self.limits = list(files), root, limits
        self.name, self.reversible = label or root.resolve().name, reversible
        self._folder = Folder(root, links)
        chosen, self._found_splits = parse_split(split), set[str]()
        self._file, self._line, self._start, self._length = array("i"), array("q"), array("q"), array("i")
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            for line, start, data in _lines(file):
                digest.update(data)
                if data.strip() and (split is None or self._in(chosen, data)):
                    self._file.append(number)
                    self._line.append(line)
                    self._start.append(start)
                    self._length.append(len(data))
        if split is not None and not self._line:
            names = ", ".join(sorted(self._found_splits)) or "none"
            raise ValueError(f"{root}: no row is in split {split!r}; the rows' splits are: {names}")
        self.fingerprint: dict[str, Any] = {
            "kind": "rows",
            "items": len(self),
            "split": split,
            "sha256": digest.hexdigest(),
        } | ({"links": True} if links else {})
        # Questions about one picture stand together, so the last few pictures are kept.
        self._picture = functools.lru_cache(maxsize=4)(self._load)
        self._open = [os.open(file, os.O_RDONLY) for file in self.files]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", ()):
            os.close(descriptor)

    def _in(self, chosen: tuple[str, float, float], data: bytes) -> bool:
        try:
            row = json.loads(encoding.text(data))
            name = row.get("split", "train")
        except (ValueError, RecursionError, AttributeError):
            return True
        self._found_splits.add(str(name))
        wanted, low, high = chosen
        return (not wanted or name == wanted) and low <= place(row, data) < high

    def __len__(self) -> int:
        return len(self._line)

    def origin(self, i: int) -> str:
        return f"{self.files[self._file[i]]}:{self._line[i]}"

    def __getitem__(self, i: int) -> Document:
        return self._document(i, self._picture)

    def texts(self, i: int) -> list[str]:
        blank = np.zeros((1, 1, 3), np.uint8)
        return [part.text for part in self._document(i, lambda _: blank).parts if isinstance(part, TextPart)]

    def language(self, i: int) -> str:
        """The row's key "language", "" where there is none."""
        try:
            known = self._row(i).get("language")
        except _Bad:
            return ""
        return known if isinstance(known, str) else ""

    def _document(self, i: int, load: Callable[[str], np.ndarray]) -> Document:
        origin = self.origin(i)
        try:
            row = self._row(i)
            document = document_from_json(row, load)
        except (_Bad, images.ImageError, DocumentError) as error:
            raise BadItem(error.kind, origin, str(error)) from error
        return Document(document.parts, document.prompt, id=document.id, origin=origin, meta=document.meta)

    def _row(self, i: int) -> dict[str, Any]:
        start = self._start[i]
        data = os.pread(self._open[self._file[i]], self._length[i], start)
        try:
            row = json.loads(encoding.text(data if start else encoding.unmarked(data)))
        except encoding.EncodingError as error:
            raise _Bad("bad_utf8", str(error)) from error
        except (ValueError, RecursionError) as error:
            raise _Bad("bad_json", f"expected one JSON object, found {data[:40]!r}: {error}") from error
        if not isinstance(row, dict):
            raise _Bad("bad_row", f"expected a JSON object, found {type(row).__name__}")
        for key in ("text", "question", "answer"):
            if isinstance(row.get(key), str) and not row[key].strip():
                raise _Bad("empty_text", f"{key}: the text is empty")
        return row

    def _load(self, reference: str) -> np.ndarray:
        where = f"{reference[:40]}..." if reference.startswith("data:") else reference
        try:
            return images.decode(self._folder.read(reference), self.limits)
        except (FileError, images.ImageError) as error:
            raise _Bad(error.kind, f"{where!r}: {error.reason}") from error


class _Bad(Exception):
    """BadItem before its origin is known."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), offset and bytes of every line, no byte order mark; of a file that is no UTF-8, its head."""
    with open(file, "rb") as stream:
        try:
            start = encoding.begin(stream)
        except encoding.EncodingError:
            stream.seek(0)
            yield 1, 0, stream.read(encoding.HEAD)
            return
        for number, data in enumerate(stream, 1):
            yield number, start, data
            start += len(data)


def parse_split(split: str | None) -> tuple[str, float, float]:
    """Name ("": any), and the part [low, high) of 0..1."""
    percent = r"(\d+(?:\.\d+)?)%"
    match = re.fullmatch(rf"([^\[\]%]*)(?:\[(?:{percent})?:(?:{percent})?\])?", split or "")
    if not match:
        raise ValueError(f'split: expected "name", "name[:95%]" or "[95%:]", found {split!r}')
    name, low, high = match.groups()
    return name, float(low or 0) / 100, float(high or 100) / 100


def place(row: Mapping[str, Any], data: bytes) -> float:
    """Where in 0..1 a row falls, by the hash of what it must stay together with."""
    segments = row.get("segments")
    inner = [s["image"] for s in segments if isinstance(s, dict) and "image" in s] if isinstance(segments, list) else []
    key = row.get("image") or next(iter(inner), None) or row.get("id")
    digest = hashlib.blake2b(str(key).encode(errors="replace") if key else data, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
