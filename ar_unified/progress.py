"""Progress with rate and time left: a bar for a person, a line now and then for a log file."""

from __future__ import annotations

import sys

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 20.0  # where nobody watches


def bar(total: int, unit: str, what: str, *, done: int = 0, shown: bool = True) -> tqdm:
    """A tqdm bar on stderr.

    Args:
      total, done: how many there are, and how many were done by an earlier attempt (they do not count in the rate).
      unit: in the plural. what: what is being done. shown: False for silence.
    """
    watched = sys.stderr.isatty()
    interval = 0.2 if watched else _SECONDS_BETWEEN_LINES
    return tqdm(
        total=total,
        initial=done,
        unit=f" {unit}",
        desc=what,
        disable=not shown,
        mininterval=interval,
        maxinterval=max(10.0, interval),
        miniters=None if watched else 1,
        ncols=None if watched else 100,
    )
