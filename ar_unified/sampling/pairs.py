"""Which code came last behind a pair of codes, the one before and the one above: a table for `window.py` to guess by.

It is learned from images as they are drawn, by the host, and handed to the device beside the weights. Behind pairs
where the code above has been right more often, the table has nothing, and the code above is the guess. A wrong entry
costs a step that could have been saved and nothing else, so entries may collide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SIZE = 1 << 15
_STEP = 257  # codes below it have entries of their own, as far as SIZE goes
_SURE = 4  # by how much an entry's count may be ahead or behind: what is drawn changes


class Pairs:
    """The table of one model: int32 [SIZE], -1 where nothing was seen."""

    def __init__(self) -> None:
        self.table = np.full(SIZE, -1, np.int32)
        self._last = self.table.copy()
        self._ahead = np.zeros(SIZE, np.int32)  # how often it was right, less how often the code above was

    def learn(self, codes: np.ndarray) -> np.ndarray:
        """Adds an image's codes, int [h, w]; returns which of them the table would have guessed, bool [h * w]."""
        flat = np.ravel(codes).astype(np.int32)
        before, above = np.full((2, len(flat)), -1, np.int32)
        before[1:] = flat[:-1]
        above[codes.shape[1] :] = flat[: -codes.shape[1]]
        at = place(before, above)
        right = likely(self.table[at], before, above, np) == flat
        alike, last = likely(-1, before, above, np), self._last[at]
        better = np.where(last >= 0, (last == flat).astype(np.int32) - (alike == flat), 0)
        np.add.at(self._ahead, at, better)
        self._ahead[at] = np.clip(self._ahead[at], -_SURE, _SURE)
        self._last[at] = flat
        self.table = self.table.copy()  # the device may still read the old one
        self.table[at] = np.where(self._ahead[at] >= 0, self._last[at], -1)
        return right


def place(before: Any, above: Any) -> Any:
    """Where the table has what follows these codes, integers of any shape; -1: there is no such code."""
    return (before * _STEP + above) & (SIZE - 1)


def likely(learned: Any, before: Any, above: Any, numpy: Any) -> Any:
    """The guess: what the table has, or the code above, or in the first row the code before; at the very beginning 0.

    numpy: the module that the arrays are of, numpy or jax.numpy.
    """
    alike = numpy.where(above >= 0, above, numpy.maximum(before, 0))
    return numpy.where(learned >= 0, learned, alike)
