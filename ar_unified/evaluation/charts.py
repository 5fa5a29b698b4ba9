"""Line charts as self-contained HTML: SVG lines that stretch, with HTML labels above them, so that text keeps its size
on any screen.

Every chart is drawn twice, with a linear and a logarithmic y axis; a checkbox chooses one by CSS alone. The values
under the pointer come from the chart's `data-series` and a few lines of script (report.js); without the script
everything else works.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]  # (x, y), x ascending
MAX_POINTS = 240  # maximum number of points of a series; enough for a chart, whose width is a few hundred pixels


def line_chart(
    title: str, series: Mapping[str, Points], *, unit: str = "", log: bool = False, zero: bool = False
) -> str:
    """One figure with a line for each series. Empty series are left out; if all are empty, the result is "".

    Args:
        title: the heading.
        unit: the unit of y, shown next to the heading.
        series: (x, y) points by name; the names are the legend if there are several series.
        log: whether to show the logarithmic axis first (it exists only if all values are positive).
        zero: whether the linear axis begins at 0, for quantities whose ratio matters, such as speed.
    """
    lines = {name: _thin([(x, y) for x, y in points if math.isfinite(y)]) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    left, right = min(xs), max(xs)
    if left == right:
        left, right = left - 1, right + 1
    low, high = _y_range(lines, zero)
    positive = min(y for points in lines.values() for _, y in points) > 0
    x_ticks = [t for t in _ticks(left, right, 5) if left <= t <= right]
    x_labels = "".join(f'<i style="left:{_percent(t, left, right)}">{number(t)}</i>' for t in x_ticks)

    scales = [_scale("linear", lines, (left, right), (low, high), _ticks(low, high, 4), x_ticks, lambda y: y)]
    if positive:
        top = max(y for points in lines.values() for _, y in points)
        bottom = min(y for points in lines.values() for _, y in points)
        bounds = math.log(bottom) - 1e-3, math.log(top) + 1e-3
        scales.append(_scale("log", lines, (left, right), bounds, _log_ticks(bottom, top), x_ticks, math.log))
    checked = " checked" if log and positive else ""
    switch = f'<label class="switch"><input type="checkbox"{checked}> log</label>' if positive else ""
    one = len(lines) == 1
    legend = "".join(
        f'<span class="key"><b style="background:var(--c{i % 6})"></b>{"last" if one else escape(name)} '
        f"<em>{number(points[-1][1])}</em></span>"
        for i, (name, points) in enumerate(lines.items())
    )
    data = [
        [title if one else name, [[round(x, 6), float(f"{y:.5g}")] for x, y in points]]
        for name, points in lines.items()
    ]
    values = escape(json.dumps(data))
    heading = f"<h4>{escape(title)} <small>{escape(unit)}</small></h4>"
    return (
        f'<figure class="chart"><figcaption>{heading}{switch}</figcaption>'
        f'<div class="plot" data-x="{left},{right}" data-series="{values}">{"".join(scales)}'
        f'<div class="xs">{x_labels}</div><div class="cursor" hidden></div><div class="tip" hidden></div>'
        f'</div><div class="legend">{legend}</div></figure>'
    )


def number(value: float) -> str:
    """A number short enough for a label: 0.00012 -> 1.2e-4, 12345 -> 12.3k."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 2e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for scale, suffix in ((1e6, "M"), (1e3, "k")):
        if size >= scale * (10 if scale == 1e3 else 1):
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.3g}"


def _scale(
    kind: str,
    lines: Mapping[str, Points],
    x: tuple[float, float],
    y: tuple[float, float],
    ticks: Sequence[float],
    x_ticks: Sequence[float],
    transform: Callable[[float], float],
) -> str:
    """Grid, labels and lines of one y axis. `y` is the range of the axis, after `transform`."""
    ticks = [t for t in ticks if y[0] <= transform(t) <= y[1]]
    labels = "".join(f'<i style="bottom:{_percent(transform(t), *y)}">{number(t)}</i>' for t in ticks)
    grid = "".join(f"M0 {_along(transform(t), y[1], y[0])}H1000" for t in ticks)
    grid += "".join(f"M{_along(t, *x)} 0V1000" for t in x_ticks)
    paths = "".join(
        f'<path style="stroke:var(--c{i % 6})" d="M{" ".join(_point(p, x, y, transform) for p in points)}'
        f'{"h0.01" if len(points) == 1 else ""}"/>'
        for i, points in enumerate(lines.values())
    )
    return (
        f'<div class="{kind}"><div class="ys">{labels}</div>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img">'
        f'<path class="grid" d="{grid}"/>{paths}</svg></div>'
    )


def _point(
    point: tuple[float, float],
    x: tuple[float, float],
    y: tuple[float, float],
    transform: Callable[[float], float],
) -> str:
    return f"{_along(point[0], *x)},{_along(transform(point[1]), y[1], y[0])}"


def _along(value: float, start: float, end: float) -> str:
    """The position of a value between `start` and `end`, in SVG units: 0 to 1000."""
    return f"{1000 * (value - start) / (end - start):.1f}"


def _percent(value: float, start: float, end: float) -> str:
    return f"{100 * (value - start) / (end - start):.2f}%"


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS of the points, including the first and the last."""
    if len(points) <= MAX_POINTS:
        return points
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(i * step)] for i in range(MAX_POINTS)]


def _y_range(lines: Mapping[str, Points], zero: bool) -> tuple[float, float]:
    """The range of the y axis, from the smallest to the largest value. The first points of each line do not count for
    the largest value, because they can be much larger than the rest.
    """
    low = 0.0 if zero else min(y for points in lines.values() for _, y in points)
    settled = [y for points in lines.values() for _, y in points[min(len(points) // 25, len(points) - 1) :]]
    high = max(settled)
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    # If no number is negative, the axis does not go below 0.
    return (low - margin if low < 0 or low - margin > 0 else 0.0), high + margin


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [m * 10.0**e for e in decades for m in fine if low <= m * 10.0**e <= high]
    return ticks if len(ticks) > 1 else _ticks(low, high, 3) if high > low else [low]
