"""How many positions a pool draws at once: a number that was asked for, or the one that measures best.

A wider window takes fewer steps, but each costs more. How many tokens a step gives depends on the model and on what it
draws; what it costs depends on the device and the batch. Both are measured on real steps of the job, so a trial costs
only the time by which it is slower. A trial begins when a pool has worked for a while, and is repeated now and then.

A trial tries wider windows as long as they are faster. The first steps of each width are not timed, because its program
may be compiled in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ar_unified.model.attention import FEW
from ar_unified.sampling.steps import CHUNK, Shape

WIDTHS = (1, 2, 4, FEW)
WINDOWS = (*map(str, WIDTHS), "auto")
_PROBE = 8  # steps that are timed together
_PROBES = 3  # of a width; the first is not counted, of the others the fastest is
_AFTER = 8 * CHUNK  # steps of a pool before its first trial: so a short job has none
_AGAIN = 64 * CHUNK  # before another
_BETTER = 1.05  # times faster than a narrower one, or it is not worth it


@dataclass
class _Pool:
    """The measurements of one pool, by width: seconds of a step, and tokens that a step gave a sample."""

    width: int
    left: int  # steps until a trial
    trial: list[int] = field(default_factory=list)  # widths of the probes to come
    seconds: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, list[float]] = field(default_factory=dict)

    def speed(self, width: int) -> float:
        """Tokens a second of a sample."""
        many = self.tokens[width]
        return sum(many) / len(many) / min(self.seconds[width])


class Pace:
    """The window of each pool of an engine.

    window: one of WINDOWS, or its number. most: the greatest width. Raises ValueError for another window.
    """

    def __init__(self, window: int | str):
        if str(window) not in WINDOWS:
            raise ValueError(f"window: expected one of {', '.join(WINDOWS)}; found {window!r}")
        self._measured = window == "auto"
        self.most = FEW if self._measured else int(window)
        self._pools: dict[Shape, _Pool] = {}

    def next(self, shape: Shape, steps: int) -> tuple[int, int, bool]:
        """The width of the next steps of a pool, how many of `steps` to take, and whether they are a measurement."""
        if not self._measured:
            return self.most, steps, False
        pool = self._pools.setdefault(shape, _Pool(WIDTHS[0], _AFTER))
        if pool.left > 0:
            pool.left -= steps
            return pool.width, steps, False
        if not pool.trial:
            pool.seconds, pool.tokens = {}, {}
            pool.trial = [width for width in WIDTHS[:2] for _ in range(_PROBES)]
        return pool.trial[0], min(steps, _PROBE), True

    def took(self, shape: Shape, seconds: float, tokens: float) -> None:
        """Adds a measurement: seconds of a step, and tokens that a step gave a sample."""
        pool = self._pools[shape]
        width = pool.trial.pop(0)
        if pool.trial[:1] == [width] and len(pool.trial) % _PROBES == _PROBES - 1:
            return  # the first of its width
        pool.seconds.setdefault(width, []).append(seconds)
        pool.tokens.setdefault(width, []).append(tokens)
        if pool.trial:
            return
        best = WIDTHS[0]
        for each in WIDTHS[1 : len(pool.seconds)]:
            best = each if pool.speed(each) > _BETTER * pool.speed(best) else best
        if width == best and width < WIDTHS[-1]:
            pool.trial = [WIDTHS[WIDTHS.index(width) + 1]] * _PROBES
        else:
            pool.width, pool.left = best, _AGAIN
