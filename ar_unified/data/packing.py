"""Which documents share a row, and which row comes when: pure functions of the documents' lengths and a seed.

Best-fit-decreasing only looks at lengths. So the rows of an epoch are planned once, as slots of given lengths, and
every epoch draws anew which document of that length fills which slot and in which order the rows come. Each epoch of
a source holds each of its documents exactly once, and any row can be asked for without making those before it.

Sources are mixed row by row: `weights` are shares of rows, which for full rows are shares of tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ar_unified.data.counter_rng import key, permute
from ar_unified.errors import UserError

PERIOD = 1024  # rows after which the order of the sources repeats: shares are exact to 1/1024

# ---- one source --------------------------------------------------------------------------------------------------


def best_fit(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """Best-fit-decreasing: the row of every document, for lengths in descending order.

    Documents of one length are placed together, so the work grows with the number of lengths, not of documents.

    Args:
        lengths: int [n], descending, each in 1..sequence_length.

    Returns:
        int64 [n], rows numbered from 0 without gaps.
    """
    rows = np.empty(len(lengths), np.int64)
    space: dict[int, list[np.ndarray]] = {}  # free tokens -> rows that have so many
    spaces: list[int] = []  # the keys of `space`, ascending
    borders = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1)) if len(lengths) else np.zeros(1, int)
    opened = 0
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        length, at = int(lengths[start]), start
        while at < end:
            i = bisect.bisect_left(spaces, length)
            if i < len(spaces):
                free = spaces.pop(i)
                candidates = np.concatenate(space.pop(free))
            else:
                free = sequence_length
                needed = -(-(end - at) // (free // length))
                candidates = np.arange(opened, opened + needed)
                opened += needed
            # The tightest row stays the tightest: it takes as many of this length as it can before the next one.
            each = free // length
            used = -(-min(end - at, each * len(candidates)) // each)
            counts = np.full(used, each)
            counts[-1] = min(end - at, each * used) - each * (used - 1)
            taken = int(counts.sum())
            rows[at : at + taken] = np.repeat(candidates[:used], counts)
            at += taken
            left = (
                (free - each * length, candidates[: used - 1]),
                (free - int(counts[-1]) * length, candidates[used - 1 : used]),
                (free, candidates[used:]),
            )
            for rest, those in left:
                if rest and len(those):
                    if rest not in space:
                        space[rest] = []
                        bisect.insort(spaces, rest)
                    space[rest].append(those)
    return rows


class Packing:
    """The rows of one source, epoch after epoch.

    Args:
        lengths: int [n], tokens of every document, 1..sequence_length.
        sequence_length: T.
        seed: of the order; with `name` (of the source) it makes sources independent of each other.

    Attributes:
        rows: rows an epoch. fill: share of their positions that hold a token.

    Raises:
        UserError: no documents, or one that is longer than a row.
    """

    def __init__(self, lengths: np.ndarray, sequence_length: int, *, seed: int, name: str = ""):
        if not len(lengths):
            raise UserError(f"source {name!r}: no documents to pack")
        longest = int(lengths.max())
        if longest > sequence_length or lengths.min() < 1:
            raise UserError(
                f"source {name!r}: expected documents of 1 to {sequence_length} tokens, found {int(lengths.min())} to "
                f"{longest}: prepare with max_tokens <= the sequence length, or make rows longer"
            )
        self.seed, self.name = seed, name
        self._order = np.argsort(-lengths.astype(np.int64), kind="stable")  # documents by falling length
        ordered = lengths[self._order]
        first = np.flatnonzero(np.diff(ordered, prepend=-1))
        sizes = np.diff(np.append(first, len(ordered)))
        self._first, self._size = np.repeat(first, sizes), np.repeat(sizes, sizes)  # of each slot's length class
        row = best_fit(ordered, sequence_length)
        self.rows = int(row.max()) + 1
        self.fill = float(lengths.sum() / (self.rows * sequence_length))
        self._slots = np.argsort(row, kind="stable")  # slots row by row, each row's longest first
        self._ends = np.cumsum(np.bincount(row, minlength=self.rows))

    def documents(self, epoch: int, rows: np.ndarray) -> list[np.ndarray]:
        """The documents, int64 [k], of each of `rows` of an epoch; the longest of a row first."""
        rows = permute(rows, self.rows, key(self.seed, self.name, epoch, "rows"))
        starts, ends = np.where(rows > 0, self._ends[rows - 1], 0), self._ends[rows]
        slots = np.concatenate([self._slots[start:end] for start, end in zip(starts, ends, strict=True)])
        first, size = self._first[slots], self._size[slots]
        chosen = first + permute(slots - first, size, key(self.seed, self.name, epoch, "documents"))
        return np.split(self._order[chosen], np.cumsum(ends - starts)[:-1])


# ---- several sources ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picks:
    """Stretch of a mixture: element i is item `item[i]` of epoch `epoch[i]` of source number `source[i]`; int64 [n]."""

    source: np.ndarray
    epoch: np.ndarray
    item: np.ndarray


class Mixture:
    """An endless stream over sources by weight; pick j is a pure function of (weights, sizes, j).

    Sources take turns as evenly as their weights allow, so that every stretch of the stream has nearly its share of
    each; the turns repeat after PERIOD. A source that has come to its end begins its next epoch.

    Args:
        sizes: rows (or items) an epoch of every source has, at least 1.
        weights: shares, not negative; None: by size, so that epochs of all sources end together.
        taken: rows of every source that were read before this stream; it goes on after them. None: none.

    Raises:
        UserError: weights that are negative or all zero, or a source without rows.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None = None, taken: Sequence[int] | None = None
    ):
        shares = np.asarray(sizes if weights is None else weights, np.float64)
        if len(shares) != len(sizes) or not len(sizes) or (shares < 0).any() or not shares.sum() > 0:
            raise UserError(f"mixture: expected {len(sizes)} weights >= 0, not all 0; found {shares.tolist()}")
        if min(sizes) < 1:
            raise UserError(f"mixture: expected at least one row in every source, found {list(sizes)}")
        self.sizes = np.asarray(sizes, np.int64)
        self._taken = np.zeros(len(sizes), np.int64) if taken is None else np.asarray(taken, np.int64)
        counts = _apportion(shares)
        turns = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count] or [np.zeros(0)])
        source = np.repeat(np.arange(len(counts)), counts)
        rank = np.concatenate([np.arange(count) for count in counts])
        order = np.lexsort((source, turns))
        self._source, self._rank, self._counts = source[order], rank[order], counts

    def picks(self, start: int, stop: int) -> Picks:
        """Picks start..stop-1 of the stream."""
        cycle, slot = np.divmod(np.arange(start, stop), PERIOD)
        source = self._source[slot]
        row = self._taken[source] + cycle * self._counts[source] + self._rank[slot]
        epoch, item = np.divmod(row, self.sizes[source])
        return Picks(source, epoch, item)

    def taken(self, stop: int) -> list[int]:
        """Rows of every source that were read before pick `stop`."""
        cycles, rest = divmod(stop, PERIOD)
        partly = np.bincount(self._source[:rest], minlength=len(self.sizes))
        return (self._taken + cycles * self._counts + partly).tolist()

    @property
    def shares(self) -> list[float]:
        """Share of the stream each source has."""
        return (self._counts / PERIOD).tolist()


def _apportion(shares: np.ndarray) -> np.ndarray:
    """PERIOD turns by largest remainder; a source with any weight gets at least one."""
    exact = shares / shares.sum() * PERIOD
    counts = np.where(shares > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while counts.sum() < PERIOD:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > PERIOD:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return counts


def summary(packings: Mapping[str, Packing]) -> dict[str, dict[str, Any]]:
    """Rows an epoch and fill of every source: what a user wants to know before training."""
    return {name: {"rows": packing.rows, "fill": round(packing.fill, 4)} for name, packing in packings.items()}
