"""Checks whether a head's rows of image codes were ever trained. Meta released Chameleon without training these rows.

Images sampled with untrained rows are noise, and there is no error (facebookresearch/chameleon issues 11 and 37).
A table of random numbers differs from a trained head in three ways: its rows have no common direction, and the lengths
of its rows and the sizes of its columns differ only by chance. There are three measures, one for each way. Each is
about 1 for random numbers.

Axes: D model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ar_unified.language.border import Border
from ar_unified.language.vocabulary import Role, Vocabulary

_BLOCK = 4096  # rows of the head that are converted to float64 at a time
_CHANCE = 3.0  # the measures of random numbers stay below this, even with 64 rows and columns
_SMALL = 0.01  # rows are nearly zero if their length is below this share of the text rows' length
_ALIKE = 1e-3  # rows are alike if subtracting their mean leaves less than this share of their squared length


@dataclass(frozen=True)
class _Rows:
    """Sums over rows, in f64: `lengths` are their squared lengths, [rows]; `total` and `squares` are the sums of rows
    and of their squares, [D]."""

    lengths: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    @property
    def size(self) -> float:
        """Mean squared length of a row."""
        return float(self.lengths.mean())

    @property
    def left(self) -> float:
        """Share of the squared length that is left when the mean row is subtracted."""
        return 1 - float(np.square(self.total / len(self.lengths)).sum()) / max(self.size, 1e-30)

    @property
    def drawn(self) -> bool:
        """Whether the rows look like random numbers."""
        if not self.size:
            return False  # zeros are not random numbers
        n, D = len(self.lengths), len(self.total)
        common = n * (1 - self.left)
        spread = float(self.lengths.var()) / self.size**2 * D / 2
        columns = float(self.squares.var()) / float(self.squares.mean()) ** 2 * n / 2
        return max(common, spread, columns) < _CHANCE


def untrained(head: np.ndarray, border: Border, vocabulary: Vocabulary) -> str:
    """Describes the image codes' rows in a published head [V, D] if they look untrained; otherwise ""."""
    kind = vocabulary.role(border.ours)
    image, text = (_sums(head, kind == role) for role in (Role.IMAGE, Role.TEXT))
    if image.size <= _SMALL**2 * text.size:
        return "are nearly zero"
    if image.left < _ALIKE:
        return "are all alike"
    if image.drawn and not text.drawn:
        return "look like random numbers, unlike the rows of text"
    return ""


def _sums(table: np.ndarray, which: np.ndarray) -> _Rows:
    """Sums over the rows that `which`, bool [V], selects."""
    lengths: list[np.ndarray] = []
    total = squares = np.zeros(1)
    for begin in range(0, len(which), _BLOCK):
        rows = table[begin : begin + _BLOCK][which[begin : begin + _BLOCK]].astype(np.float64)
        lengths.append(np.square(rows).sum(1))
        total, squares = total + rows.sum(0), squares + np.square(rows).sum(0)
    return _Rows(np.concatenate(lengths), total, squares)
