"""Copies that were found in the data: how many there are, and a few of them side by side."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ar_unified.data.filters.duplicates import Search
from ar_unified.data.items import BadItem, Source, printable
from ar_unified.language.document import Document, ImagePart, TextPart

_EXAMPLES = 12
_OFTEN = 8  # an image in at least this many documents is reported


@dataclass(frozen=True)
class Pair:
    """Two documents that are alike: the origin of each, and its text or its image, uint8 [H, W, 3]."""

    origins: tuple[str, str]
    contents: tuple[str | np.ndarray, str | np.ndarray]


@dataclass
class Kind:
    """One way in which documents are alike: a phrase that describes it, the number of such documents (`count` out of
    `of`), and examples.
    """

    says: str
    count: int = 0
    of: int = 0
    pairs: list[Pair] = field(default_factory=list)


@dataclass(frozen=True)
class Alike:
    """All ways in which documents can be alike."""

    kinds: list[Kind]

    def lines(self) -> list[str]:
        """A line for each way in which documents are alike, with their number and the origins of the first pair."""
        lines = []
        for kind in self.kinds:
            if kind.count:
                first = " and ".join(map(printable, kind.pairs[0].origins)) if kind.pairs else ""
                lines.append(f"{kind.count} of {kind.of} {kind.says}" + (f"; first pair: {first}" if first else ""))
        return lines


class Comparison:
    """Takes documents one by one, and says at the end which are alike."""

    def __init__(self) -> None:
        self._search = Search()
        self._where: list[tuple[Source, int, bool]] = []

    def add(self, document: Document, source: Source, i: int, *, held_out: bool) -> None:
        """Adds a document, item `i` of `source`. held_out: whether it belongs to the validation set or a test."""
        self._search.add(document, held_out=held_out)
        self._where.append((source, i, held_out))

    def found(self) -> Alike:
        """Finds which of the added documents are alike."""
        if not self._where:
            return Alike([])
        found = self._search.found()
        held_out = np.array([out for *_, out in self._where])
        of, apart = len(held_out), int((~held_out).sum())
        often = np.where((found.repeats >= _OFTEN) & ~held_out, found.shown, -1)
        return Alike([
            self._kind("documents repeat an earlier one, with the same images and words", found.same, of),
            self._kind(
                "documents have the images of earlier ones, with other words",
                np.where(found.same < 0, found.shown, -1), of,
            ),
            self._kind(f"documents share an image with {_OFTEN - 1} others or more", often, apart),
            self._kind("training documents share an image or their text with a held-out one", found.overlap, apart),
        ])  # fmt: skip

    def _kind(self, says: str, others: np.ndarray, of: int) -> Kind:
        those = np.flatnonzero(others >= 0)
        spread = those[np.linspace(0, len(those) - 1, min(len(those), _EXAMPLES)).astype(int)] if len(those) else those
        pairs = [self._pair(i, int(others[i])) for i in spread.tolist()]
        return Kind(says, len(those), of, [pair for pair in pairs if pair is not None])

    def _pair(self, i: int, j: int) -> Pair | None:
        """Reads both documents again, to show the first image of each."""
        documents = []
        for source, item, _ in (self._where[i], self._where[j]):
            try:
                documents.append(source[item])
            except BadItem:  # the item was good before, so somebody is changing the data
                return None
        one, other = ((document.origin, _content(document)) for document in documents)
        return Pair((one[0], other[0]), (one[1], other[1]))


def _content(document: Document) -> str | np.ndarray:
    for part in document.parts:
        if isinstance(part, ImagePart):
            return part.pixels
    return " ".join(part.text for part in document.parts if isinstance(part, TextPart))
