"""Makes one plan, for a run, a target and a job. Everything that is reported comes from here, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ar_unified.manifests import Json
from ar_unified.model.config import parameter_count
from ar_unified.parallel.mesh import decoding_axes
from ar_unified.planning import advice
from ar_unified.planning.collectives import Collective, collectives, unknown_loops
from ar_unified.planning.memory import at_least, memory
from ar_unified.planning.programs import OutOfMemory, Program, Run, programs
from ar_unified.planning.roofline import roofline, traffic
from ar_unified.planning.scaling import scaling
from ar_unified.planning.targets import Target, TargetError

PlanReport = dict[str, Any]  # JSON values, described in `make_plan`


def make_plan(
    run: Run, target: Target, job: str = "train", *, advise: bool = True, say: Callable[[str], Any] = print
) -> PlanReport:
    """Compiles the programs of `job` for `target` and analyses them.

    Args:
      advise: whether to try changes that may help if a program does not fit. Each trial compiles again.
      say: called with a line of text before work that takes minutes.

    Returns:
      {"target", "chips", "google", "mesh", "job", "model", "lora", "stand_in", "warnings", "fits",
       "programs": [{"name", "compile_seconds", "memory", "collectives", "flops", "seconds", ...}],
       "refused": {"program", "message", "used", "capacity", "at_least", "trials"}, only if a program does not fit}.
      Bytes and seconds are per device and step. A step of prefill is one batch; a step of decode is one token of each
      row. Training is one program over all chips. For sampling, one process is planned, and "processes" says how many
      there are. Decode also has "memory_share" (the time that only reading weights and cache would take, as a share of
      the step's time) and "images" (images per second of one process). Both are [low, high]. They leave out prompts and
      assume that every row is as long as the cache.

    Raises ValueError if the sizes of mesh, batch and model do not divide each other, and TargetError if there is no
    such target or if the run asks for an attention kernel of other hardware.
    """
    # For sampling, one process is enough to plan, because each serves its own requests.
    part = target if job == "train" else target.process()
    mesh = part.mesh(run.mesh if job == "train" else decoding_axes(run.mesh))
    run = with_a_kernel(run, target)
    result: PlanReport = {
        "target": target.name,
        "hardware": {"source": target.hardware.source, "hbm": target.hardware.hbm, "flops": target.hardware.flops},
        "chips": target.chips,
        "google": target.google,
        "devices": mesh.size,
        "processes": target.chips // part.chips,
        "mesh": dict(mesh.shape),
        "job": job,
        "model": {
            "parameters": parameter_count(run.model),
            "vocabulary": run.model.vocab_size,
            "remat": run.model.remat,
            "dtype": run.model.dtype,
        },
        "lora": dataclasses.asdict(run.lora) if run.lora is not None and job == "train" else None,
        "batch": _batch(run, job),
        "stand_in": None if target.is_tpu else f"{mesh.size} CPU devices",
        "versions": {"jax": jax.__version__},
        "warnings": [],
        "programs": [],
        "fits": True,
    }
    for program in programs(run, mesh, job):
        say(f"compiling {program.name} for {target.name} ...")
        try:
            report = _report(program, run, target)
        except OutOfMemory as error:
            report = None
            result["refused"] = {"program": program.name, "message": str(error), "used": error.used}
            result["refused"]["capacity"] = error.capacity or target.hardware.hbm
        if report is not None:
            result["programs"].append(report)
            result["warnings"] += _warnings(report)
            if target.is_tpu and report["memory"]["peak"] > target.hardware.hbm:
                peak, hbm = report["memory"]["peak"], target.hardware.hbm
                message = f"the program compiles, but arguments and temporaries together need {peak / 2**30:.2f} GiB"
                result["refused"] = {"program": program.name, "message": message, "used": peak, "capacity": hbm}
        if "refused" in result:
            result["fits"] = False
            result["refused"]["at_least"] = at_least(program, run)
            found = advice.trials(run, mesh, part, job, say) if advise else ()
            result["refused"]["trials"] = [trial._asdict() for trial in found]
            break
    return result


def with_a_kernel(run: Run, target: Target) -> Run:
    """The run with an attention that can be compiled for the target. For GPUs, XLA's attention replaces the kernel,
    because the programs are compiled for CPUs instead of GPUs.
    """
    wanted, theirs = run.model.attention.removesuffix("_interpret"), "tpu" if target.is_tpu else "hopper"
    if wanted in ("tpu", "hopper") and wanted != theirs:
        raise TargetError(
            f"config.model.attention: expected auto, xla, reference or {theirs} for {target.name}; "
            f"found {run.model.attention!r}, which is a kernel for other hardware"
        )
    if wanted != "hopper":
        return run
    return dataclasses.replace(run, model=dataclasses.replace(run.model, attention="xla"))


def _batch(run: Run, job: str) -> dict[str, Json]:
    if job == "train":
        return {
            "rows": run.batch_size,
            "sequence_length": run.sequence_length,
            "accumulation": run.accumulation,
            "loss_chunk": run.loss_chunk,
            "document": min(run.document, run.sequence_length),
        }
    return {
        "requests": run.requests,
        "contexts": run.contexts,
        "cache": run.max_length,
        "kv_dtype": run.kv_dtype or run.model.dtype,
        "weights_dtype": run.weights_dtype or run.model.dtype,
        "prompt": run.max_length // 2,
    }


def _warnings(program: dict[str, Any]) -> list[str]:
    """Warnings about things in the compiled module that are allowed but expensive."""
    sent = {row["kind"]: row["ici"] + row["dcn"] for row in program["collectives"] if row["over"] == "fsdp"}
    reduced = sent.pop("all-reduce", 0.0)
    if reduced <= sum(sent.values()) or program["name"] != "train":
        return []
    return [
        f"the compiler gathers weights and scatters gradients by all-reduces over fsdp ({reduced / 2**30:.0f} GiB), "
        "which send twice as many bytes as all-gathers and reduce-scatters. libtpu 0.0.42 does so if fsdp is a whole "
        "3-D slice. To avoid this, halve config.mesh.fsdp and set config.mesh.data=2"
    ]


def _report(program: Program, run: Run, target: Target) -> dict[str, Any]:
    compiled = program.compile()
    mesh, hardware = program.mesh, target.hardware
    found = collectives(compiled.hlo, mesh.size)
    where = memory(program, compiled, run, hardware.hbm)
    estimate = roofline(program, run, hardware, found)
    report: dict[str, Json] = {
        "name": program.name,
        "compile_seconds": round(compiled.seconds, 1),
        "compiler_options": dict(program.options),
        "memory": where._asdict(),
        "host": compiled.host,
        "collectives": _grouped(found, mesh, target),
        "loops_of_unknown_length": unknown_loops(compiled.hlo),
        "flops": {"model": estimate.model_flops, "executed": estimate.executed},
        "tokens": estimate.tokens,
        "sent": estimate.sent,
        "seconds": estimate.seconds,
        "exposed": estimate.exposed,
        "fastest": estimate.fastest,
        "slowest": estimate.slowest,
        "bound": estimate.bound,
        "mfu": [estimate.mfu(estimate.slowest), estimate.mfu(estimate.fastest)],
    }
    if program.name == "train":
        report["scaling"] = scaling(program, run, target, estimate)._asdict()
    if program.name == "decode":
        times = estimate.slowest, estimate.fastest
        report["memory_share"] = [estimate.seconds["memory"] / seconds for seconds in times]
        if run.vocabulary.codebook_size:
            block = int(run.layout.block(run.layout.height, run.layout.width))
            report["image_tokens"], report["images"] = block, [estimate.tokens / block / seconds for seconds in times]
    return report


def _grouped(found: Sequence[Collective], mesh: Mesh, target: Target) -> list[dict[str, Json]]:
    """Adds up the collectives of one kind over the same axes into one row. The row that sends most comes first."""
    rows: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for each in found:
        moved = traffic(each, mesh, target.hardware)
        axes = " x ".join(_axes(each.groups[0], mesh))
        sent = moved.ici + moved.dcn
        row = rows.setdefault((each.kind, axes, moved.dcn > 0), {"kind": each.kind, "over": axes})
        row["group"] = each.groups.shape[1]
        sums = {"times": each.times, "bytes": float(each.bytes * each.times), "ici": moved.ici, "dcn": moved.dcn}
        for name, n in (sums | {"overlapped": sent * each.overlapped}).items():
            row[name] = row.get(name, 0) + n
        if sent > row.get("most", 0.0):
            row |= {"most": sent, "source": each.source}
    return sorted(rows.values(), key=lambda row: -row["ici"] - row["dcn"])


def _axes(group: np.ndarray, mesh: Mesh) -> list[str]:
    """The mesh axes along which the devices of a group differ."""
    coordinates = np.array(np.unravel_index(group, mesh.devices.shape))
    return [axis for axis, along in zip(mesh.axis_names, coordinates, strict=True) if len(set(along)) > 1]
