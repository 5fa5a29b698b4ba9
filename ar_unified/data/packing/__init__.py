"""Decides the order of rows and the documents in each row, as pure functions of the documents' lengths and a seed.

A source is planned in blocks (`blocks`). Two things never change: the documents of a block, and the lengths of the
documents that share a row. A slot is the place of one document in a row. Three things are random in every epoch. Within
a block, each document gets a random slot of its own length. The blocks get a random order. The rows get a random order
within each window of WINDOW blocks. So a source of one block or one window is shuffled as a whole. From a larger
source, only the files of one window are read at a time. Each epoch of a source has each of its documents exactly once,
and any row can be made without the rows before it.

Sources are mixed row by row, so `weights` are shares of rows. If rows are full, the weights are also shares of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ar_unified.data.counter_rng import key, permute
from ar_unified.data.packing.blocks import Plans, Stretches
from ar_unified.errors import UserError

WINDOW = 4  # blocks whose rows are shuffled together
PERIOD = 1024  # number of rows after which the order of the sources repeats; so shares are exact to 1/1024

# ---- one source --------------------------------------------------------------------------------------------------


class Packing:
    """The rows of one source, epoch after epoch. It keeps only a few blocks in memory, however many
    documents there are.

    Args:
        lengths: int [n], tokens of every document, 1..sequence_length; an array, or an object that can be sliced.
        sequence_length: T.
        seed: for the order. It is combined with `name` (of the source), so that sources are shuffled independently.
        folder: the folder of the source's shards, and perhaps of its planned rows (`blocks.store`).
        leave_out: whether documents that are longer than a row are left out; if not, they are an error.

    Attributes:
        rows: number of rows in an epoch.
        fill: share of the positions of these rows that have a token.
        windows: number of windows. Each is shuffled by itself.
        left_out: number of documents that are left out.
        order: the version of the order of rows: 1 is the first version; 2 has blocks and `fitting.paired_fit`.

    Raises:
        UserError: if there are no documents, or a document is longer than a row and not left out.
    """

    def __init__(
        self,
        lengths: Stretches,
        sequence_length: int,
        *,
        seed: int,
        name: str = "",
        folder: Path | None = None,
        leave_out: bool = False,
    ):
        self._plans = Plans(lengths, sequence_length, folder=folder, name=name, leave_out=leave_out)
        self.left_out = self._plans.left_out
        self.seed, self.name = seed, name
        self.rows = int(self._plans.rows.sum())
        self.fill = float(self._plans.tokens.sum() / max(1, self.rows * sequence_length))
        self.windows = -(-len(self._plans.rows) // WINDOW)
        self.order = 1 if len(self._plans.rows) == 1 and self._plans.decreasing else 2
        self._slots = functools.lru_cache(maxsize=2 * WINDOW)(
            self._plans.slots
        )  # a batch may end one epoch and begin the next
        self._epochs = functools.lru_cache(maxsize=2)(self._shuffled)

    def documents(self, epoch: int, rows: np.ndarray) -> list[np.ndarray]:
        """For each of these rows of an epoch, its documents, int64 [k]. The longest document of a row comes first."""
        order, ends, starts = self._epochs(epoch)
        window = np.searchsorted(starts, rows, "right") - 1
        start = starts[window]
        streams = key(self.seed, self.name, epoch, "rows") ^ window.astype(np.uint64)
        row = start + permute(rows - start, starts[window + 1] - start, streams)
        which = np.searchsorted(ends, row, "right")
        blocks = order[which]
        within = row - (ends[which] - self._plans.rows[blocks])
        by_block = np.argsort(blocks, kind="stable")
        used, first = np.unique(blocks[by_block], return_index=True)
        parts = np.split(within[by_block], first[1:])
        places = [self._slots(block).places(part) for block, part in zip(used.tolist(), parts, strict=True)]
        streams = key(self.seed, self.name, epoch, "documents") ^ used.astype(np.uint64)
        drawn = permute(
            np.concatenate([each.number for each in places]),
            np.concatenate([each.size for each in places]),
            np.repeat(streams, [len(each.number) for each in places]),
        )
        found = np.empty(len(rows), object)
        begin = at = 0
        for block, each in zip(used.tolist(), places, strict=True):
            end = begin + len(each.number)
            documents = self._slots(block).documents(each.first + drawn[begin:end])
            here = by_block[at : at + len(each.counts)].tolist()
            for row, its in zip(here, np.split(documents, np.cumsum(each.counts)[:-1]), strict=True):
                found[row] = its
            begin, at = end, at + len(here)
        return found.tolist()

    def after(self, other: Packing, taken: int) -> int:
        """The number of rows of this packing that count as read after `taken` rows of `other` were read. `other` is the
        same source in rows of another length.

        At any length of rows, the windows of an epoch have the same documents, so reading continues with the next
        window. The documents of the current window that were not read come in the next epoch.
        """
        epoch, item = divmod(taken, other.rows)
        begun = int(np.searchsorted(other._epochs(epoch)[2], item))
        return epoch * self.rows + int(self._epochs(epoch)[2][begun])

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the blocks in the order of an epoch, the row where each block ends, and the row where each window
        begins, int64 [windows + 1]; the last number is where the last window ends.
        """
        count = len(self._plans.rows)
        order = permute(np.arange(count), count, key(self.seed, self.name, epoch, "blocks"))
        ends = np.cumsum(self._plans.rows[order])
        most, more = divmod(count, self.windows)  # the first `more` windows have one more block
        blocks = np.cumsum(most + (np.arange(self.windows) < more))
        return order, ends, np.append(0, ends[blocks - 1])


