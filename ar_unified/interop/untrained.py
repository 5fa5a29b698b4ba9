"""Whether a head's rows of image codes were ever trained: those of the Chameleon that Meta released were not.

Drawing with such rows gives noise, and no error (facebookresearch/chameleon issues 11 and 37). Random numbers differ
from a trained head in three ways: the rows have no common direction, their lengths differ no more than by chance, and
the sizes of their columns do not either. Each of the three measures here is 1 for random numbers.

Axes: D model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ar_unified.language.border import Border
from ar_unified.language.vocabulary import Role, Vocabulary

_BLOCK = 4096  # rows in float64 at once
_CHANCE = 3.0  # what chance does not reach, even with 64 rows and columns
_SMALL = 0.01  # of the length of text's rows
_ALIKE = 1e-3  # share of the rows' squares that is left without what they have in common


@dataclass(frozen=True)
class _Rows:
    """Sums over rows: squares of their lengths, int [rows]; rows and squares, [D]."""

    lengths: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    @property
    def size(self) -> float:
        """Mean square of a row's length."""
        return float(self.lengths.mean())

    @property
    def left(self) -> float:
        """Share of the squares that is left when the mean row is taken away."""
        return 1 - float(np.square(self.total / len(self.lengths)).sum()) / max(self.size, 1e-30)

    @property
    def drawn(self) -> bool:
        """Whether they look like random numbers."""
        if not self.size:
            return False  # nobody draws zeros
        n, D = len(self.lengths), len(self.total)
        common = n * (1 - self.left)
        spread = float(self.lengths.var()) / self.size**2 * D / 2
        columns = float(self.squares.var()) / float(self.squares.mean()) ** 2 * n / 2
        return max(common, spread, columns) < _CHANCE


def untrained(head: np.ndarray, border: Border, vocabulary: Vocabulary) -> str:
    """If the rows of image codes in a published head [V, D] look untrained, what they look like; else ""."""
    kind = vocabulary.role(border.ours)
    image, text = (_sums(head, kind == role) for role in (Role.IMAGE, Role.TEXT))
    if image.size <= _SMALL**2 * text.size:
        return "they are nearly zero"
    if image.left < _ALIKE:
        return "all are alike"
    if image.drawn and not text.drawn:
        return "they look like random numbers, and those of text do not"
    return ""


def _sums(table: np.ndarray, which: np.ndarray) -> _Rows:
    """Sums over those rows, bool [V]."""
    lengths: list[np.ndarray] = []
    total = squares = np.zeros(1)
    for begin in range(0, len(which), _BLOCK):
        rows = table[begin : begin + _BLOCK][which[begin : begin + _BLOCK]].astype(np.float64)
        lengths.append(np.square(rows).sum(1))
        total, squares = total + rows.sum(0), squares + np.square(rows).sum(0)
    return _Rows(np.concatenate(lengths), total, squares)
