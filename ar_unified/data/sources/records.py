"""The base class of sources of records. It reads many records at once; each becomes a document when it is decoded."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ar_unified.data import images
from ar_unified.data.files import AnyFolder, FileError
from ar_unified.data.items import BadItem
from ar_unified.data.sources.columns import Columns
from ar_unified.language.document import Document, DocumentError, TextPart, check_text
from ar_unified.language.rows import document_from_json

Record = Mapping[str, object]
_BLANK = np.zeros((1, 1, 3), np.uint8)


class BadRecord(Exception):
    """What is wrong with a record. It becomes a BadItem, which also has the record's origin."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


class RecordSource(ABC):
    """A source whose items are records (`columns`). A subclass defines `__len__`, `origin` and `read`.

    Args:
        folder: the folder of images for records that only name them; None if all records must contain their images.
    """

    def __init__(
        self,
        columns: Columns,
        folder: AnyFolder | None,
        name: str,
        *,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        self.columns, self.name, self.reversible, self.limits = columns, name, reversible, limits
        self._folder = folder
        self._decoded = self._decoder(None)

    def _decoder(self, resize: images.Resize | None) -> Callable[[bytes], np.ndarray]:
        # Questions about one image follow each other, so the last few images are kept.
        return functools.lru_cache(maxsize=4)(functools.partial(images.decode, limits=self.limits, resize=resize))

    def resized(self, resize: images.Resize) -> RecordSource:
        """See `items.resized`."""
        other = copy.copy(self)
        other._decoded = other._decoder(resize)
        return other

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def origin(self, i: int) -> str:
        """Where item i comes from, for messages."""

    @abstractmethod
    def read(self, indices: Sequence[int], pictures: bool = True) -> list[Record | BadItem]:
        """Reads these records. If `pictures` is False, reads only what their texts need. Safe to call from many
        threads.
        """

    def fetch(self, indices: Sequence[int]) -> list[Callable[[], Document]]:
        """See `items.fetched`."""
        return [
            functools.partial(self._document, i, record) for i, record in zip(indices, self.read(indices), strict=True)
        ]

    def fetch_texts(self, indices: Sequence[int]) -> list[list[str] | BadItem]:
        """See `items.texts_of`."""
        return [self._texts(i, record) for i, record in zip(indices, self.read(indices, pictures=False), strict=True)]

    def __getitem__(self, i: int) -> Document:
        return self.fetch([i])[0]()

    def texts(self, i: int) -> list[str]:
        """The texts of item i, in reading order. Raises BadItem."""
        (found,) = self.fetch_texts([i])
        if isinstance(found, BadItem):
            raise found
        return found

    def language(self, i: int) -> str:
        """The language that the record states; "" if it states none."""
        (record,) = self.read([i], pictures=False)
        return "" if isinstance(record, BadItem) else self.columns.language(record)

    # ---- one record -----------------------------------------------------------------------------------------------

    def _document(self, i: int, record: Record | BadItem, pictures: bool = True) -> Document:
        if isinstance(record, BadItem):
            raise record
        try:
            row, found = self.columns.row(record, pictures)
            require_words(row)
            document = document_from_json(row, lambda at: self._image(found[int(at)]) if pictures else _BLANK)
        except (BadRecord, images.ImageError, DocumentError) as error:
            raise BadItem(error.kind, self.origin(i), str(error)) from error
        return replace(document, origin=self.origin(i))

    def _texts(self, i: int, record: Record | BadItem) -> list[str] | BadItem:
        try:
            if isinstance(record, BadItem) or not (texts := self.columns.texts(record)):
                return [part.text for part in self._document(i, record, False).parts if isinstance(part, TextPart)]
            for part, text in texts:
                require_words({part: text})
                check_text(text, part)
            return [text for _, text in texts]
        except DocumentError as error:
            return BadItem(error.kind, self.origin(i), str(error))
        except BadItem as bad:
            return bad

    def _image(self, value: Any) -> np.ndarray:
        """Decodes an image of a record.

        value: the bytes of a file, an object with "bytes" and "path" as Hugging Face writes it, or a file's name.
        """
        where = ""
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
            where, data = value.get("path") or "", value.get("bytes")
            value = where or None if data is None else data
        if value is None:
            raise BadRecord("missing_image", "expected an image, found null")
        if isinstance(value, str):
            where = f"{value[:40]}..." if value.startswith("data:") else value
            if self._folder is None:
                raise BadRecord("missing_image", f"{where!r}: expected the bytes of an image, found a text")
        elif not isinstance(value, bytes):
            raise BadRecord("bad_row", f"expected an image, found {type(value).__name__}")
        try:
            return self._decoded(self._folder.read(value) if isinstance(value, str) and self._folder else value)
        except (FileError, images.ImageError) as error:
            raise BadRecord(error.kind, f"{where!r}: {error.reason}" if where else error.reason) from error


def together(size: float) -> int:
    """How many records of `size` bytes are read at once: at most 512, and at most 32 MiB."""
    return int(max(1, min(512, (32 << 20) / max(size, 1))))


def require_words(row: Mapping[str, Any]) -> None:
    """Raises DocumentError if a text of a row is only white space ("empty_text") or bytes ("bad_utf8")."""
    for key in ("text", "question", "answer"):
        if isinstance(row.get(key), bytes):
            raise DocumentError("bad_utf8", f"{key}: expected UTF-8, found {row[key][:40]!r}")
        if isinstance(row.get(key), str) and not row[key].strip():
            raise DocumentError("empty_text", f"{key}: the text is empty")