# ---- several sources ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picks:
    """A slice of a mixture: element i is item `item[i]` of epoch `epoch[i]` of source number `source[i]`; int64 [n]."""

    source: np.ndarray
    epoch: np.ndarray
    item: np.ndarray


class Mixture:
    """An endless stream of rows from several sources. Pick j is a pure function of (weights, sizes, taken, j).

    Sources take turns as evenly as their weights allow, so that every part of the stream has nearly the right share of
    each source. The turns repeat after PERIOD picks. A source that is at its end begins its next epoch.

    Args:
        sizes: for every source, rows (or items) in an epoch, at least 1.
        weights: shares, at least 0. None means in proportion to the sizes, so that epochs of all sources end together.
        taken: how many rows of every source were read before; the stream continues after them. None means 0.

    Raises:
        UserError: if weights are negative or all zero, or a source has no rows.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None = None, taken: Sequence[int] | None = None
    ):
        shares = np.asarray(sizes if weights is None else weights, np.float64)
        if len(shares) != len(sizes) or not len(sizes) or (shares < 0).any() or not shares.sum() > 0:
            raise UserError(f"mixture: expected {len(sizes)} weights >= 0, not all 0; found {shares.tolist()}")
        if min(sizes) < 1:
            raise UserError(f"mixture: expected at least one row in every source, found {list(sizes)} rows")
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
        """How many rows of every source were read before pick `stop`."""
        cycles, rest = divmod(stop, PERIOD)
        partly = np.bincount(self._source[:rest], minlength=len(self.sizes))
        return (self._taken + cycles * self._counts + partly).tolist()

    @property
    def shares(self) -> list[float]:
        """The share of each source in the stream."""
        return (self._counts / PERIOD).tolist()


def _apportion(shares: np.ndarray) -> np.ndarray:
    """Divides PERIOD turns among the sources by the largest-remainder method. A source with a weight above 0 gets at
    least one turn.
    """
    exact = shares / shares.sum() * PERIOD
    counts = np.where(shares > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while counts.sum() < PERIOD:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > PERIOD:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return counts


def summary(packings: Mapping[str, Packing]) -> dict[str, dict[str, object]]:
    """For every source, its rows per epoch and the share of their positions that have a token. A user wants to know
    both before training.
    """
    return {name: {"rows": packing.rows, "fill": round(packing.fill, 4)} for name, packing in packings.items()}
