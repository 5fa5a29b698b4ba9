"""Goodput: the fraction of a run's wall time spent on steps that were kept, and what used the rest of the time.

Every second since the first attempt at a run counts for one activity. Time without another activity counts for "step"
(the devices work on a step), or for "start" if the attempt has not taken a step yet. "down" is the time between two
attempts. "redone" is the time of steps that came after the checkpoint from which the next attempt started. The attempts
are stored in `goodput.json` next to the metrics, so they survive interruptions.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ar_unified.errors import UserError
from ar_unified.workdir import read_json, write_json

# The activities besides "step". "input" is time in which the devices were idle, because the batch of the next step was
# missing. "drawing" is time in which samples to learn from were drawn; it starts when the host has dispatched the
# previous step.
ACTIVITIES = ("down", "redone", "start", "compile", "input", "drawing", "validation", "preview", "checkpoint")


class Goodput:
    """Records the time of one attempt, after the earlier attempts.

    Args:
      path: the path of goodput.json.
      first: the number of steps taken before this attempt.
      active: True on one process only; the others measure and write nothing.
    """

    def __init__(self, path: str | Path, first: int, *, active: bool = True):
        self.path, self.active = Path(path), active
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._began = time.perf_counter()
        self._earlier = _attempts(self.path) if active else []
        self._attempt: dict[str, Any] = {"began": time.time(), "first": first}

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """A context; its time counts for `activity` and not for steps. It must not be nested."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(activity, time.perf_counter() - began)

    def add(self, activity: str, seconds: float) -> None:
        """Assigns the last `seconds` to `activity`."""
        self.seconds[activity] += seconds

    def write(self, step: int, *, finished: bool = False) -> dict[str, float]:
        """Writes the record after `step` steps. Returns {"goodput": the share of "step" in the wall time,
        "time/ACTIVITY": the share of an activity}.

        finished: the training is complete, so the time until somebody asks for more steps is not "down".
        """
        elapsed = time.perf_counter() - self._began
        spent = {"step": 0.0} | self.seconds
        spent["step" if step > self._attempt["first"] else "start"] += elapsed - sum(self.seconds.values())
        self._attempt |= {"seen": self._attempt["began"] + elapsed, "last": step, "seconds": spent}
        if finished:
            self._attempt["finished"] = True
        attempts = [*self._earlier, self._attempt]
        if self.active:
            write_json(self.path, attempts)
        return shares(attempts)


def shares(attempts: list[dict[str, Any]]) -> dict[str, float]:
    """Fractions of the wall time of all attempts, as `Goodput.write` returns them. Activities that took no time are
    left out.

    An attempt has the keys `began` and `seen` (the times of its start and of its last record, in Unix seconds), `first`
    and `last` (the numbers of steps taken at these two times), `seconds` (by activity) and `finished`.
    """
    total = dict.fromkeys(("step", *ACTIVITIES), 0.0)
    for attempt, following in itertools.zip_longest(attempts, attempts[1:]):
        for activity, seconds in attempt["seconds"].items():
            total[activity] += seconds
        if following is not None:
            taken = attempt["last"] - attempt["first"]
            lost = max(attempt["last"] - following["first"], 0) / taken if taken else 0.0
            redone = attempt["seconds"]["step"] * min(lost, 1.0)
            total["step"] -= redone
            total["redone"] += redone
            if not attempt.get("finished"):
                total["down"] += max(following["began"] - attempt["seen"], 0.0)
    wall = max(sum(total.values()), 1e-9)
    return {"goodput": total.pop("step") / wall} | {f"time/{k}": v / wall for k, v in total.items() if v}


def describe(account: dict[str, float]) -> str:
    """Text like "goodput 91.2% (compile 5.1%, validation 3.0%, checkpoint 0.7%)", the largest shares first."""
    rest = sorted(((v, k.removeprefix("time/")) for k, v in account.items() if k != "goodput"), reverse=True)
    named = ", ".join(f"{activity} {share:.1%}" for share, activity in rest if share >= 5e-4)
    return f"goodput {account['goodput']:.1%}" + (f" ({named})" if named else "")


def wall(path: str | Path) -> tuple[float, int]:
    """The total working time of all attempts in a goodput.json, in seconds, and their number; 0, 0 if there is no such
    file."""
    times = [each["seen"] - each["began"] for each in _attempts(Path(path)) if "seen" in each]
    return sum(times), len(times)


def _attempts(path: Path) -> list[dict[str, Any]]:
    """The earlier attempts; [] if there are none. A broken file must not stop training."""
    try:
        return read_json(path)
    except (OSError, UserError):
        return []
