"""A plan as one self-contained page: charts of memory and of a step's time, and the text of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ar_unified.planning.memory import PARTS
from ar_unified.planning.plan import PlanReport
from ar_unified.planning.report import billions, duration, size, text
from ar_unified.workdir import write_text

_WIDTH, _BAR = 1000, 46  # SVG units


def write_page(path: str | Path, plan: PlanReport) -> None:
    """Writes the page, either completely or not at all."""
    title = f"{plan['job']} on {plan['target']}"
    sections = "".join(_program(program) for program in plan["programs"])
    if "refused" in plan:
        sections += _refused(plan["refused"])
    style = files("ar_unified.planning").joinpath("page.css").read_text(encoding="utf-8")
    mesh = ", ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1) or "one device"
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: ar_unified plan</title><style>{style}</style></head>
<body><main><h1>{escape(title)}</h1>
<p class="lead">{billions(plan["model"]["parameters"])} parameters on {plan["chips"]} chips, mesh {escape(mesh)}.
Compiled for this hardware; nothing was run.</p>
{sections}<h2>In words</h2><pre>{escape(text(plan))}</pre></main></body></html>
""",
    )


def _program(program: dict[str, Any]) -> str:
    where = program["memory"]
    verdict = f"{size(where['peak'])} of {size(where['capacity'])}"
    times = {name: seconds for name, seconds in program["seconds"].items() if seconds > 0}
    step = f"{duration(program['fastest'])} to {duration(program['slowest'])}"
    return (
        f"<h2>{escape(program['name'])}</h2>"
        f"<h3>Memory of a device: {verdict}</h3>{_stack(where['parts'], where['capacity'])}"
        f"<h3>Time of a step by resource: {step}</h3>{_bars(times)}"
    )


def _refused(refused: dict[str, Any]) -> str:
    trials = "".join(
        f"<tr><td><code>--{escape(trial['change'])}</code></td><td>{size(trial['peak'])}</td>"
        f"<td>{'fits' if trial['fits'] else 'does not fit'}"
        f"{', by arithmetic' if trial['fits'] is None else ', compiled'}</td></tr>"
        for trial in refused["trials"]
    )
    return (
        f'<h2 class="bad">{escape(refused["program"])} does not fit</h2><p>{escape(refused["message"])}</p>'
        f"<h3>Least memory by arithmetic</h3>{_stack(refused['at_least'], refused['capacity'])}"
        + (f"<h3>Single changes</h3><table>{trials}</table>" if trials else "")
    )


def _stack(parts: Mapping[str, float], capacity: float) -> str:
    """One bar of consecutive parts, with a mark where the device's memory ends."""
    whole = max(capacity, sum(parts.values())) or 1
    at, boxes, legend = 0.0, [], []
    for name, n in parts.items():
        colour = f"var(--c{list(PARTS).index(name)})"
        width = _WIDTH * n / whole
        tip = escape(f"{name}: {size(n)} ({PARTS[name]})")
        boxes.append(
            f'<rect x="{at:.1f}" width="{width:.1f}" height="{_BAR}" style="fill:{colour}"><title>{tip}</title></rect>'
        )
        legend.append(f'<span title="{tip}"><b style="background:{colour}"></b>{name} <em>{size(n)}</em></span>')
        at += width
    end = _WIDTH * capacity / whole
    frame = f'<rect class="device" width="{end:.1f}" height="{_BAR}"/><path class="end" d="M{end:.1f} -4V{_BAR + 4}"/>'
    label = f"where memory goes: {', '.join(f'{name} {size(n)}' for name, n in parts.items())}"
    return (
        f'<svg viewBox="-2 -6 {_WIDTH + 4} {_BAR + 12}" role="img" aria-label="{escape(label)}">{frame}{"".join(boxes)}'
        f'<path class="end" d="M{end:.1f} -4V{_BAR + 4}"/></svg><div class="legend">{"".join(legend)}</div>'
    )


def _bars(times: Mapping[str, float]) -> str:
    longest = max(times.values(), default=1.0)
    rows = "".join(
        f'<div class="row"><span>{escape(name)}</span><div><b style="width:{100 * seconds / longest:.1f}%"></b></div>'
        f"<em>{duration(seconds)}</em></div>"
        for name, seconds in times.items()
    )
    return f'<div class="times">{rows}</div>'
