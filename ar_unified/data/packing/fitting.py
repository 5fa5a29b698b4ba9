"""Chooses which documents share a row, from their lengths, so that few positions stay empty.

There are two ways, and the way with fewer rows is taken. Best-fit-decreasing is nearly perfect if lengths differ much:
less than a hundredth of the positions stay empty. But captioned images of one size have nearly the same length, and
a row that has only the longest of them ends with a large gap. In the second way, a row is filled with random documents,
which have the average length, and ends with the two documents that fit best.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from ar_unified.data.counter_rng import key, permute

_FULL = 0.99  # if best-fit-decreasing fills this share of the positions, the second way is not tried
_TRIES = 64  # a pair must leave fewer tokens free than this


def rows_of(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, bool]:
    """The row of every document, and whether best-fit-decreasing chose the rows.

    Args:
        lengths: int [n], descending, each in 1..sequence_length.

    Returns:
        The rows, int64 [n], numbered from 0 without gaps; and the bool.
    """
    rows = best_fit(lengths, sequence_length)
    if lengths.sum() < _FULL * (rows.max() + 1) * sequence_length:
        others = paired_fit(lengths, sequence_length)
        if others.max() < rows.max():
            return others, False
    return rows, True


def best_fit(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """Best-fit-decreasing: each document goes into the row with the least room, among rows with enough room. The
    arguments and the returned rows are as in `rows_of`.
    """
    rows = []
    space: list[deque[int]] = [deque() for _ in range(sequence_length + 1)]  # rows by their number of free tokens
    some = opened = 0  # bit i of `some`: whether a row has i free tokens
    for length in lengths.tolist():
        if fitting := some >> length:
            free = length + _lowest(fitting)
            row = space[free].popleft()
            if not space[free]:
                some ^= 1 << free
        else:
            free, row = sequence_length, opened
            opened += 1
        if rest := free - length:
            if not space[rest]:
                some |= 1 << rest
            space[rest].append(row)
        rows.append(row)
    return np.array(rows, np.int64)


def paired_fit(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """The longest document opens a row, random documents follow, and the two that leave the least room end the row. The
    arguments and the returned rows are as in `rows_of`.
    """
    pool = _Pool(lengths, sequence_length)
    packed: list[int] = []
    rows: list[int] = []
    row = -1
    while pool.count:
        row, room = row + 1, sequence_length
        chosen: tuple[int, ...] = (pool.longest(room),)
        while chosen[0]:
            for length in chosen:
                pool.take(length)
                room -= length
            packed += chosen
            rows += [row] * len(chosen)
            single = pool.longest(room)
            chosen = (single,)
            if single and room * pool.count >= 2.5 * pool.tokens and (next_one := pool.next()) <= room:
                chosen = (next_one,)  # there is room for two more documents
            elif single:
                chosen = pool.pair(room, single) or chosen
    order = np.argsort(-np.array(packed), kind="stable")  # documents of the same length are interchangeable
    return np.array(rows, np.int64)[order]


class _Pool:
    """Documents that are in no row yet, by length. A set of lengths is kept as the bits of one integer."""

    def __init__(self, lengths: np.ndarray, sequence_length: int):
        self.count, self.tokens, self._most = len(lengths), int(lengths.sum()), sequence_length
        self._left = np.bincount(lengths, minlength=sequence_length + 1).tolist()
        self._there = sum(1 << length for length, left in enumerate(self._left) if left)
        self._turned = sum(1 << sequence_length - length for length, left in enumerate(self._left) if left)
        self._line = lengths[permute(np.arange(len(lengths)), len(lengths), key("line"))].tolist()
        self._gone = [0] * (sequence_length + 1)  # for each length: how many documents are taken but still in `_line`

    def longest(self, room: int) -> int:
        """The greatest length that fits; 0 if none does."""
        return max(0, (self._there & ((2 << room) - 1)).bit_length() - 1)

    def next(self) -> int:
        """The length of a random document; it stays the same until the document is taken."""
        while self._gone[self._line[-1]]:
            self._gone[self._line.pop()] -= 1
        return self._line[-1]

    def pair(self, room: int, more: int) -> tuple[int, int] | None:
        """The lengths of the two documents that fill `room` best. None if they would fill at most `more`, or leave
        _TRIES positions or more empty.
        """
        for both in range(room, max(more, room - _TRIES, 2 * _lowest(self._there) - 1), -1):
            found = self._there & self._turned >> self._most - both  # bit i: documents of lengths i and both - i exist
            if both % 2 == 0 and self._left[both // 2] == 1:
                found &= ~(1 << both // 2)
            if found:
                return (longer := found.bit_length() - 1), both - longer
        return None

    def take(self, length: int) -> None:
        self.count, self.tokens = self.count - 1, self.tokens - length
        self._gone[length] += 1
        self._left[length] -= 1
        if not self._left[length]:
            self._there ^= 1 << length
            self._turned ^= 1 << self._most - length


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
