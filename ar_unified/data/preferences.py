"""Packs preference pairs into batches. Both answers of a pair are in one row, one after the other.

So a pair is in one microbatch and on the devices of one row, whatever the mesh is. The place of a pair is found by
counting documents in the row. Everything else is as in `loader`; in particular, batch(step) is a pure function.

Axes: `B` rows, `T` tokens of a row, `P` maximum number of pairs in a row, `R` roles of targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified.data.batch import PackedBatch, PreferenceBatch
from ar_unified.data.loader import Chosen, PackedBatches
from ar_unified.data.phases import Phase
from ar_unified.language.grammar import Grammar
from ar_unified.language.vocabulary import Role

Sums = Mapping[str, np.ndarray]  # maps a source to f32 [its pairs, 2, R], as in PreferenceBatch.reference


class PreferenceBatches(PackedBatches):
    """Rows of whole preference pairs from the shards that `prepare` wrote to `folder`.

    A pair is read as it is: nothing is flipped, and no prompt is dropped. A row must have room for the longest pair
    (both answers, each with the prompt). Args and errors are those of `PackedBatches`.

    Attributes:
        reference: the reference model's log-probabilities of each pair. Set it before you read batches that need
            it; while it is {}, batches contain zeros.
        pairs: P for the longest rows, which is how many pairs fit into a row if all are as short as the shortest pair.
    """

    answers = 2

    def __init__(
        self,
        folder: str | Path,
        grammar: Grammar,
        *,
        sequence_length: int,
        phases: Sequence[Phase] = (Phase(),),
        **more: Any,
    ):
        phases = [dataclasses.replace(phase, flip_pairs=0.0, condition_dropout=0.0) for phase in phases]
        super().__init__(folder, grammar, sequence_length=sequence_length, phases=phases, **more)
        self.reference: Sums = {}
        self._shortest = min(int(source.lengths(self.answers)[:].min()) for source in self.shards)
        self.pairs = self.sequence_length // self._shortest

    @property
    def counts(self) -> dict[str, int]:
        """The number of pairs of each source."""
        return {name: len(source) // 2 for name, source in zip(self.names, self.shards, strict=True)}

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> PreferenceBatch[np.ndarray]:  # type: ignore[override]
        """The rows of one of `process_count` processes in the global batch of `step`."""
        phase, count, chosen = self.picked(step, process_index, process_count)
        most = max(1, (phase.sequence_length or self.sequence_length) // self._shortest)
        reference = np.zeros((count, most, 2, len(Role)), np.float32)
        for source, _, at, items in chosen if self.reference else ():
            known = self.reference[self.names[source]]
            for row, pairs in zip(at, items, strict=True):
                reference[row, : len(pairs)] = known[pairs]
        return PreferenceBatch(self.laid(phase, count, chosen), reference)

    def every(self) -> Iterator[tuple[str, PackedBatch, np.ndarray]]:
        """Yields all pairs of all sources once, in full batches. Each batch is a source's name, rows [B, T], and the
        pairs' numbers.

        The numbers are int64 [B, P], -1 where there is no pair. The last rows of a source may be padding.
        """
        whole = dataclasses.replace(self.phases[0], sequence_length=self.sequence_length)
        for source, (name, packing) in enumerate(zip(self.names, self.packings, strict=True)):
            for start in range(0, packing.rows, self.batch_size):
                rows = np.arange(start, min(start + self.batch_size, packing.rows))
                items = packing.documents(0, rows)
                at = np.arange(len(rows))
                which = np.full((self.batch_size, self.pairs), -1, np.int64)
                for row, pairs in zip(at, items, strict=True):
                    which[row, : len(pairs)] = pairs
                yield name, self.laid(whole, self.batch_size, [Chosen(source, 0, at, items)]), which
