"""Chooses how many positions a pool draws at once: the number that the user set, or the fastest one.

A wider window takes fewer steps, but each step costs more. The number of saved steps depends on the model and on what
it draws. The cost of a step depends on the device and the batch.

The gain of a window can be estimated without using one. Codes that were drawn one by one show how many steps a window
would have taken: each right guess of `pairs.Pairs` saves a step. A real window gains more, because its draws after a
wrong guess serve as further guesses. How much more it gains is known only after a window was used. The cost of a step
is measured by timing a few steps. A few timed steps do not show everything that a window costs. So if a window seems
faster, it is compared in real work: the pool takes some chunks with the window and some without it, in turns, and the
measured speeds decide. A trial costs the timed steps and the compile time. A pool may spend only a small share of its
time on trials. So a short job tries no window. Engines with the same programs share their measurements. A window in use
is compared again after many steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ar_unified.model.attention import FEW
from ar_unified.sampling.steps import CHUNK, Shape

WIDTHS = (1, 2, 4, FEW)
WINDOWS = (*map(str, WIDTHS), "auto")
_AFTER = 2 * CHUNK  # steps that a pool takes before the first measurement
# Steps that are timed together: one-token steps, and wide steps. With these numbers, both timings take about equally
# long. Otherwise a busy machine would slow the longer timing more.
_ALONE, _WIDE = 16, 6
_PROBES = 3  # how often a width is timed, alternating with width 1; the fastest timing counts
_COMPILING = 5.0  # least seconds assumed for compiling, because the program of width 1 may have come from a cache
_BLOCK, _PAIRS = 4 * CHUNK, 5  # steps of a block, and number of pairs of blocks, in a comparison in real work
_HOPELESS = 0.8  # a comparison ends early below this speed, relative to drawing one by one
_RISK = 0.2  # assumed loss by a comparison, as a share of the time with the wider window
_AGAIN = 1024 * CHUNK  # steps until a window in use is compared again
_SHARE, _DOUBTFUL = 0.02, 0.004  # share of a pool's time for trials, with and without an expected gain
_PROMISING = 1.3  # if at least this many tokens a step are expected, the greater share is allowed
_BETTER = 1.1  # a window must be this many times faster than drawing one by one
# Without a window, saw() gets the first 32 samples, then every 64th, because each call takes a fifth of the time
# that drawing a small image takes.
_FIRST, _EACH = 32, 64
_DECIDING = 4 * CHUNK  # steps between two decisions; a decision takes 1 % of the time to draw a small image
_KEEP = 0.97, 0.9  # earlier counts are multiplied by these factors at each sample and at each chunk


@dataclass
class Costs:
    """Costs of one pool's programs by width: seconds of a step, and of the first call, which includes compiling.

    Attributes:
        used: the widths that were compared in real work. The cost of their steps includes everything that a window
            costs.
    """

    step: dict[int, float] = field(default_factory=dict)
    first: dict[int, float] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)

    def of(self, width: int) -> float:
        """Seconds of a step: as measured, else interpolated between a narrower and a wider one. If only width 1 was
        measured, a step is assumed to take `width` times as long."""
        if width in self.step or len(self.step) < 2:
            return self.step.get(width, width * self.step.get(1, 0.0))
        return float(np.interp(width, sorted(self.step), [self.step[each] for each in sorted(self.step)]))


_COSTS: dict[Hashable, Costs] = {}  # as measured in this process


class _Comparison:
    """Compares drawing with a width to drawing one by one, in real work. The pool takes blocks of chunks with the width
    and blocks with width 1, in turns.

    A block's first chunk does not count, because it includes the change of the width.

    Attributes:
        turns: widths of the blocks to come, beginning with the present one.
        lost: how many seconds longer the width's blocks took than drawing their tokens one by one would have taken.
    """

    def __init__(self, width: int):
        self.width, self.turns = width, [1, width, width, 1] * (_PAIRS // 2) + [1, width] * (_PAIRS % 2)
        self.lost = 0.0
        self._steps, self._sums = 0.0, np.zeros(2)  # of the present block; the sums are of tokens and seconds
        self._blocks: dict[int, list[np.ndarray]] = {1: [], width: []}

    def add(self, width: int, steps: float, tokens: int, seconds: float) -> None:
        """Adds a chunk: its steps, its tokens, and the seconds since the end of the previous chunk. Both chunks have
        the same width.
        """
        if width != self.turns[0]:
            return
        self._steps, self._sums = self._steps + steps, self._sums + (tokens, seconds)
        if self._steps < _BLOCK:
            return
        self._blocks[self.turns.pop(0)].append(self._sums)
        self._steps, self._sums = 0.0, np.zeros(2)
        alone, wide = (np.sum(self._blocks[each], axis=0) for each in (1, self.width))
        if self._ratios:
            self.lost = max(wide[1] - wide[0] * alone[1] / alone[0], 0.0)
            if self.speed < _HOPELESS:
                self.turns = []

    @property
    def _ratios(self) -> list[float]:
        pairs = zip(self._blocks[1], self._blocks[self.width], strict=False)
        return [(wide[0] / wide[1]) / (alone[0] / alone[1]) for alone, wide in pairs]

    @property
    def speed(self) -> float:
        """The speed of the width, relative to drawing one by one: the median over the pairs of blocks."""
        return statistics.median(self._ratios)


@dataclass
class _Pool:
    """What one pool has drawn and measured."""

    costs: Costs
    width: int = 1
    seconds: float = 0.0  # about how long its steps took
    lost: float = 0.0  # the part of these seconds that trials lost
    steps: int = 0
    samples: int = 0
    again: int = _AFTER  # the step from which to time width 1, and later to compare the width in use
    # timings to come: a width, and whether the timing counts
    trial: list[tuple[int, bool]] = field(default_factory=list)
    found: dict[int, float] = field(default_factory=dict)
    comparison: _Comparison | None = None
    decision: int = 0  # the step from which to decide again
    # The tokens, and the steps that each width would take for them.
    foreseen: np.ndarray = field(default_factory=lambda: np.zeros(1 + len(WIDTHS)))
    drawn: dict[int, np.ndarray] = field(default_factory=dict)  # by width: tokens, and steps that samples took
    # By width: the measured gain divided by the expected gain. The gain is the tokens of a step beyond one.
    more: dict[int, float] = field(default_factory=dict)

    def tokens(self, width: int) -> float:
        """The expected tokens of a sample in one step."""
        foreseen = self.foreseen[0] / max(self.foreseen[1 + WIDTHS.index(width)], 1e-9) if self.foreseen[0] else 1.0
        more = self.more.get(width, next(reversed(self.more.values()), 1.0))
        return min(float(width), 1 + more * max(foreseen - 1, _LEAST))

    def speed(self, width: int) -> float:
        """The expected tokens that a sample gets in a second."""
        return (1.0 if width == 1 else self.tokens(width)) / self.costs.of(width)

    def affordable(self, width: int) -> bool:
        """Whether a trial of a width stays within the allowed share of time."""
        tokens, one = self.tokens(width), self.costs.step[1]
        compiling = 0.0 if width in self.costs.first else max(2 * self.costs.first.get(1, 0.0), _COMPILING)
        loss = compiling + (1 + _PROBES) * _WIDE * max(self.costs.of(width) - tokens * one, 0.0)
        return self._allowed(loss, tokens)

    def _allowed(self, loss: float, tokens: float) -> bool:
        return self.lost + loss <= (_SHARE if tokens >= _PROMISING else _DOUBTFUL) * self.seconds

    def decide(self) -> None:
        """Chooses the width of the next steps, or begins a trial."""
        if 1 not in self.costs.step:
            if self.steps >= self.again:
                self.trial = [(1, True)] * _PROBES
            return
        if FEW not in self.costs.step and self.affordable(FEW):
            self.begin(FEW)
            return
        if self.width > 1 and self.steps >= self.again:
            self.comparison = _Comparison(self.width)
            return
        known = [width for width in WIDTHS if width in self.costs.step]
        best = max(WIDTHS if len(known) > 1 else known, key=self._worth)
        if best not in known:
            if self.affordable(best):
                self.begin(best)
                return
            best = max(known, key=self._worth)
        if best > 1 and best not in self.costs.used:
            loss = _RISK * _PAIRS * _BLOCK * self.costs.of(best)
            if self._allowed(loss, self.tokens(best)):
                self.comparison = _Comparison(best)
                return
            best = max((width for width in known if width == 1 or width in self.costs.used), key=self._worth)
        if self.width == 1 < best:
            self.again = self.steps + _AGAIN
        self.width = best

    def begin(self, width: int) -> None:
        """Begins a trial. The first steps of a width do not count, because they may include compiling."""
        self.trial = [(width, False), *[(1, True), (width, True)] * _PROBES]
        self.found = {}

    def compared(self, comparison: _Comparison) -> None:
        """Uses the result of a comparison: sets the cost of a step of this width so that the expected speed equals the
        measured speed.
        """
        width = comparison.width
        self.costs.step[width] = self.tokens(width) * self.costs.step[1] / comparison.speed
        self.costs.used.add(width)
        self.lost += comparison.lost
        self.comparison, self.decision = None, 0
        self.again = self.steps + _AGAIN  # when to compare again, if the width stays in use

    def _worth(self, width: int) -> float:
        """The speed, with a bonus for the present width, so that only a clearly faster width replaces it."""
        return self.speed(width) * (_BETTER if width == 1 and self.width == 1 else 1.02 if width == self.width else 1.0)


# The least expected gain (tokens of a step beyond one). It is not 0, because the real gain may be higher than expected.
_LEAST = 0.02


class Pace:
    """The window of each pool of an engine.

    Args:
        window: one of WINDOWS; a width may also be an int.
        program: everything that the cost of a step depends on, except the pool's shape. Engines with an equal program
            share their measurements; None: shares with no other engine.
        clock: returns the present time in seconds.

    Raises ValueError for another window.
    """

    def __init__(self, window: int | str, program: Hashable = None, clock: Callable[[], float] = time.monotonic):
        if str(window) not in WINDOWS:
            raise ValueError(f"window: expected one of {', '.join(WINDOWS)}; found {window!r}")
        self._measured, self._program = window == "auto", program
        self.most = FEW if self._measured else int(window)
        self.first = 1 if self._measured else self.most  # the first width of a pool
        self.guesses = self.most > 1  # whether guesses are used now, or may be later
        self._pools: dict[Shape, _Pool] = {}
        self._clock = clock
        self._before: tuple[Shape, int, float] | None = None  # of the last chunk: pool, width, and time of its end

    def next(self, shape: Shape, steps: int) -> tuple[int, int, bool]:
        """The width of the next steps of a pool, how many of `steps` to take, and whether they are a measurement."""
        if not self._measured:
            return self.most, steps, False
        pool = self._pool(shape)
        if not pool.trial and pool.comparison is None and pool.steps >= pool.decision:
            pool.decision = pool.steps + _DECIDING
            pool.decide()
        if pool.trial:
            width, _ = pool.trial[0]
            return width, min(steps, _ALONE if width == 1 else _WIDE), True
        width = pool.comparison.turns[0] if pool.comparison else pool.width
        pool.steps += steps
        pool.seconds += steps * pool.costs.of(width)
        return width, steps, False

    def begins(self) -> None:
        """Must be called when a pool begins to draw. The time since the last chunk is then ignored."""
        self._before = None

    def expected(self, shape: Shape) -> float:
        """The expected tokens that a sample gets from a step of its pool."""
        pool = self._pool(shape)
        width = self.most
        if self._measured:
            width = pool.comparison.turns[0] if pool.comparison else pool.width
        return 1.0 if width == 1 else pool.tokens(width)

    def called(self, shape: Shape, width: int, seconds: float) -> None:
        """Adds how long a call took to return. For a program's first call, this is the compile time."""
        self._pool(shape).costs.first.setdefault(width, seconds)

    def took(self, shape: Shape, seconds: float, tokens: float, steps: int) -> None:
        """Adds a measurement: the seconds of `steps` steps, and the tokens that a sample got from one of them."""
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
            pool.decision = 0

    def drew(self, shape: Shape, width: int, tokens: int, steps: int, samples: int) -> None:
        """Adds the result of a chunk: its tokens, and the steps that its samples took for them."""
        if self._measured:
            before, self._before = self._before, (shape, width, self._clock())
            comparison = self._pool(shape).comparison
            if comparison and before and before[:2] == (shape, width):
                comparison.add(width, steps / max(samples, 1), tokens, self._before[2] - before[2])
                if not comparison.turns:
                    self._pool(shape).compared(comparison)
        if width == 1 or not self.guesses:
            return
        if self._measured and steps <= samples * _WIDE:  # a timing: its first step does not count, as it had no guesses
            tokens, steps = tokens - samples, steps - samples
        pool = self._pool(shape)
        count = pool.drawn[width] = pool.drawn.get(width, np.zeros(2)) * _KEEP[1] + (tokens, steps)
        foreseen = pool.foreseen[0] / pool.foreseen[1 + WIDTHS.index(width)] - 1 if pool.foreseen[0] else 0.0
        if count[1]:
            pool.more.pop(width, None)  # so that the last used width comes last
            pool.more[width] = (count[0] / count[1] - 1) / max(foreseen, _LEAST)

    def asks(self, shape: Shape) -> bool:
        """Whether `saw` needs the next finished sample. While the pool draws one by one, `saw` gets only some samples,
        because learning from all would cost as much as it may gain.
        """
        if not self.guesses:
            return False
        pool = self._pool(shape)
        pool.samples += 1
        return pool.width > 1 or not self._measured or pool.samples <= _FIRST or pool.samples % _EACH == 0

    def saw(self, shape: Shape, tokens: int, images: Sequence[np.ndarray]) -> None:
        """Adds a sample with `tokens` tokens. `images` tells for each of its images which codes would have been guessed
        right, bool [codes].

        A step keeps its first draw, and then one more draw after each right guess. A wrong guess ends the step. If the
        last code was guessed right, the step also draws the end of the image.
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
