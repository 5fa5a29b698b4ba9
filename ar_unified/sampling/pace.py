"""How many positions a pool draws at once: a number that was asked for, or the one that is fastest.

A wider window takes fewer steps, but each costs more. How many fewer depends on the model and on what it draws, what a
step costs on the device and the batch.

What a window would bring is known without one: the codes that were drawn one by one say which of them `pairs.Pairs`
would have guessed, and so how many steps a window would have taken with these guesses. It gets more from its own draws
behind wrong guesses; how much more is known once it was used. What a step costs is measured on a few real steps. So
trying loses the time of these steps and the compiler's, and a pool may lose a small share of its time so: a short job
tries nothing, and what was measured in this process is not measured again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ar_unified.model.attention import FEW
from ar_unified.sampling.steps import CHUNK, Shape

WIDTHS = (1, 2, 4, FEW)
WINDOWS = (*map(str, WIDTHS), "auto")
_AFTER = 2 * CHUNK  # steps of a pool before anything is measured
# Steps that are timed together, about as long for one width as for another: a busy machine spares what is short.
_ALONE, _WIDE = 16, 6
_PROBES = 3  # of a width, in turn with the other; the fastest counts
_COMPILING = 5.0  # seconds that compiling is thought to take at least: `window=1` may have come from a cache
_AGAIN = 64 * CHUNK  # steps before they are measured again
_SHARE, _DOUBTFUL = 0.02, 0.004  # of a pool's time that trying may cost, where a gain is foreseen and where it is not
_PROMISING = 1.3  # tokens a step that are foreseen, for the greater share
_BETTER = 1.1  # times faster than drawing one by one, or it is not worth it
_FIRST, _EACH = 32, 8  # samples that are looked at where nothing is guessed yet: the first ones, then each so many
_KEEP = 0.97, 0.9  # how much a sample, and a chunk, leaves of what was counted before


@dataclass
class Costs:
    """Of one pool's programs, by width: seconds of a step, and of the first call, in which it is compiled."""

    step: dict[int, float] = field(default_factory=dict)
    first: dict[int, float] = field(default_factory=dict)

    def of(self, width: int) -> float:
        """Seconds of a step: as measured, or between narrower and wider ones, or as many as single ones take."""
        if width in self.step or len(self.step) < 2:
            return self.step.get(width, width * self.step.get(1, 0.0))
        return float(np.interp(width, sorted(self.step), [self.step[each] for each in sorted(self.step)]))


_COSTS: dict[Hashable, Costs] = {}  # of this process


@dataclass
class _Pool:
    """What one pool has drawn and measured."""

    costs: Costs
    width: int = 1
    seconds: float = 0.0  # of its steps, about
    lost: float = 0.0  # of them by trying
    steps: int = 0
    samples: int = 0
    again: int = _AFTER  # when to measure
    trial: list[tuple[int, bool]] = field(default_factory=list)  # probes to come: a width, and whether it counts
    found: dict[int, float] = field(default_factory=dict)
    foreseen: np.ndarray = field(default_factory=lambda: np.zeros(1 + len(WIDTHS)))  # tokens, and steps by width
    drawn: dict[int, np.ndarray] = field(default_factory=dict)  # by width: tokens, and steps that samples took
    more: dict[int, float] = field(default_factory=dict)  # times what was foreseen beyond one token

    def tokens(self, width: int) -> float:
        """Those of a sample that are expected of a step."""
        foreseen = self.foreseen[0] / max(self.foreseen[1 + WIDTHS.index(width)], 1e-9) if self.foreseen[0] else 1.0
        more = self.more.get(width, next(reversed(self.more.values()), 1.0))
        return min(float(width), 1 + more * max(foreseen - 1, _LEAST))

    def speed(self, width: int) -> float:
        """Tokens a second of a sample."""
        return (1.0 if width == 1 else self.tokens(width)) / self.costs.of(width)

    def affordable(self, width: int) -> bool:
        """Whether trying a width costs no more than it may."""
        tokens, one = self.tokens(width), self.costs.step[1]
        compiling = 0.0 if width in self.costs.first else max(2 * self.costs.first.get(1, 0.0), _COMPILING)
        loss = compiling + (1 + _PROBES) * _WIDE * max(self.costs.of(width) - tokens * one, 0.0)
        return self.lost + loss <= (_SHARE if tokens >= _PROMISING else _DOUBTFUL) * self.seconds

    def decide(self) -> None:
        """Chooses the width of the next steps, or begins a trial."""
        if 1 not in self.costs.step:
            if self.steps >= self.again:
                self.trial = [(1, True)] * _PROBES
            return
        again = self.steps >= self.again and self.width > 1
        if FEW not in self.costs.step or again:
            width = self.width if again else FEW
            if self.affordable(width):
                self.begin(width)
                return
        known = [width for width in WIDTHS if width in self.costs.step]
        best = max(WIDTHS if len(known) > 1 else known, key=self._worth)
        if best not in known:
            if self.affordable(best):
                self.begin(best)
                return
            best = max(known, key=self._worth)
        self.width = best

    def begin(self, width: int) -> None:
        """A trial. The first steps of a width do not count: its program may be compiled in them."""
        self.trial = [(width, False), *[(1, True), (width, True)] * _PROBES]
        self.found, self.again = {}, self.steps + _AGAIN

    def _worth(self, width: int) -> float:
        """The speed; the present width is left for what is more than a little faster."""
        return self.speed(width) * (_BETTER if width == 1 and self.width == 1 else 1.02 if width == self.width else 1.0)


