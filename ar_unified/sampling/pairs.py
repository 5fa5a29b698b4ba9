"""A table from which `window.py` guesses codes. A pair is the code before a position and the code above it. For each
pair, the table has the code that last followed the pair.

The host learns the table from images as they are drawn, and passes it to the device with the weights. The table has no
entry for a pair if the code above was right more often than the code that last followed the pair. The guess is then the
code above. Several pairs may share an entry: if an entry is wrong, a step is not saved, but all tokens stay the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SIZE = 1 << 15
_STEP = 257  # if both codes are below this, pairs share an entry only because SIZE is limited
_SURE = 4  # limit of an entry's count, so that the entry can soon change when other images are drawn


class Pairs:
    """The table of one model: int32 [SIZE], -1 where nothing was seen."""

    def __init__(self) -> None:
        self.table = np.full(SIZE, -1, np.int32)
        self._last = self.table.copy()
        self._ahead = np.zeros(SIZE, np.int32)  # how often an entry was right, minus how often the code above was right

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
        self.table = self.table.copy()  # the device may still read the old table
        self.table[at] = np.where(self._ahead[at] >= 0, self._last[at], -1)
        return right


def place(before: Any, above: Any) -> Any:
    """The index of the entry for these codes, integers of any shape; a code of -1 means that there is no such code."""
    return (before * _STEP + above) & (SIZE - 1)


def likely(learned: Any, before: Any, above: Any, numpy: Any) -> Any:
    """The guess: the table's entry, else the code above, else the code before, else 0.

    numpy: the module of the arrays, numpy or jax.numpy.
    """
    alike = numpy.where(above >= 0, above, numpy.maximum(before, 0))
    return numpy.where(learned >= 0, learned, alike)
