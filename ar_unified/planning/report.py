"""A plan as text."""

from __future__ import annotations

from typing import Any

from ar_unified.manifests import Json
from ar_unified.planning.memory import PARTS
from ar_unified.planning.plan import PlanReport
from ar_unified.planning.roofline import ASSUMPTIONS


def size(n: float | None) -> str:
    """Bytes as text, in GiB or MiB."""
    if n is None:
        return "?"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n >= unit:
            return f"{n / unit:.2f} {name}"
    return f"{n:.0f} B"


def billions(n: float) -> str:
    """A count as text, in billions or millions."""
    return f"{n / 1e9:.2f}B" if n >= 1e8 else f"{n / 1e6:.2f}M"


def duration(seconds: float) -> str:
    """A time as text, in seconds or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def text(plan: PlanReport) -> str:
    """The whole plan, for a terminal."""
    mesh = " ".join(f"{axis}={n}" for axis, n in plan["mesh"].items())
    alone = f"{plan['processes']} separate processes, each with " if plan["processes"] > 1 else ""
    google = f" ({plan['google']} in Google's names, which count TensorCores)" if plan.get("google") else ""
    lines = [
        f"{plan['job']} on {plan['target']}: {plan['chips']} chips{google}, {alone}mesh {mesh}",
        f"  model: {billions(plan['model']['parameters'])} parameters, vocabulary {plan['model']['vocabulary']:,}, "
        f"remat {plan['model']['remat']}, {plan['model']['dtype']}",
        f"  batch: {', '.join(f'{k} {v:,}' if isinstance(v, int) else f'{k} {v}' for k, v in plan['batch'].items())}",
    ]
    if lora := plan.get("lora"):  # earlier versions did not write it
        lines.append(
            f"  LoRA: rank {lora['rank']} on {', '.join(lora['targets'])}; frozen matrices are {lora['base_dtype']}"
        )
    if plan["stand_in"]:
        lines.append(
            f"  {plan['stand_in']} stand in for the target. Memory is what XLA needs on CPUs, with XLA's attention in "
            "place of the kernel. The sharding and the collectives do not show the target's own optimisations"
        )
    lines += [f"  note: {warning}" for warning in plan["warnings"]]
    for program in plan["programs"]:
        lines += ["", *_program(program, plan)]
    if "refused" in plan:
        lines += ["", *_refused(plan["refused"])]
    if "search" in plan:
        lines += ["", *_search(plan["search"])]
    if plan["programs"]:
        lines += ["", "Assumed:", *(f"  - {each}" for each in ASSUMPTIONS), f"  - {plan['hardware']['source']}"]
    return "\n".join(lines)


def _program(program: dict[str, Any], plan: PlanReport) -> list[str]:
    where = program["memory"]
    lines = [f"{program['name']} (compiled in {program['compile_seconds']:.0f} s), per device"]
    if program["compiler_options"]:
        lines.append(f"  compiler options: {', '.join(f'{k}={v}' for k, v in program['compiler_options'].items())}")
    for name, n in where["parts"].items():
        lines.append(f"  {name:<14}{size(n):>12}   {PARTS[name]}")
    share = where["peak"] / where["capacity"]
    lines.append(f"  {'peak':<14}{size(where['peak']):>12}   {share:.0%} of {size(where['capacity'])}")
    if program["host"]:
        lines.append(
            f"  {'on the host':<14}{size(program['host']):>12}   from the compiler: what remat=offload keeps there"
        )
    unit = {"train": "a step", "prefill": "a batch", "decode": "a token of every row"}[program["name"]]
    lines.append(f"  collectives: what one device sends for {unit}")
    for row in program["collectives"]:
        if row["ici"] + row["dcn"] < 1e-4 * sum(program["sent"].values()):
            continue
        networks = [f"{size(row['ici'])} on ICI"] + ([f"{size(row['dcn'])} on DCN"] if row["dcn"] else [])
        lines.append(
            f"    {row['kind']:<19}{row['times']:>6} x over {row['over']} ({row['group']}): {', '.join(networks)}"
            + (f", {row['overlapped'] / (row['ici'] + row['dcn']):.0%} overlapped" if row["overlapped"] else "")
            + (f"; most for {'/'.join(row['source'].split('/')[-2:])}" if row.get("source") else "")
        )
    if not program["collectives"]:
        lines.append("    none")
    if program["loops_of_unknown_length"]:
        lines.append(
            f"    loops of unknown length: {program['loops_of_unknown_length']}; each is counted as one iteration"
        )
    flops = program["flops"]
    lines.append(
        f"  FLOPs of all devices: {flops['model']:.3g} for the model, {flops['executed']:.3g} with recomputation"
    )
    seconds = ", ".join(f"{name} {duration(s)}" for name, s in program["seconds"].items())
    alone = program["exposed"]
    lines.append(
        f"  time by resource: {seconds}; {duration(alone)} of the network's time do not overlap with computation"
    )
    low, high = program["mfu"]
    rate = program["tokens"]
    lines.append(
        f"  estimate: {duration(program['fastest'])} to {duration(program['slowest'])}, "
        f"{rate / program['slowest']:,.0f} to {rate / program['fastest']:,.0f} tokens/s"
        + (f", MFU {low:.0%} to {high:.0%}" if program["name"] == "train" else "")
        + f"; bound by {program['bound']}"
    )
    if "memory_share" in program:
        least, most = program["memory_share"]
        lines.append(
            f"  share of the memory roofline: {least:.0%} to {most:.0%} (weights and cache read once, rows full)"
        )
    if "images" in program:
        low, high = (each * plan["processes"] for each in program["images"])
        lines.append(
            f"  images of {program['image_tokens']:,} tokens: {low:.3g} to {high:.3g} per second by all processes, "
            "not counting the time for prompts"
        )
    if "scaling" in program:
        lines.append(f"  weak scaling: {_scaling(program['scaling'])}")
    return lines


def _scaling(scaling: dict[str, Json]) -> str:
    if scaling["largest"] == 0:
        return f"not bound by matmuls here: {scaling['breaks']}"
    reach = (
        "with any number of slices" if scaling["largest"] is None else f"up to {scaling['largest']:,} chips"
    ) + f" (a slice has at most {scaling['per_slice']:,})"
    return f"bound by matmuls {reach}; the first limit is {scaling['breaks']}"


def _search(search: dict[str, Any]) -> list[str]:
    lines = [f"search: {_settings(search['changes'])}", f"  {search['why']}"]
    for each in search["tried"]:
        if each["fits"]:
            low, high = each["mfu"]
            verdict = f"MFU {low:.0%} to {high:.0%} with {size(each['peak'])}"
        else:
            verdict = f"does not fit: {size(each['peak'])}"
        lines.append(f"    {_settings(each['changes'])}: {verdict}")
    return lines


def _settings(changes: dict[str, Json]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def _refused(refused: dict[str, Any]) -> list[str]:
    lines = [
        f"REFUSED: {refused['program']} does not fit: it needs {size(refused['used'])} of {size(refused['capacity'])}",
        f"  the compiler: {refused['message']}",
        f"  least memory by arithmetic: {', '.join(f'{name} {size(n)}' for name, n in refused['at_least'].items())}",
    ]
    if refused["trials"]:
        lines.append("  single changes that were tried:")
    for trial in refused["trials"]:
        if trial["fits"] is None:
            verdict = f"no: needs at least {size(trial['peak'])} (arithmetic; not compiled)"
        elif trial["fits"]:
            verdict = f"FITS with {size(trial['peak'])} (compiled)"
        else:
            verdict = f"no: {size(trial['peak'])} (the compiler's number)"
        lines.append(f"    --{trial['change']}: {verdict}")
    return lines
