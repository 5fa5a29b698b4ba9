"""Finds the remat, rows per chip and mesh that train fastest on a target. It compiles a few candidates, and keeps the
best that fits.

Arithmetic orders the candidates: it leaves out those that cannot fit, and sorts the others by the estimated time per
token. Compiling shows two things that arithmetic does not know: the extra memory that the compiler needs, and the
collectives that it overlaps with computation. If one candidate does not fit, candidates that need more memory are not
tried.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ar_unified.manifests import Json
from ar_unified.model.remat import POLICIES
from ar_unified.planning import CANDIDATES
from ar_unified.planning.memory import at_least
from ar_unified.planning.plan import PlanReport, make_plan, with_a_kernel
from ar_unified.planning.programs import Run, train_program
from ar_unified.planning.roofline import roofline
from ar_unified.planning.scaling import CRITICAL_TOKENS
from ar_unified.planning.targets import Target

_ROWS, _FSDP = (1, 2, 3, 4), (0.5, 1, 2)  # factors that multiply the config's values


class Candidate(NamedTuple):
    """
    Attributes:
      changes: config keys and their new values.
      least: the least bytes per device, by arithmetic.
      seconds: the estimated seconds per token, without collectives.
    """

    changes: dict[str, Any]
    run: Run
    least: float
    seconds: float


def search(run: Run, target: Target, compiled: int = CANDIDATES, *, say: Callable[[str], Any] = print) -> PlanReport:
    """The plan of the best candidate, as from `make_plan`, with {"search": {"changes", "why", "tried"}} added.

    Args:
      compiled: how many candidates to compile. Each takes as long as a plan. If none of them fits, more are tried.

    Raises ValueError if arithmetic finds no candidate that fits both the mesh and the memory, or if no compiled
    candidate fits.
    """
    run = with_a_kernel(run, target)
    found = sorted(candidates(run, target), key=lambda each: each.seconds)
    fitting = [each for each in found if each.least <= target.hardware.hbm]
    if not fitting:
        least = min((each.least for each in found), default=0.0)
        raise ValueError(
            f"search: none of {len(found)} combinations of remat, rows and mesh fits {target.name}: the "
            f"smallest needs at least {least / 2**30:.1f} GiB, and a device has {target.hardware.hbm / 2**30:.1f} GiB; "
            "raise config.mesh.fsdp or config.mesh.tensor, or use a smaller model"
        )
    tried: list[dict[str, Json]] = []
    best: PlanReport | None = None
    too_large: list[Candidate] = []
    for each in fitting:
        if len(tried) >= compiled and best is not None:
            break
        if any(_needs_more(each, other) for other in too_large):
            continue
        say(f"{said(each.changes)}: at least {each.least / 2**30:.1f} GiB")
        plan = make_plan(each.run, target, advise=False, say=say)
        if not plan["fits"]:
            too_large.append(each)
        plan["search"] = {"changes": each.changes}
        tried.append({"changes": each.changes, "fits": plan["fits"], "least": each.least, **_numbers(plan)})
        if plan["fits"] and (best is None or _seconds(plan) < _seconds(best)):
            best = plan
    if best is None:
        raise ValueError(
            f"search: none of the {len(tried)} candidates that were compiled fits {target.name}: "
            "raise config.mesh.fsdp or config.mesh.tensor, or use a smaller model"
        )
    best["search"] |= {"why": _why(best, tried, len(found), len(fitting)), "tried": tried}
    return best


def candidates(run: Run, target: Target) -> Iterator[Candidate]:
    """All combinations that a mesh of the target can run, in no particular order."""
    for remat, rows, wider in itertools.product(POLICIES, _ROWS, _FSDP):
        fsdp = int(run.mesh.get("fsdp", 1) * wider)
        changes: dict[str, Any] = {
            "model.remat": remat,
            "training.batch_size": run.batch_size * rows,
            "mesh.fsdp": fsdp,
        }
        tokens = changes["training.batch_size"] * run.sequence_length
        if fsdp < 1 or (rows > 1 and tokens > CRITICAL_TOKENS):
            continue
        other = dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, remat=remat),
            batch_size=changes["training.batch_size"],
            mesh={**run.mesh, "data": -1, "fsdp": fsdp},
        )
        try:
            program = train_program(other, target.mesh(other.mesh))
        except ValueError:  # the sizes do not divide each other
            continue
        seconds = roofline(program, other, target.hardware, []).slowest / tokens
        yield Candidate(changes, other, sum(at_least(program, other).values()), seconds)


def said(changes: dict[str, Json]) -> str:
    """Changes of a config, as command-line flags."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def _needs_more(each: Candidate, other: Candidate) -> bool:
    """Whether a candidate is at least as large as `other`, which did not fit. It is if it needs at least as much memory
    (by arithmetic), has at least as many rows, and is split over no more devices (fsdp) than `other`.
    """
    return (
        each.least >= other.least
        and each.run.batch_size >= other.run.batch_size
        and each.changes["mesh.fsdp"] <= other.changes["mesh.fsdp"]
    )


def _seconds(plan: PlanReport) -> float:
    """Seconds per token, halfway between the fastest and the slowest estimate."""
    (program,) = plan["programs"]
    return (program["fastest"] + program["slowest"]) / 2 / program["tokens"]


def _numbers(plan: PlanReport) -> dict[str, Json]:
    if not plan["fits"]:
        return {"peak": plan["refused"]["used"], "mfu": None}
    (program,) = plan["programs"]
    return {"peak": program["memory"]["peak"], "mfu": program["mfu"], "exposed": program["exposed"]}


def _why(best: PlanReport, tried: list[dict[str, Any]], all: int, fitting: int) -> str:
    fits = [each for each in tried if each["fits"]]
    low, high = best["programs"][0]["mfu"]
    others = [each for each in fits if each["changes"] != best["search"]["changes"]]
    beside = f"; the next one has at least {max(each['mfu'][0] for each in others):.0%}" if others else ""
    return (
        f"{fitting} of {all} combinations may fit by arithmetic; of these, the {len(tried)} with the least time per "
        f"token were compiled, and {len(fits)} fit; this one has the highest MFU, {low:.0%} to {high:.0%}{beside}"
    )
