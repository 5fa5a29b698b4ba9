"""Decides which documents are planned together, and which of them share a row. Only lengths decide this, not a seed.

A source is cut into runs of RUN documents. A fixed permutation distributes the runs over blocks of at most BLOCK
documents, so that each block is a mixture of the source. A source that is not larger than a block is one block. The
rows of a block are planned once (`fitting`), as slots of given lengths. In every epoch, documents are assigned at
random to the slots of their length (`packing`).

The plan is stored next to the shards, and readers load the part for one block at a time:
<source>/rows-4096.npy          uint16 [documents], the row of every slot (numbered within its block), block after block
         rows-4096.blocks.npy   int64 [blocks, 3]: rows, tokens, whether planned by best-fit-decreasing; written
                                last. If documents are longer than a row, a fourth column counts them
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from ar_tokenizers.files import whole

from ar_unified import storage
from ar_unified.data.counter_rng import key, permute
from ar_unified.data.packing.fitting import rows_of
from ar_unified.data.stored import Stored
from ar_unified.errors import UserError, about

RUN = 2**12  # successive documents of the shards that stay together, so that a block is read from few shards
BLOCK = 2**16  # maximum number of documents in a block; a uint16 can number them


class Stretches(Protocol):
    """Numbers that can be read in slices: an array, or a file (`stored.Stored`, `shards.Lengths`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, stretch: slice, /) -> np.ndarray: ...


class Blocks:
    """Documents 0..documents-1 of a source, divided into `count` blocks.

    Attributes:
        starts: int64 [count + 1], the number of documents in all blocks before each block; the last counts all.
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
        """The documents of a block, int64, ascending."""
        found = (self._runs_of(block)[:, None] * RUN + np.arange(RUN)).reshape(-1)
        return found[found < self._documents]

    def lengths(self, block: int, lengths: Stretches) -> np.ndarray:
        """The lengths of a block's documents, from the lengths of all documents. One slice is read for each run."""
        return np.concatenate([lengths[run * RUN : (run + 1) * RUN] for run in self._runs_of(block).tolist()])

    def _runs_of(self, block: int) -> np.ndarray:
        return np.sort(self._runs[self._borders[block] : self._borders[block + 1]])


class Places(NamedTuple):
    """The slots of some rows, row by row. In each row, the longest slot comes first. In each epoch, documents of the
    same length exchange their slots.
    """

    counts: np.ndarray  # int64 [rows]: number of slots in each row
    first: np.ndarray  # int64 [k]: how many documents of the block are longer than this slot
    number: np.ndarray  # int64 [k]: number of the slot among the slots of its length
    size: np.ndarray  # int64 [k]: how many slots have this length


class Slots:
    """The rows of one block: places for documents of given lengths.

    Args:
        documents: int64 [n], the documents of the block.
        lengths: int [n], the length of each.
        row: int [n], the row of each slot. Slots are in order of descending length.
        sequence_length: T.

    Raises ValueError if the documents of a row do not fit into it.
    """

    def __init__(self, documents: np.ndarray, lengths: np.ndarray, row: np.ndarray, sequence_length: int):
        self._order = _falling(lengths).astype(np.uint16)
        self._given, self._lengths = documents, lengths[self._order]
        self._sizes = np.bincount(lengths)
        self._before = len(lengths) - np.cumsum(self._sizes)  # for each length: how many documents are longer
        self._slots = np.argsort(row, kind="stable").astype(np.uint16)  # row by row, the longest of each row first
        self._ends = np.cumsum(np.bincount(row))
        starts = np.append(0, self._ends[:-1])
        if np.add.reduceat(self._lengths[self._slots], starts).max() > sequence_length:
            raise ValueError("a row is too short for its documents")

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self._ends)

    def places(self, rows: np.ndarray) -> Places:
        """The slots of some rows."""
        ends = self._ends[rows]
        counts = ends - np.where(rows > 0, self._ends[rows - 1], 0)
        at = np.repeat(ends - np.cumsum(counts), counts) + np.arange(counts.sum())
        slots = self._slots[at].astype(np.int64)
        lengths = self._lengths[slots]
        first = self._before[lengths]
        return Places(counts, first, slots - first, self._sizes[lengths])

    def documents(self, places: np.ndarray) -> np.ndarray:
        """The documents at these places. Places are in order of descending length."""
        return self._given[self._order[places]]


