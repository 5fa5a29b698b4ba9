"""Detects training that has gone wrong without a NaN, because the loss stays above its first values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ar_unified.errors import RunError

_BEGINNING = 10  # first steps; the loss at the beginning is their mean loss, or the first loss if it is lower
_MEMORY = 0.9  # decay of the running mean, over about ten steps, so that one bad batch does not count


class Diverged(RunError):
    """The loss rose far above its first values and stayed there. Training stopped before the next checkpoint."""


class Watch:
    """Takes the loss of every step. Raises Diverged if the running mean exceeds 1.5 * (loss at the beginning) + 1.

    The first losses are those of an untrained model. A model with a much higher loss is worse than untrained, and
    almost never recovers. The `+ 1` leaves room for a model that began with a low loss (fine-tuning).

    Args:
      rows: the rows of metrics.jsonl from an earlier part of this run; the first row gives the loss at the beginning.
    """

    def __init__(self, rows: Sequence[dict[str, Any]] = ()) -> None:
        began = [row["loss"] for row in rows if isinstance(row.get("loss"), float)]
        self.began: float | None = began[0] if began else None
        self._first: list[float] = []
        self._mean: float | None = None

    def add(self, step: int, loss: float, latest: Callable[[], int | None]) -> None:
        """Adds the loss of step `step`, counted from 0. latest: returns the step of the last checkpoint, for the
        message."""
        if self.began is None:
            self._first.append(loss)
            if len(self._first) < _BEGINNING:
                return
            self.began = min(self._first[0], sum(self._first) / len(self._first))
        self._mean = loss if self._mean is None else _MEMORY * self._mean + (1 - _MEMORY) * loss
        if self._mean > 1.5 * self.began + 1:
            good = latest()
            kept = f"step {good} is the last good checkpoint" if good else "there is no checkpoint yet"
            raise Diverged(
                f"diverged at step {step}: the loss has risen to {self._mean:.4g} from {self.began:.4g} at the "
                f"beginning; {kept}. Try a lower learning rate (a smaller batch needs a lower one), a longer warm-up "
                "or a lower clip_norm; with an adversary, try a smaller adversary weight or a later adversary start. "
                "Starting again resumes from the checkpoint and, with the same settings, diverges again."
            )
