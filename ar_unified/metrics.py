"""The contents of metrics.jsonl: its rows, the names that training writes and the report reads, and conclusions from
the rows.

A training "has turned" if it overfits: the loss on held-out data rises while the loss on training data still falls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ar_unified.manifests import Json

# Prefixes of metrics that exist for each role, for each task, for each pair of modalities (attention), and for held-out
# data.
LOSS_BY_ROLE, LOSS_BY_TASK, LOG_Z_BY_ROLE = "loss/role/", "loss/task/", "log_z/role/"
# Metrics of preference pairs (training/preference.py), under their usual names.
REWARDS, LOGPS, LOSS_OF_PAIRS, LOSS_OF_CHOSEN = "rewards/", "logps/", "loss/preference", "loss/chosen"
TOKENS_PER_SECOND, ATTENTION, VALIDATION = "tokens_per_second/", "attention/", "validation/"
VALIDATION_LOSS = VALIDATION + "loss"

_RISE = 0.01  # share of the lowest validation loss; smaller rises are noise
_LINES = 5  # the training loss at a step is the mean of this many log lines


def read_metrics(path: str | Path, until: float = math.inf) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl up to a step. An incomplete last line is left out."""
    rows = []
    for line in Path(path).read_bytes().split(b"\n")[:-1]:  # text after the last newline is incomplete
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", math.inf) <= until:
            rows.append(row)
    return rows


def losses_of(rows: Sequence[Mapping[str, Json]]) -> list[dict[str, Json]]:
    """Rows of metrics.jsonl with only the values that are used here, which saves memory in long runs."""
    return [{key: row[key] for key in ("step", "loss", VALIDATION_LOSS) if key in row} for row in rows]


def last_validation(rows: Sequence[Mapping[str, Json]]) -> dict[str, Any]:
    """The last scores on held-out data, by name without prefix; {} if there are none."""
    last: Mapping[str, Json] = next((row for row in reversed(rows) if VALIDATION_LOSS in row), {})
    return {key.removeprefix(VALIDATION): value for key, value in last.items() if key.startswith(VALIDATION)}


def turned(rows: Sequence[Mapping[str, Any]], *, finished: bool = True, kept: int | None = None) -> str:
    """A sentence with the lowest and the last validation loss, if the training has turned (overfits); else "".

    A training has turned if the last validation loss is more than 1 % above the lowest one, and the training loss has
    not risen since the step of the lowest one. If both losses rise, the training is unstable, which is a different
    problem. A single high validation loss may be chance, so before the end of the training, at least two validations
    must follow the lowest one.

    Args:
      rows: rows of metrics.jsonl in order of steps, with "loss" (of training) and "validation/loss" in nats per token.
      finished: whether this was the last validation.
      kept: the step of the checkpoint that training.keep_best keeps, for the sentence; None if it keeps none.
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
    if before is not None and now is not None and now[0] > before[0]:
        return ""
    beside = f"; training loss {now[0]:.4g}, the mean of steps {now[1]} to {now[2]}" if now is not None else ""
    use = f"; training.keep_best keeps step {kept}, which sampling.checkpoint=best uses" if kept is not None else ""
    return (
        f"validation loss is lowest at step {best} ({lowest:.4g}) and has risen since ({last:.4g} at step {step}"
        f"{beside}): the model memorises its training data{use}"
    )


def _training(rows: Sequence[Mapping[str, Any]], step: int) -> tuple[float, int, int] | None:
    """The training loss at a step: the mean over the last log lines up to this step, and the first and the last step
    that these lines are of."""
    lines = [(row["step"], row["loss"]) for row in rows if _number(row, "loss") and row["step"] <= step]
    last = lines[-_LINES:]
    if not last:
        return None
    first = lines[-_LINES - 1][0] + 1 if len(lines) > _LINES else 1  # a line is of all steps since the line before it
    return sum(loss for _, loss in last) / len(last), first, last[-1][0]


def _number(row: Mapping[str, Json], key: str) -> bool:
    return isinstance(row.get(key), int | float)
