"""What metrics.jsonl holds: the names that training writes and the report reads, its rows, and what is concluded from
them.

A training has turned when the loss on held-out data rises while that on the training data still falls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ar_unified.manifests import Json

# How the names of metrics begin that come once for each role, for each task, for each pair of modalities (attention),
# and for held-out data.
LOSS_BY_ROLE, LOSS_BY_TASK, LOG_Z_BY_ROLE = "loss/role/", "loss/task/", "log_z/role/"
# Metrics of preference pairs (training/preference.py), under the names that are usual for them.
REWARDS, LOGPS, LOSS_OF_PAIRS, LOSS_OF_CHOSEN = "rewards/", "logps/", "loss/preference", "loss/chosen"
TOKENS_PER_SECOND, ATTENTION, VALIDATION = "tokens_per_second/", "attention/", "validation/"
VALIDATION_LOSS = VALIDATION + "loss"

_RISE = 0.01  # share of the lowest validation loss; a smaller rise is noise
_LINES = 5  # log lines whose mean is the training loss of a time


def read_metrics(path: str | Path, until: float = math.inf) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl up to a step; a torn line is left out."""
    rows = []
    for line in Path(path).read_bytes().split(b"\n")[:-1]:  # what follows the last newline is torn
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", math.inf) <= until:
            rows.append(row)
    return rows


def losses_of(rows: Sequence[Mapping[str, Json]]) -> list[dict[str, Json]]:
    """Rows of metrics.jsonl with only those values that are used here, because a long run has many rows."""
    return [{key: row[key] for key in ("step", "loss", VALIDATION_LOSS) if key in row} for row in rows]


def last_validation(rows: Sequence[Mapping[str, Json]]) -> dict[str, Any]:
    """The last scores on held-out data by name, without their prefix; {} if there are none."""
    last: Mapping[str, Json] = next((row for row in reversed(rows) if VALIDATION_LOSS in row), {})
    return {key.removeprefix(VALIDATION): value for key, value in last.items() if key.startswith(VALIDATION)}


def turned(rows: Sequence[Mapping[str, Any]], *, finished: bool = True, kept: int | None = None) -> str:
    """A sentence that says where the validation loss was lowest and how far it has risen; "" where it has not turned.

    It has turned if the last validation loss is more than 1 % above the lowest while the training loss has not risen
    since. If both losses rise, the training is unstable, which is another matter. A single validation may be chance:
    before the end, two in a row must lie above.

    Args:
      rows: of metrics.jsonl, in order of steps: "loss" of training, "validation/loss", in nats per token.
      finished: no more validations will come.
      kept: the step whose checkpoint training.keep_best keeps, to be told; None: it keeps none.
    """
    losses = [(row["step"], row[VALIDATION_LOSS]) for row in rows if _number(row, VALIDATION_LOSS)]
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


def _number(row: Mapping[str, Json], key: str) -> bool:
    return isinstance(row.get(key), int | float)
