"""Documents from JSONL files whose rows refer to pictures in the same folder, or carry them."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified.data import images
from ar_unified.data.items import BadItem
from ar_unified.data.splits import Split
from ar_unified.document import Document, DocumentError, TextPart, document_from_json
from ar_unified.errors import UserError


class Rows:
    """Rows of JSONL files (`document.document_from_json`), with pictures under `root` or in the row as data: URLs.

    The files are read once at opening, twice for a part, for the place of every line; memory is 24 bytes a row.

    `split`, as in TFDS, is a name, a part in percent, or both: rows without the key "split" are all "train", and a part
    takes pictures with all their rows, rows without one by their id, else by their line (`splits` says which): the same
    picture is never on both sides of a border. A row that cannot be read is in every split, so that it is reported.

    Args:
        beside: files of other sources over the same pictures, which are to have their borders where this one has.

    Raises:
        UserError: a file is missing, or no row is in `split` (EmptySplit: for want of more pictures).
    """

    def __init__(
        self,
        files: Sequence[Path],
        root: Path,
        *,
        split: str | None = None,
        beside: Sequence[Path] = (),
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{missing[0]}: no such file; expected one JSON object a line in it")
        self.files, self.root, self.limits = list(files), root, limits
        self.name, self.reversible = label or root.resolve().name, reversible
        self._inside = root.resolve()
        chosen = Split(split) if split is not None else None
        if chosen and chosen.by_part:
            for file in (*self.files, *beside):
                for _, _, data in _lines(file):
                    _has(chosen, data, own=file in self.files)
            chosen.settle()
        self._file, self._line, self._start, self._length = array("i"), array("q"), array("q"), array("i")
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            for line, start, data in _lines(file):
                digest.update(data)
                if data.strip() and (chosen is None or _has(chosen, data)):
                    self._file.append(number)
                    self._line.append(line)
                    self._start.append(start)
                    self._length.append(len(data))
        if chosen and not self._line:
            raise chosen.empty(root, "row")
        self.fingerprint: dict[str, Any] = {
            "kind": "rows",
            "items": len(self),
            "split": split,
            "sha256": digest.hexdigest(),
            **(chosen.fingerprint() if chosen else {}),
        }
        # Questions about one picture stand together, so the last few pictures are kept.
        self._picture = functools.lru_cache(maxsize=4)(self._load)
        self._open = [os.open(file, os.O_RDONLY) for file in self.files]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", ()):
            os.close(descriptor)

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
        data = os.pread(self._open[self._file[i]], self._length[i], self._start[i])
        try:
            row = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _Bad("bad_utf8", f"expected UTF-8, found byte {data[error.start]:#04x} at {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise _Bad("bad_json", f"expected one JSON object, found {data[:40]!r}: {error}") from error
        if not isinstance(row, dict):
            raise _Bad("bad_row", f"expected a JSON object, found {type(row).__name__}")
        for key in ("text", "question", "answer"):
            if isinstance(row.get(key), str) and not row[key].strip():
                raise _Bad("empty_text", f"{key}: the text is empty")
        return row

    def _load(self, reference: str) -> np.ndarray:
        embedded = reference.startswith("data:")
        data = _embedded(reference) if embedded else self._file_bytes(reference)
        try:
            return images.decode(data, self.limits)
        except images.ImageError as error:
            where = f"{reference[:40]}..." if embedded else reference
            raise _Bad(error.kind, f"{where}: {error.reason}") from error

    def _file_bytes(self, reference: str) -> bytes:
        try:
            path = (self.root / reference).resolve()
            if Path(reference).is_absolute() or not path.is_relative_to(self._inside):
                raise _Bad("path_escapes", f"expected a path inside {self.root}, found {reference!r}")
            if not path.is_file():
                raise _Bad("missing_image", f"{reference}: no such file")
            return path.read_bytes()
        except (OSError, RuntimeError, ValueError) as error:  # no permission, a loop of links, a NUL in the name
            raise _Bad("missing_image", f"{reference!r}: {error}") from error


class _Bad(Exception):
    """BadItem before its origin is known."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), offset and bytes of every line."""
    start = 0
    with open(file, "rb") as stream:
        for number, data in enumerate(stream, 1):
            yield number, start, data
            start += len(data)


def _has(split: Split, data: bytes, *, own: bool = True) -> bool:
    try:
        row = json.loads(data)
        return split.has(row, data, own=own)
    except (ValueError, RecursionError, AttributeError):
        return True


def _embedded(reference: str) -> bytes:
    header, comma, payload = reference.partition(",")
    if not comma or not header.endswith(";base64"):
        raise _Bad("unreadable_image", f"expected data:<type>;base64,<bytes>, found {header[:40]!r}")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise _Bad("unreadable_image", f"data: URL: {error}") from error
