"""Tries changes that may make a program fit. Each changes one thing.

Arithmetic rules out changes that do not free enough memory, because the sizes of parameters, optimizer state and
gradients are known exactly. All other changes are compiled, and the compiler's answer is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jax.sharding import Mesh

from ar_unified.model.remat import POLICIES
from ar_unified.planning.memory import at_least, memory
from ar_unified.planning.programs import OutOfMemory, Run, programs
from ar_unified.planning.targets import Target


class Trial(NamedTuple):
    """
    Attributes:
      change: the config keys with their new values, as on the command line.
      fits: whether the program fits with this change; None if it was not compiled, because arithmetic rules it out.
      peak: bytes per device: the compiler's number if the program was compiled, else the least that arithmetic allows.
    """

    change: str
    fits: bool | None
    peak: float | None


def trials(run: Run, mesh: Mesh, target: Target, job: str, say: Callable[[str], object]) -> Iterator[Trial]:
    """Yields a Trial for each change that applies. The changes that slow training down least come first. A program is
    compiled only if it may fit."""
    for change, variant, shape in _changes(run, mesh, job):
        try:
            other = target.mesh(shape)
            todo = programs(variant, other, job)
        except ValueError:  # the sizes do not divide each other, so this change cannot help
            continue
        capacity = target.hardware.hbm
        least = max(sum(at_least(program, variant).values()) for program in todo)
        if least > capacity:
            yield Trial(change, None, least)
            continue
        say(f"  trying {change} ...")
        try:
            peak = max(memory(program, program.compile(), variant, capacity).peak for program in todo)
            yield Trial(change, peak <= capacity, peak)
        except OutOfMemory as error:
            yield Trial(change, False, error.used)


def _changes(run: Run, mesh: Mesh, job: str) -> Iterator[tuple[str, Run, dict[str, int]]]:
    """Yields (what is changed, the changed run, the sizes of its mesh) for each change."""
    shape = dict(mesh.shape)
    rows = shape["data"] * shape["fsdp"]  # the number of devices that hold different rows
    if job == "sample":
        if run.requests % 2 == 0 and run.requests // 2 >= rows:
            yield f"config.sampling.batch_size={run.requests // 2}", _with(run, requests=run.requests // 2), shape
        yield f"config.sampling.max_length={run.max_length // 2}", _with(run, max_length=run.max_length // 2), shape
        if run.kv_dtype != "int8":
            yield "config.sampling.kv_dtype=int8", _with(run, kv_dtype="int8"), shape
        if run.weights_dtype is None:
            yield "config.sampling.weights_dtype=int8", _with(run, weights_dtype="int8"), shape
        if factor := next((f for f in (4, 2) if shape["data"] % f == 0), 0):
            tensor = shape["tensor"] * factor
            yield f"config.mesh.tensor={tensor}", run, shape | {"data": shape["data"] // factor, "tensor": tensor}
        return
    if run.model.remat != "offload":
        less = "full" if [*POLICIES].index(run.model.remat) < [*POLICIES].index("full") else "offload"
        yield f"config.model.remat={less}", _with(run, model=dataclasses.replace(run.model, remat=less)), shape
    smaller = run.loss_chunk // 4
    if smaller >= 128:
        yield f"config.loss.chunk={smaller}", _with(run, loss_chunk=smaller), shape
    each = run.batch_size // run.accumulation
    if each % 2 == 0 and each // 2 >= rows:
        more = run.accumulation * 2
        yield f"config.training.accumulation={more}", _with(run, accumulation=more), shape
        yield f"config.training.batch_size={run.batch_size // 2}", _with(run, batch_size=run.batch_size // 2), shape
    if shape["data"] > 1:
        factor = 2 if shape["data"] % 2 == 0 else shape["data"]
        wider = shape | {"data": shape["data"] // factor, "fsdp": shape["fsdp"] * factor}
        yield f"config.mesh.fsdp={wider['fsdp']}", run, wider
    for axis in ("data", "fsdp"):
        factor = next((f for f in (4, 2) if shape[axis] % f == 0), 0)
        if factor:
            cut = shape | {axis: shape[axis] // factor, "tensor": shape["tensor"] * factor}
            yield f"config.mesh.{axis}={cut[axis]} --config.mesh.tensor={cut['tensor']}", run, cut
            break


def _with(run: Run, **changes: object) -> Run:
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]
