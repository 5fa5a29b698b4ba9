"""When a training has turned: the loss on held-out data rises while that on the training data still falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_RISE = 0.01  # of the lowest validation loss: less is noise
_LINES = 5  # log lines whose mean is the training loss of a time


def losses_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl with what is looked at here, and no more: a long run has many."""
    return [{key: row[key] for key in ("step", "loss", "validation/loss") if key in row} for row in rows]


def turned(rows: Sequence[Mapping[str, Any]], *, finished: bool = True, kept: int | None = None) -> str:
    """A sentence that says where the validation loss was lowest and what it came to; "" where it has not turned.

    It has where the last validation loss is more than 1 % above the lowest, and the training loss has not risen
    since: a training whose two losses rise together is unstable, and another matter. One validation may be a chance:
    before the end it takes two in a row that lie above.

    Args:
      rows: of metrics.jsonl, in order of steps: "loss" of training, "validation/loss", in nats per token.
      finished: no more validations will come.
      kept: the step whose checkpoint training.keep_best keeps, to be told; None: it keeps none.
    """
    losses = [(row["step"], row["validation/loss"]) for row in rows if _number(row, "validation/loss")]
    if len(losses) < 2:
        return ""
    best, lowest = min(losses, key=lambda found: found[1])
    step, last = losses[-1]
    since = sum(at > best for at, _ in losses)
    if since < (1 if finished else 2) or last <= lowest + _RISE * abs(lowest):
        return ""
    before, now = _training(rows, best), _training(rows, step)
    if before is not None and now is not None and now > before:
        return ""
    beside = f"; training loss {now:.4g}" if now is not None else ""
    use = f"; training.keep_best keeps step {kept}, for sampling.checkpoint=best" if kept is not None else ""
    return (
        f"validation loss is lowest at step {best} ({lowest:.4g}) and has risen since ({last:.4g} at step {step}"
        f"{beside}): the model learns its training data by heart{use}"
    )


def _training(rows: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """The training loss at a step: the mean of the last lines up to it."""
    losses = [row["loss"] for row in rows if _number(row, "loss") and row["step"] <= step][-_LINES:]
    return sum(losses) / len(losses) if losses else None


def _number(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row.get(key), int | float)
