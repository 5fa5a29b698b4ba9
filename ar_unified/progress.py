"""Progress with rate and time left: a bar on a terminal, and occasional lines in a log file."""

from __future__ import annotations

import sys

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 20.0  # if stderr is not a terminal


def bar(total: int, unit: str, what: str, *, done: int = 0, shown: bool = True) -> tqdm:
    """A tqdm bar on stderr.

    Args:
      total: the number of items.
      done: how many of them an earlier attempt has done; the rate does not count them.
      unit: the name of the items, in the plural.
      what: what is being done.
      shown: False hides the bar.
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
