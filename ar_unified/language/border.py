"""A published id space and ours: a bijection, stored as runs. Nothing else sees a published id.

Published tables mix their ranges: controls between text pieces, codes in front of them. Ours are contiguous. Import
gathers the rows of their embedding and head into our order, export scatters them back, and their text tokenizer is
wrapped, so that model, loss, sampler and data know one id space.

Axes: `V` ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ar_unified.language.grammar import TextCodec

Run = tuple[int, int, int]  # first id of theirs, first of ours, how many


@dataclass(frozen=True)
class Border:
    """Runs of ids that are in the same order on both sides, sorted by theirs. JSON: `manifest`, `from_manifest`.

    Raises:
        ValueError: they are no bijection of 0..V-1, naming the first id that is missing or there twice.
    """

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        for side, at in (("theirs", 0), ("ours", 1)):
            end = 0
            for first, count in sorted((run[at], run[2]) for run in self.runs):
                if first != end or count < 1:
                    raise ValueError(f"border: expected each id of {side} once; id {min(first, end)} is not")
                end += count
        if not self.runs:
            raise ValueError("border: expected at least one run of ids, found none")

    @classmethod
    def from_ids(cls, theirs: Sequence[int] | np.ndarray) -> Border:
        """The border of theirs[i], int [V], the published id of our id i."""
        ids = np.asarray(theirs, np.int64)
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"border: expected published ids [V], found {ids.dtype} {list(ids.shape)}")
        first = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
        counts = np.diff(np.append(first, len(ids)))
        return cls(tuple(sorted((int(ids[i]), int(i), int(n)) for i, n in zip(first, counts, strict=True))))

    @property
    def size(self) -> int:
        """V, of both sides."""
        return sum(count for _, _, count in self.runs)

    @cached_property
    def theirs(self) -> np.ndarray:
        """int32 [V]: the published id of each of ours."""
        out = np.empty(self.size, np.int32)
        for theirs, ours, count in self.runs:
            out[ours : ours + count] = np.arange(theirs, theirs + count)
        return out

    @cached_property
    def ours(self) -> np.ndarray:
        """int32 [V]: our id of each published one."""
        return np.argsort(self.theirs).astype(np.int32)

    def gather(self, rows: Any) -> Any:
        """A published table [V, ...] in our order. Raises ValueError for a table of another length."""
        return self._rows(rows)[self.theirs]

    def scatter(self, rows: Any) -> Any:
        """Our table, [V, ...] or padded, in the published order: the inverse of `gather`."""
        return self._rows(rows[: self.size])[self.ours]

    def _rows(self, rows: Any) -> Any:
        if len(rows) != self.size:
            raise ValueError(f"border: expected a table of {self.size} rows, found {len(rows)}")
        return rows

    def manifest(self) -> list[list[int]]:
        return [list(run) for run in self.runs]

    @classmethod
    def from_manifest(cls, runs: Sequence[Sequence[int]]) -> Border:
        return cls(tuple((int(a), int(b), int(n)) for a, b, n in runs))


@dataclass(frozen=True)
class MappedCodec:
    """A published text tokenizer that speaks our ids 0..size-1.

    Args:
        codec: of theirs: ids in the published space.
        border: size: the number of text pieces, ours 0..size-1.
        hash: of the tokenizer's file and of the border.
    """

    codec: TextCodec
    border: Border
    size: int
    hash: str

    def encode(self, text: str, /) -> list[int]:
        """Raises ValueError where the text would be spelled with an id that is no text piece."""
        ids = self.border.ours[np.asarray(self.codec.encode(text), np.int64)].tolist()
        if ids and max(ids) >= self.size:
            raise ValueError(f"the text {text!r:.60} is spelled with an id that is no text piece")
        return ids

    def decode(self, ids: Sequence[int], /) -> str:
        return self.codec.decode(self.border.theirs[np.asarray(ids, np.int64)].tolist())
