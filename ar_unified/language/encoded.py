"""Ids with their roles: `Grammar.encode` makes them, shards store them, and the loader changes them. Every
function takes time O(n).

Each position has a mark of one byte: its role, its speaker, whether it is trained, and whether a turn or an image
begins there. So later code does not have to search the ids for the end of a prompt.

Axes: `n` positions in a document.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ar_unified.language.document import SPEAKERS

_ROLE, _SPEAKER = 0b111, 0b11  # bits 0-2: the Role; bits 3-4: the index into SPEAKERS
TRAINED, TURN, IMAGE = 1 << 5, 1 << 6, 1 << 7  # bits: is trained; first of a turn; first of an image
_ANSWERS = [SPEAKERS.index("document"), SPEAKERS.index("assistant")]
_OWN = _ROLE | IMAGE  # the bits that stay the same when a token moves to another turn
_SPEAKERS: dict[str, int] = {speaker: place << 3 for place, speaker in enumerate(SPEAKERS)}
_ONE = [bytes([each]) for each in range(256)]


def mark(role: int, speaker: str, trained: bool) -> int:
    """The mark of a position where no turn and no image begins. speaker: one of SPEAKERS."""
    return role | _SPEAKERS[speaker] | TRAINED * trained


@dataclass(frozen=True, eq=False)
class Encoded:
    """A document, or part of one, as ids.

    Attributes:
        tokens: int32 [n].
        marks: uint8 [n].
    """

    tokens: np.ndarray
    marks: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, positions: slice) -> Encoded:
        return Encoded(self.tokens[positions], self.marks[positions])

    @property
    def roles(self) -> np.ndarray:
        """The Role of every position, uint8 [n]. It depends on the place: a digit in a size is SIZE, not TEXT."""
        return self.marks & _ROLE

    @property
    def speakers(self) -> np.ndarray:
        """The speaker of each position, uint8 [n]: an index into SPEAKERS."""
        return self.marks >> 3 & _SPEAKER

    @property
    def turns(self) -> np.ndarray:
        """The positions at which turns begin, int64."""
        return np.flatnonzero(self.marks & TURN)

    @property
    def images(self) -> np.ndarray:
        """The positions at which images begin, int64."""
        return np.flatnonzero(self.marks & IMAGE)

    @property
    def own_images(self) -> np.ndarray:
        """The entries of `images` that are learned and not part of a question. `Grammar.drop_context` uses them."""
        says = np.isin(self.speakers[self.images], (SPEAKERS.index("document"), SPEAKERS.index("assistant")))
        return self.images[says & self.trained[self.images]]

    @property
    def unlearned(self) -> np.ndarray:
        """bool [n]: positions that are marked as not learned ("weight": 0), although their speaker's turns usually
        are learned."""
        speakers = self.speakers
        return ~self.trained & ((speakers == _ANSWERS[0]) | (speakers == _ANSWERS[1]))

    @property
    def trained(self) -> np.ndarray:
        """bool [n]: True if a position is learned, False if it is only read."""
        return (self.marks & TRAINED) > 0


class Writer:
    """Writes ids and marks, turn by turn."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._marks = bytearray()
        self._says = 0
        self._begins = 0  # TURN until the turn has its first id

    def turn(self, speaker: str, learned: bool) -> None:
        """Begins a turn. Everything added after this belongs to `speaker`; `learned`: whether the turn is learned."""
        self._says, self._begins = mark(0, speaker, learned), TURN

    def add(self, ids: Iterable[int], role: int) -> None:
        """Adds ids of one role."""
        marks, at = self._marks, len(self._marks)
        self._ids.extend(ids)
        marks += _ONE[self._says | role] * (len(self._ids) - at)
        if len(marks) > at:
            marks[at] |= self._begins
            self._begins = 0

    def image(self, ids: np.ndarray, roles: bytes) -> None:
        """Adds an image, int32 [n], with the role of each id."""
        marks, at = self._marks, len(self._marks)
        self._ids.frombytes(ids.tobytes())
        marks += roles.translate(_says(self._says))
        marks[at] |= IMAGE | self._begins
        self._begins = 0

    def written(self) -> Encoded:
        """The ids and marks that were added so far."""
        return Encoded(np.array(self._ids, np.int32), np.frombuffer(self._marks, np.uint8))


@functools.cache
def _says(says: int) -> bytes:
    """The table with which bytes.translate turns roles into marks."""
    return bytes(min(role | says, 255) for role in range(256))


def joined(pieces: Sequence[Encoded]) -> Encoded:
    """The pieces, concatenated."""
    return Encoded(np.concatenate([p.tokens for p in pieces]), np.concatenate([p.marks for p in pieces]))


def swapped(document: Encoded) -> Encoded:
    """Swaps the last question and its answer: head (question ask) (answer end) -> head (answer ask) (question end).

    `document` must have turns.
    """
    *_, begin, border = document.turns.tolist()
    n, head = len(document), begin or 1  # the beginning of a document stays first
    order = np.concatenate([
        np.arange(head), np.arange(border, n - 1), [border - 1], np.arange(head, border - 1), [n - 1]
    ])  # fmt: skip
    now = head + n - border  # where the answer begins after the swap
    says = document.marks & np.uint8(0xFF ^ _OWN)
    marks = document.marks[order] & np.uint8(_OWN)
    marks[:begin] |= says[:begin]
    marks[begin:now] |= says[begin] & np.uint8(0xFF ^ TURN)
    marks[now:] |= says[border] & np.uint8(0xFF ^ TURN)
    marks[[begin, now]] |= TURN
    return Encoded(document.tokens[order], marks)