class Plans:
    """The planned rows of a source, block by block: read from `folder` if they are there, else made in memory.

    Args:
        lengths: int [n], tokens of every document.
        sequence_length: T.
        folder: the folder of the source's shards.
        name: the source's name, for messages.
        leave_out: whether documents that are longer than a row are left out; if not, they are an error.

    Attributes:
        rows, tokens: int64 [blocks], the number of rows and tokens of each block.
        left_out: number of documents that are left out.
        decreasing: whether best-fit-decreasing planned all blocks (`fitting`).

    Raises:
        UserError: if there are no documents, or a document is longer than a row and not left out. `slots` raises it
            too, if the plan was made for other lengths.
    """

    def __init__(
        self,
        lengths: Stretches,
        sequence_length: int,
        *,
        folder: Path | None = None,
        name: str = "",
        leave_out: bool = False,
    ):
        if not len(lengths):
            raise UserError(f"source {name!r}: no documents to pack")
        self._lengths, self._length, self._name = lengths, sequence_length, name
        self._blocks = Blocks(len(lengths))
        plan, table = _paths(folder, sequence_length) if folder else (None, None)
        if plan and table and storage.fetch(table).exists():
            with about(f"{plan} cannot be read (delete rows-{sequence_length}*.npy there, and start again)"):
                self._rows: Stretches = Stored(storage.fetch(plan))
                facts = np.load(table)
            if len(self._rows) != len(lengths) or len(facts) != self._blocks.count:
                raise self._other()
        else:
            planned = list(_planned(lengths, self._blocks, sequence_length, name, leave_out))
            self._rows = np.concatenate([rows for rows, _ in planned])
            facts = np.array([count for _, count in planned])
        self.rows, self.tokens, decreasing = facts[:, :3].T
        self.left_out = int(facts[:, 3:].sum())
        if self.left_out and not leave_out:
            raise _too_long(name, sequence_length, f"{self.left_out} longer ones")
        self.decreasing = bool(decreasing.all())

    def slots(self, block: int) -> Slots:
        """The rows of a block. Each call reads the lengths of the block's documents again."""
        lengths, documents = self._blocks.lengths(block, self._lengths), self._blocks.documents(block)
        row = self._rows[self._blocks.starts[block] : self._blocks.starts[block + 1]]
        if self.left_out:
            fits = lengths <= self._length
            lengths, documents = lengths[fits], documents[fits]
            row = row[len(row) - len(lengths) :]  # slots are in order of descending length
        try:
            slots = Slots(documents, lengths, row, self._length)
        except ValueError as error:
            raise self._other() from error
        if slots.rows != self.rows[block]:
            raise self._other()
        return slots

    def _other(self) -> UserError:
        return UserError(
            f"source {self._name!r}: its rows of {self._length} tokens were planned for other documents than "
            f"these, so a file was changed: delete rows-{self._length}*.npy next to the shards, and start again"
        )


def store(lengths: Stretches, sequence_length: int, folder: Path, *, name: str = "", leave_out: bool = False) -> None:
    """Plans the rows of a source and stores the plan next to its shards, unless it exists. For the args, see
    `Plans`."""
    plan, table = _paths(folder, sequence_length)
    if storage.exists(table) or not len(lengths):
        return
    with whole(plan) as file:
        facts = {"descr": "<u2", "fortran_order": False, "shape": (len(lengths),)}
        np.lib.format.write_array_header_1_0(file, facts)
        counts = []
        for rows, count in _planned(lengths, Blocks(len(lengths)), sequence_length, name, leave_out):
            file.write(rows.tobytes())
            counts.append(count)
    with whole(table) as file:
        lines = np.array(counts, np.int64)
        np.save(file, lines if lines[:, 3].any() else lines[:, :3])  # earlier versions expect three columns


def _planned(
    lengths: Stretches, blocks: Blocks, sequence_length: int, name: str, leave_out: bool
) -> Iterator[tuple[np.ndarray, tuple[int, int, int, int]]]:
    """For every block: the row of each slot, uint16, and the block's line of rows-*.blocks.npy."""
    for block in range(blocks.count):
        found = blocks.lengths(block, lengths)
        over = int((found > sequence_length).sum())
        if found.min() < 1 or (over and not leave_out):
            raise _too_long(name, sequence_length, f"{int(found.min())} to {int(found.max())}")
        falling = found[_falling(found)][over:]
        rows, decreasing = rows_of(falling, sequence_length) if len(falling) else (falling, True)
        slots = np.append(np.zeros(over, "<u2"), rows.astype("<u2"))
        yield slots, (int(rows.max(initial=-1)) + 1, int(falling.sum()), decreasing, over)


def _too_long(name: str, sequence_length: int, found: str) -> UserError:
    return UserError(
        f"source {name!r}: expected documents of 1 to {sequence_length} tokens, found {found}: prepare with "
        "max_tokens <= the sequence length, or make rows longer"
    )


def _falling(lengths: np.ndarray) -> np.ndarray:
    """The order by descending length; documents of the same length keep their order."""
    below = lengths.max() - lengths
    return np.argsort(below.astype(np.uint16) if below.max() < 2**16 else below, kind="stable")  # by radix sort


def _paths(folder: Path, sequence_length: int) -> tuple[Path, Path]:
    return folder / f"rows-{sequence_length}.npy", folder / f"rows-{sequence_length}.blocks.npy"
