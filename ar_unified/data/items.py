"""The interface of a source, and the error for an item that cannot be used."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

from ar_unified.data.images import Resize
from ar_unified.language.document import Document, ImagePart, Part


class BadItem(Exception):
    """An item that cannot be used.

    Attributes:
        kind: the kind of fault: "bad_utf8", "bad_json", "bad_row", "bad_text", "empty_text", "missing_image",
            "path_escapes", "empty_file", "unreadable_image", "image_shape", "unreadable_file", "too_large",
            "text_lost", "same_answers" (two answers with equal tokens), or another kind of DocumentError.
        origin: "file:line", or the dataset's name and index.
        reason: what was expected and what was found.
    """

    def __init__(self, kind: str, origin: str, reason: str):
        reason = printable(reason)
        super().__init__(f"{printable(origin)}: {kind}: {reason}")
        self.kind, self.origin, self.reason = kind, origin, reason

    @property
    def filtered(self) -> bool:
        """Whether the item is only left out because config.data.filters asks for it."""
        return self.kind.startswith("filtered_")


def printable(text: str) -> str:
    """Replaces control characters and lone surrogates, which file names may contain, by escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class LeftOut:
    """Counts bad items by kind, and keeps the first of each.

    Attributes:
        kinds: maps each kind to {"count", "first"}, in the order in which the kinds came.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, Any]] = {}

    def __call__(self, bad: BadItem) -> None:
        """Counts one bad item."""
        self.kinds.setdefault(bad.kind, {"count": 0, "first": str(bad)})["count"] += 1

    def __str__(self) -> str:
        return "; ".join(f"{found['count']} {kind}, first {found['first']}" for kind, found in self.kinds.items())


TOGETHER = 64  # items read at once if the source has no `together`; only their bytes are in memory, not their pixels


def fetched(source: Source, indices: Iterable[int]) -> Iterator[tuple[int, Callable[[], Document]]]:
    """Yields each of `indices`, in order, with a function that returns its item. The source reads many items at a time
    if it can. Each function decodes one item, and may run in any thread.

    The function raises BadItem, as `source[i]` does.
    """
    many = getattr(source, "fetch", None)
    for chunk in _chunks(indices, getattr(source, "together", TOGETHER)):
        decode = many(chunk) if many else [functools.partial(source.__getitem__, i) for i in chunk]
        yield from zip(chunk, decode, strict=True)


def texts_of(source: Source, indices: Iterable[int]) -> Iterator[tuple[int, list[str] | BadItem]]:
    """Yields each of `indices`, in order, with the item's texts or its BadItem. Many are read at a time if possible."""
    many = getattr(source, "fetch_texts", None)
    for chunk in _chunks(indices, getattr(source, "together", TOGETHER)):
        yield from zip(chunk, many(chunk) if many else (_texts(source, i) for i in chunk), strict=True)


def _texts(source: Source, i: int) -> list[str] | BadItem:
    try:
        return source.texts(i)
    except BadItem as bad:
        return bad


def _chunks(indices: Iterable[int], size: int) -> Iterator[list[int]]:
    left = iter(indices)
    while chunk := list(islice(left, size)):
        yield chunk


def resized(source: Source, resize: Resize) -> Source:
    """The same items with resized images. A source that can resize images does so while it decodes them. If several
    items of the source share the array of an image, they also share the array of the resized image.
    """
    early = getattr(source, "resized", None)
    return early(resize) if early else _Resized(source, resize)


class _Resized:
    """A source whose images are resized after they were decoded."""

    def __init__(self, source: Source, resize: Resize):
        self._source, self._resize = source, resize
        self._last: deque[tuple[np.ndarray, ImagePart]] = deque(maxlen=4)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Document:
        return self._source[i].changed(self._part)

    def fetch(self, indices: Sequence[int]) -> list[Callable[[], Document]]:
        """See `fetched`."""
        return [functools.partial(self._decoded, decode) for _, decode in fetched(self._source, indices)]

    def _decoded(self, decode: Callable[[], Document]) -> Document:
        return decode().changed(self._part)

    def _part(self, part: Part) -> Part:
        if not isinstance(part, ImagePart):
            return part
        known = next((small for given, small in tuple(self._last) if given is part.pixels), None)
        if known is None:
            known = ImagePart(self._resize(part.pixels))
            self._last.append((part.pixels, known))
        return known


def language(source: Source, i: int) -> str:
    """The language that item i declares; "" if the source does not know it."""
    known = getattr(source, "language", None)
    return known(i) if known else ""


def has_images(source: Source) -> bool:
    """False for a source that is known to contain text alone."""
    return getattr(source, "has_images", True)


def names_images(source: Source) -> bool:
    """False for a source that contains text alone, or in which no item names an image."""
    return getattr(source, "names_images", has_images(source))


class Source(Protocol):
    """Documents by index. Safe to read from many threads.

    A source that reads many items faster than one by one has two more methods. `fetch(indices)` returns a list of
    functions that return the documents (see `fetched`). `fetch_texts(indices)` returns for each item what `texts`
    returns, or the BadItem that it raises. `together` is the best number of items to read at once. A source that
    decodes images itself has `resized(resize)`, which returns the same source with each image resized as it is decoded.

    Attributes:
        name: unique among the sources of a run; also names its folder of shards.
        reversible: whether its pairs of one text and one image may be read in both directions.
        fingerprint: JSON values that change when the items change. Images that items only name are not read for it.
    """

    name: str
    reversible: bool

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """JSON values that change when the items change."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Document:
        """Item i with images as ImagePart. Raises BadItem."""

    def texts(self, i: int) -> list[str]:
        """The texts of item i. Opens no image. Raises BadItem."""

    def origin(self, i: int) -> str:
        """Where item i comes from, for messages."""
