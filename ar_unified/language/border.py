"""The bijection between a published id space and ours, stored as runs. No other module sees a published id.

Published tables mix kinds of ids: they may have controls between text pieces, or codes before the text. Our ranges are
contiguous. Import gathers the rows of the published embedding and head into our order, and export scatters them back.
The published text tokenizer is wrapped, so that model, loss, sampler and data use one id space.

Axes: `V` ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from ar_tokenizers.codec import Codec, Lossy
from ar_tokenizers.lossless import Loss
from ar_tokenizers.reading import codec

_LARGEST = 1 << 24  # maximum number of ids; no published table has as many, and they fit in memory

Run = tuple[int, int, int]  # first published id, our first id, length


@dataclass(frozen=True)
class Border:
    """Runs of ids that have the same order on both sides, sorted by published id. `manifest` gives them as JSON.

    Raises:
        ValueError: if the runs are not a bijection of 0..V-1. The message names the first id that is missing or occurs
            twice.
    """

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        for side, at in (("published ids", 0), ("our ids", 1)):
            end = 0
            for first, count in sorted((run[at], run[2]) for run in self.runs):
                if first != end or count < 1:
                    wrong = f"id {min(first, end)} is missing, repeated or out of range"
                    raise ValueError(f"border: expected {side} 0, 1, 2, ... each once; {wrong}")
                end += count
        if not self.runs:
            raise ValueError("border: expected at least one run of ids, found none")
        if self.size > _LARGEST:
            raise ValueError(f"border: expected at most {_LARGEST} ids, found {self.size}")

    @classmethod
    def from_ids(cls, theirs: Sequence[int] | np.ndarray) -> Border:
        """Makes the border from published ids, int [V], where theirs[i] is the published id of our id i."""
        ids = np.asarray(theirs, np.int64)
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"border: expected published ids [V], found {ids.dtype} {list(ids.shape)}")
        first = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
        counts = np.diff(np.append(first, len(ids)))
        return cls(tuple(sorted((int(ids[i]), int(i), int(n)) for i, n in zip(first, counts, strict=True))))

    @property
    def size(self) -> int:
        """V, the number of ids, which is the same on both sides."""
        return sum(count for _, _, count in self.runs)

    @cached_property
    def theirs(self) -> np.ndarray:
        """int32 [V]: the published id of each of our ids."""
        out = np.empty(self.size, np.int32)
        for theirs, ours, count in self.runs:
            out[ours : ours + count] = np.arange(theirs, theirs + count)
        return out

    @cached_property
    def ours(self) -> np.ndarray:
        """int32 [V]: our id of each published id."""
        return np.argsort(self.theirs).astype(np.int32)

    def gather(self, rows: Any) -> Any:
        """A published table [V, ...] in our order. Raises ValueError for a table of another length."""
        return self._rows(rows)[self.theirs]

    def scatter(self, rows: Any) -> Any:
        """Our table, [V, ...] or padded, in the published order. The inverse of `gather`."""
        return self._rows(rows[: self.size])[self.ours]

    def _rows(self, rows: Any) -> Any:
        if len(rows) != self.size:
            raise ValueError(f"border: expected a table of {self.size} rows, found {len(rows)}")
        return rows

    def manifest(self) -> list[list[int]]:
        """The runs as JSON, for the manifest of a language."""
        return [list(run) for run in self.runs]

    @classmethod
    def from_manifest(cls, runs: Any) -> Border:
        """Reads the value of `manifest`. Raises ValueError for anything else."""
        if not isinstance(runs, list) or not all(
            isinstance(run, list) and len(run) == 3 and all(type(x) is int for x in run) for run in runs
        ):
            raise ValueError(f"border: expected runs of three whole numbers, found {runs!r:.80}")
        return cls(tuple((a, b, n) for a, b, n in runs))


class Ids:
    """Translates between published ids and ours, for comparisons: ours(theirs) and theirs(ours).

    Args:
        border: None if both id spaces are the same.
        size: V, the number of ids that have a probability.
    """

    def __init__(self, border: Border | None, size: int):
        self.border, self.size = border, size

    def ours(self, theirs: Any) -> np.ndarray:
        """Our ids, int32 [...], for published ids, int [...] (an array, a list, a range). Raises ValueError for ids
        beyond V."""
        return self._across(theirs, None if self.border is None else self.border.ours, "published ids")

    def theirs(self, ours: Any) -> np.ndarray:
        """Published ids, int32 [...], for our ids, int [...]. The inverse of `ours`. Raises ValueError for ids beyond
        V."""
        return self._across(ours, None if self.border is None else self.border.theirs, "our ids")

    def _across(self, ids: Any, table: np.ndarray | None, what: str) -> np.ndarray:
        found = np.asarray(ids)
        if found.size and not np.issubdtype(found.dtype, np.integer):
            raise ValueError(f"{what}: expected whole numbers, found {found.dtype}")
        if found.size and (found.min() < 0 or found.max() >= self.size):
            raise ValueError(f"{what}: expected 0..{self.size - 1}, found {found.min()}..{found.max()}")
        return found.astype(np.int32) if table is None else table[found.astype(np.int32)]


@dataclass(frozen=True)
class MappedCodec:
    """A `Codec` that wraps a published text tokenizer and uses our ids 0..size-1.

    Args:
        codec: the published tokenizer, with published ids.
        border: the first `size` of our ids must be the text pieces, in the order of the published ids.
        size: the number of text pieces.

    Raises ValueError if the tokenizer lacks one of these pieces.
    """

    codec: Codec
    border: Border
    size: int

    @classmethod
    def of(cls, file: str, data: bytes, border: Border, size: int, lossy: Lossy = "refuse") -> MappedCodec:
        """Opens a tokenizer's file, whose name determines its format (`reading.codec`). Text is encoded with text
        pieces only.
        """
        return cls(codec(file, data, lossy=lossy, text_ids={*border.theirs[:size].tolist()}), border, size)

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.border.size:
            raise ValueError(f"border: expected 1 to {self.border.size} text pieces, found {self.size}")
        if np.any(np.diff(self._text) < 0):
            raise ValueError("border: expected text pieces in the order of the published ids")
        if self._text[-1] >= self.codec.size:
            expected = f"ids of text pieces below {self.codec.size}, the size of {self.file}"
            raise ValueError(f"border: expected {expected}; found {self._text[-1]}")
        self.codec.decode(self._text.tolist())  # raises if the tokenizer lacks one of these ids

    @property
    def _text(self) -> np.ndarray:
        return self.border.theirs[: self.size]

    @cached_property
    def hash(self) -> str:
        """sha256 of the tokenizer and of the border."""
        record = json.dumps([self.codec.hash, self.size, self.border.manifest()])
        return hashlib.sha256(record.encode()).hexdigest()

    @property
    def file(self) -> str:
        """The name of the tokenizer's file."""
        return self.codec.file

    @property
    def data(self) -> bytes:
        """The content of that file."""
        return self.codec.data

    @property
    def losses(self) -> tuple[Loss, ...]:
        """How the tokenizer changes or loses text."""
        return self.codec.losses

    @property
    def symbols(self) -> list[str]:
        """The user-defined symbols of the tokenizer, which text can contain."""
        return self.codec.symbols

    @cached_property
    def piece_bytes(self) -> np.ndarray:
        """int32 [size]: the number of UTF-8 bytes of text that each of our ids stands for."""
        return self.codec.piece_bytes[self._text]

    def is_byte(self, id: int, /) -> bool:
        """Whether one of our ids stands for a single byte of a character that has no piece."""
        return self.codec.is_byte(int(self.border.theirs[id]))

    def encode(self, text: str, /) -> list[int]:
        """Our ids of a text. Raises ValueError if an id would not be a text piece."""
        theirs = np.asarray(self.codec.encode(text), np.int64)
        beyond = len(theirs) and theirs.max() >= self.border.size
        ids = [self.size] if beyond else self.border.ours[theirs].tolist()
        if ids and max(ids) >= self.size:
            raise ValueError(f"the text {text!r:.60} is encoded with an id that is not a text piece")
        return ids

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of our ids. Raises ValueError for an id that is not a text piece."""
        pieces = np.asarray(ids, np.int64)
        if len(pieces) and (pieces.min() < 0 or pieces.max() >= self.size):
            bad = pieces[(pieces < 0) | (pieces >= self.size)]
            raise ValueError(f"text ids must be in [0, {self.size}); found {bad[:8].tolist()}")
        return self.codec.decode(self._text[pieces].tolist())