_LEAST = 0.02  # tokens beyond one that a step is foreseen to have: more may come than is foreseen


class Pace:
    """The window of each pool of an engine.

    window: one of WINDOWS, or its number. program: what decides what a step costs, besides the pool's shape; None:
    measured here alone. Raises ValueError for another window.
    """

    def __init__(self, window: int | str, program: Hashable = None):
        if str(window) not in WINDOWS:
            raise ValueError(f"window: expected one of {', '.join(WINDOWS)}; found {window!r}")
        self._measured, self._program = window == "auto", program
        self.most = FEW if self._measured else int(window)
        self.first = 1 if self._measured else self.most  # what a pool begins with
        self.guesses = self.most > 1  # or may, later
        self._pools: dict[Shape, _Pool] = {}

    def next(self, shape: Shape, steps: int) -> tuple[int, int, bool]:
        """The width of the next steps of a pool, how many of `steps` to take, and whether they are a measurement."""
        if not self._measured:
            return self.most, steps, False
        pool = self._pool(shape)
        if not pool.trial:
            pool.decide()
        if pool.trial:
            width, _ = pool.trial[0]
            return width, min(steps, _ALONE if width == 1 else _WIDE), True
        pool.steps += steps
        pool.seconds += steps * pool.costs.of(pool.width)
        return pool.width, steps, False

    def expected(self, shape: Shape) -> float:
        """Tokens that a step of a pool gives a sample."""
        pool = self._pool(shape)
        width = pool.width if self._measured else self.most
        return 1.0 if width == 1 else pool.tokens(width)

    def called(self, shape: Shape, width: int, seconds: float) -> None:
        """Adds how long a call took to come back. Of a program's first one that is the compiler's time."""
        self._pool(shape).costs.first.setdefault(width, seconds)

    def took(self, shape: Shape, seconds: float, tokens: float, steps: int) -> None:
        """Adds a measurement: seconds of `steps` steps, and tokens that one of them gave a sample."""
        pool = self._pools[shape]
        width, counts = pool.trial.pop(0)
        steps = max(steps, 1)
        if counts:
            pool.found[width] = min(seconds / steps, pool.found.get(width, np.inf))
        pool.seconds += seconds
        pool.steps += steps
        if width > 1:
            pool.lost += max(seconds - steps * tokens * pool.costs.step[1], 0.0)
        if not pool.trial:
            pool.costs.step.update(pool.found)

    def drew(self, shape: Shape, width: int, tokens: int, steps: int, samples: int) -> None:
        """Adds what a chunk of a width gave: tokens, and steps that so many samples took for them."""
        if width == 1 or not self.guesses:
            return
        if self._measured and steps <= samples * _WIDE:  # a probe: its first step had no guesses
            tokens, steps = tokens - samples, steps - samples
        pool = self._pool(shape)
        count = pool.drawn[width] = pool.drawn.get(width, np.zeros(2)) * _KEEP[1] + (tokens, steps)
        foreseen = pool.foreseen[0] / pool.foreseen[1 + WIDTHS.index(width)] - 1 if pool.foreseen[0] else 0.0
        if count[1]:
            pool.more.pop(width, None)  # the last one used stands last
            pool.more[width] = (count[0] / count[1] - 1) / max(foreseen, _LEAST)

    def asks(self, shape: Shape) -> bool:
        """Whether the next sample that ends is for `saw`. Learning from each one would cost as much as it may bring."""
        if not self.guesses:
            return False
        pool = self._pool(shape)
        pool.samples += 1
        return pool.width > 1 or not self._measured or pool.samples <= _FIRST or pool.samples % _EACH == 0

    def saw(self, shape: Shape, tokens: int, images: Sequence[np.ndarray]) -> None:
        """Adds a sample: how many tokens it has, and which codes of its images would have been guessed, bool [codes].

        A step keeps what it draws first, and one more as long as the guess before was right: so a wrong guess ends one,
        and a right last one brings the end of the image, too.
        """
        ends = [np.flatnonzero(~right) for right in images]
        runs = [np.diff([-1, *end, len(right)]) for end, right in zip(ends, images, strict=True)]
        inside = sum(len(right) + 1 for right in images)
        others = max(tokens - inside, 0)
        steps = [others + sum(int(np.sum(-(-run // width))) for run in runs) for width in WIDTHS]
        pool = self._pool(shape)
        pool.foreseen = pool.foreseen * _KEEP[0] + (others + inside, *steps)

    def _pool(self, shape: Shape) -> _Pool:
        if (pool := self._pools.get(shape)) is None:
            costs = Costs() if self._program is None else _COSTS.setdefault((self._program, shape), Costs())
            pool = self._pools[shape] = _Pool(costs)
        return pool
