"""Which documents are planned together, and which of them share a row. Their lengths alone decide it, no seed.

A source is taken in runs of RUN documents. A fixed permutation deals the runs out into blocks of at most BLOCK
documents, so that each block has something of everything. A source that is not larger than a block is one block. The
rows of a block are planned once (`fitting`), as slots of given lengths; every epoch draws anew which document of a
length fills which slot (`packing`).

The plan is kept beside the shards, and whoever reads them maps it into memory:
<source>/rows-4096.npy          uint16 [documents], the row of every slot of its block, block after block
         rows-4096.blocks.npy   int64 [blocks, 3]: rows, tokens, whether best-fit-decreasing; written last
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ar_tokenizers.files import whole

from ar_unified import storage
from ar_unified.data.counter_rng import key, permute
from ar_unified.data.packing.fitting import rows_of
from ar_unified.errors import UserError, about

RUN = 2**12  # documents that stand together in the shards, so that a block is read from few of them
BLOCK = 2**16  # what a uint16 can number


class Blocks:
    """Documents 0..documents-1 of a source, dealt out into `count` blocks.

    Attributes:
        starts: int64 [count + 1], documents in the blocks before each.
    """

    def __init__(self, documents: int):
        self._documents = documents
        runs = -(-documents // RUN)
        self.count = -(-runs * RUN // BLOCK)
        self._runs = permute(np.arange(runs), runs, key("runs"))
        self._borders = np.arange(self.count + 1) * runs // self.count
        sizes = np.where(self._runs == runs - 1, documents - (runs - 1) * RUN, RUN)
        self.starts = np.append(0, np.cumsum(sizes))[self._borders]

    def documents(self, block: int) -> np.ndarray:
        """Those of a block, int64, ascending."""
        runs = np.sort(self._runs[self._borders[block] : self._borders[block + 1]])
        found = (runs[:, None] * RUN + np.arange(RUN)).reshape(-1)
        return found[found < self._documents]


class Slots:
    """The rows of one block: places for documents of given lengths.

    Args:
        documents: int64 [n], by falling length. lengths: int [n], of the documents. row: int [n], the row of each
            document's slot.
    """

    def __init__(self, documents: np.ndarray, lengths: np.ndarray, row: np.ndarray):
        first = np.flatnonzero(np.diff(lengths, prepend=-1))
        sizes = np.diff(np.append(first, len(documents)))
        self._documents = documents
        self._first = np.repeat(first, sizes).astype(np.uint16)  # of each slot's length class
        self._last = np.repeat(first + sizes - 1, sizes).astype(np.uint16)
        self._slots = np.argsort(row, kind="stable").astype(np.uint16)  # row by row, each row's longest first
        self._ends = np.cumsum(np.bincount(row))

    def documents(self, rows: np.ndarray, stream: np.uint64) -> list[np.ndarray]:
        """The documents, int64 [k], of each of `rows`, as `stream` draws them; the longest of a row first."""
        starts, ends = np.where(rows > 0, self._ends[rows - 1], 0), self._ends[rows]
        slots = np.concatenate([self._slots[start:end] for start, end in zip(starts, ends, strict=True)])
        first, last = self._first[slots].astype(np.int64), self._last[slots]
        chosen = first + permute(slots - first, last - first + 1, stream)
        return np.split(self._documents[chosen], np.cumsum(ends - starts)[:-1])


class Plans:
    """The planned rows of a source, block by block: read from `folder` if they are there, else made in memory.

    Args:
        lengths: int [n], tokens of every document; may be mapped from a file, of which little is read.
        sequence_length: T, of the rows.
        folder: of the source's shards. name: of the source, for messages.

    Attributes:
        rows, tokens: int64 [blocks].
        decreasing: whether best-fit-decreasing has planned all of them (`fitting`).

    Raises:
        UserError: no documents, or one that is longer than a row. `slots` too: the plan is of other lengths.
    """

    def __init__(self, lengths: np.ndarray, sequence_length: int, *, folder: Path | None = None, name: str = ""):
        if not len(lengths):
            raise UserError(f"source {name!r}: no documents to pack")
        self._lengths, self._length, self._name = lengths, sequence_length, name
        self._blocks = Blocks(len(lengths))
        plan, table = _paths(folder, sequence_length) if folder else (None, None)
        if plan and table and storage.fetch(table).exists():
            with about(f"{plan}: delete rows-{sequence_length}*.npy there, and start again"):
                self._rows = np.asarray(np.load(storage.fetch(plan), mmap_mode="r"))
                self.rows, self.tokens, decreasing = np.load(table).T
            if self._rows.shape != lengths.shape or len(self.rows) != self._blocks.count:
                raise self._other()
        else:
            planned = list(_planned(lengths, self._blocks, sequence_length, name))
            self._rows = np.concatenate([rows for rows, _ in planned])
            self.rows, self.tokens, decreasing = np.array([count for _, count in planned]).T
        self.decreasing = bool(decreasing.all())

    def slots(self, block: int) -> Slots:
        """The rows of a block; the lengths of its documents are read again."""
        documents = self._blocks.documents(block)
        lengths = self._lengths[documents]
        order = _falling(lengths)
        documents, lengths = documents[order], lengths[order]
        row = self._rows[self._blocks.starts[block] : self._blocks.starts[block + 1]]
        taken = np.bincount(row, lengths)
        if len(taken) != self.rows[block] or taken.max() > self._length:
            raise self._other()
        return Slots(documents, lengths, row)

    def _other(self) -> UserError:
        return UserError(
            f"source {self._name!r}: its rows of {self._length} tokens were planned for other documents than "
            f"are there: a file was changed; delete rows-{self._length}*.npy beside the shards, and start again"
        )


def store(lengths: np.ndarray, sequence_length: int, folder: Path, *, name: str = "") -> None:
    """Plans the rows of a source beside its shards, unless that is done. Args and errors: of `Plans`."""
    plan, table = _paths(folder, sequence_length)
    if storage.exists(table) or not len(lengths):
        return
    with whole(plan) as file:
        facts = {"descr": "<u2", "fortran_order": False, "shape": lengths.shape}
        np.lib.format.write_array_header_1_0(file, facts)
        counts = []
        for rows, count in _planned(lengths, Blocks(len(lengths)), sequence_length, name):
            file.write(rows.tobytes())
            counts.append(count)
    with whole(table) as file:
        np.save(file, np.array(counts, np.int64))


def _planned(
    lengths: np.ndarray, blocks: Blocks, sequence_length: int, name: str
) -> Iterator[tuple[np.ndarray, tuple[int, int, int]]]:
    """For every block: the row of each slot, uint16, and the block's line of the table."""
    for block in range(blocks.count):
        found = lengths[blocks.documents(block)]
        if found.max() > sequence_length or found.min() < 1:
            raise UserError(
                f"source {name!r}: expected documents of 1 to {sequence_length} tokens, found {int(found.min())} to "
                f"{int(found.max())}: prepare with max_tokens <= the sequence length, or make rows longer"
            )
        rows, decreasing = rows_of(found[_falling(found)], sequence_length)
        yield rows.astype("<u2"), (int(rows.max()) + 1, int(found.sum()), decreasing)


def _falling(lengths: np.ndarray) -> np.ndarray:
    """The order by falling length; documents of one length keep their order."""
    below = lengths.max() - lengths
    return np.argsort(below.astype(np.uint16) if below.max() < 2**16 else below, kind="stable")  # the former by radix


def _paths(folder: Path, sequence_length: int) -> tuple[Path, Path]:
    return folder / f"rows-{sequence_length}.npy", folder / f"rows-{sequence_length}.blocks.npy"
