"""Documents from JSONL files. The rows refer to images in the same folder, or contain them."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ar_unified.data import encoding, images
from ar_unified.data.files import FileError, folder_at, require_file
from ar_unified.data.items import BadItem
from ar_unified.data.sources import packed
from ar_unified.data.sources.columns import HINT, Columns
from ar_unified.data.sources.records import require_words
from ar_unified.data.sources.splits import Split
from ar_unified.language.document import Document, DocumentError, TextPart
from ar_unified.language.rows import UnknownKeys, document_from_json
from ar_unified.storage import AnyPath

_LONGEST = 1 << 27  # the most bytes of a line
# A key or a type of part that stands for an image (`language.rows`), or an escape that could hide one.
_IMAGE = re.compile(rb'(?<!\\)"image(_url)?"|\\u00[4-7]')


class Rows:
    """Rows of JSONL files (`language.rows`), with images under `root` or in the row as data: URLs.

    Opening reads the files once to find every line, or twice if `split` is a part; memory is 24 bytes per row. Files
    may be compressed (.gz, .zst: `packed`). They must be UTF-8: a file in another encoding (`encoding`) is one bad
    item, and so is the rest of a file that is cut short. `files.Folder` has the rules for names and `links`.

    `split`, as in TFDS, is a name, a part in percent, or both; rows without the key "split" are "train". A part takes
    whole images with all their rows, so the same image is never on both sides of a border between parts. Rows without
    an image are divided by their id, or by their line if they have no id (see `splits`). A row that cannot be read is
    in every split, so that it is reported.

    Args:
        beside: files of other sources that have the same images. Their rows are counted too, so that all sources have
            the same borders between splits.
        columns: maps a document part to a key of a row, if rows do not have the form of `language.rows`; see `Columns`.

    Raises:
        UserError: if a file is missing, or if no row is in `split` (EmptySplit if there are too few images).
    """

    def __init__(
        self,
        files: Sequence[AnyPath],
        root: AnyPath,
        *,
        links: bool = False,
        split: str | None = None,
        beside: Sequence[AnyPath] = (),
        columns: Mapping[str, str] | None = None,
        label: str | None = None,
        reversible: bool = True,
        limits: images.Limits = images.LIMITS,
    ):
        for file in files:
            require_file(file)
        self.files, self.root, self.limits = list(files), root, limits
        self.name, self.reversible = label or root.resolve().name, reversible
        self._folder = folder_at(root, links)
        self._columns = Columns(columns) if columns else None
        chosen = Split(split) if split is not None else None
        if chosen and chosen.by_part:
            for file in (*self.files, *beside):
                for _, _, data in _lines(file):
                    _has(chosen, data, own=file in self.files)
            chosen.settle()
        self._file, self._line, self._start, self._length = array("i"), array("q"), array("q"), array("i")
        self.names_images = False  # True if one of the rows may name an image
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            for line, start, data in _lines(file):
                digest.update(data)
                if not data or (data.strip() and (chosen is None or _has(chosen, data))):
                    self.names_images = self.names_images or bool(_IMAGE.search(data))
                    self._file.append(number)
                    self._line.append(line)
                    self._start.append(start)
                    self._length.append(len(data))
        if chosen and not self._line:
            raise chosen.empty(root, "row")
        self.fingerprint: dict[str, object] = {
            "kind": "rows",
            "items": len(self),
            "split": split,
            "sha256": digest.hexdigest(),
            **(chosen.fingerprint() if chosen else {}),
            **({"links": True} if links else {}),
            **({"columns": dict(columns)} if columns else {}),
        }
        self._resize: images.Resize | None = None
        self._image = self._loader()
        self._open = [packed.Reader(file) for file in self.files]

    def _loader(self) -> Callable[[str], np.ndarray]:
        # Questions about one image follow each other, so the last few images are kept.
        return functools.lru_cache(maxsize=4)(self._load)

    def resized(self, resize: images.Resize) -> Rows:
        """See `items.resized`."""
        other = copy.copy(self)
        other._resize, other._image = resize, other._loader()
        return other

    def __len__(self) -> int:
        return len(self._line)

    def origin(self, i: int) -> str:
        """The row's file and line."""
        return f"{self.files[self._file[i]]}:{self._line[i]}"

    def __getitem__(self, i: int) -> Document:
        return self._document(i, self._image)

    def texts(self, i: int) -> list[str]:
        """The texts of row i, in reading order; no image is opened. Raises BadItem."""
        blank = np.zeros((1, 1, 3), np.uint8)
        return [part.text for part in self._document(i, lambda _: blank).parts if isinstance(part, TextPart)]

    def language(self, i: int) -> str:
        """The value of the row's key "language"; "" if there is none."""
        try:
            row = self._row(i)
        except _Bad:
            return ""
        known = row.get("language") if self._columns is None else self._columns.language(row)
        return known if isinstance(known, str) else ""

    def _document(self, i: int, load: Callable[[str], np.ndarray]) -> Document:
        origin = self.origin(i)
        try:
            row = self._row(i)
            if self._columns is None:
                document = document_from_json(row, load)
            else:
                row, found = self._columns.row(row)
                require_words(row)
                document = document_from_json(row, lambda at: load(_reference(found[int(at)])))
        except (_Bad, images.ImageError, DocumentError) as error:
            hint = f". {HINT}" if isinstance(error, UnknownKeys) and self._columns is None else ""
            raise BadItem(error.kind, origin, f"{error}{hint}") from error
        return replace(document, origin=origin)

    def _row(self, i: int) -> dict[str, object]:
        start, length = self._start[i], self._length[i]
        if length > _LONGEST:
            raise _Bad("too_large", f"expected a line of at most {_LONGEST >> 20} MiB")
        try:
            data = self._open[self._file[i]].read(start, length or _LONGEST)
        except OSError as error:
            raise _Bad("unreadable_file", f"the rest of the file cannot be read: {error}") from error
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
            return images.decode(self._folder.read(reference), self.limits, self._resize)
        except (FileError, images.ImageError) as error:
            raise _Bad(error.kind, f"{where!r}: {error.reason}") from error


class _Bad(Exception):
    """What is wrong with a row. It becomes a BadItem, which also has the row's origin."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def _reference(value: object) -> str:
    """The reference to an image in a row: a text, or an object with a "path"."""
    found = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(found, str) or not found:
        raise DocumentError("bad_row", f"expected a reference to an image, found {value!r:.80}")
    return found


def _lines(file: AnyPath) -> Iterator[tuple[int, int, bytes]]:
    """Yields the number (from 1), the offset and the bytes of every line, without a byte order mark. If the file is not
    UTF-8, it yields only the first bytes.

    A line that is too long is cut to one byte more than allowed. If the rest of the file cannot be unpacked, it is
    yielded as one empty line.
    """
    with packed.open_binary(file) as stream:
        start, number = 0, 1
        try:
            try:
                start = encoding.begin(stream)
            except encoding.EncodingError:
                stream.seek(0)
                yield 1, 0, stream.read(encoding.HEAD)
                return
            while data := stream.readline(_LONGEST + 1):
                yield number, start, data
                start += len(data)
                while len(data) > _LONGEST and not data.endswith(b"\n"):
                    start += len(data := stream.readline(_LONGEST + 1))
                number += 1
        except OSError:
            yield number, start, b""


def _has(split: Split, data: bytes, *, own: bool = True) -> bool:
    try:
        row = json.loads(encoding.text(data))
        return split.has(row, data, own=own)
    except (ValueError, RecursionError, AttributeError):
        return True
