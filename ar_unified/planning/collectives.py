"""The collectives of a compiled module: what each one moves, between which devices, and how often a step runs it.

They are read from the text of the optimised HLO, which is what will run. An instruction inside a loop counts once for
each iteration. Replica groups are positions in the mesh (row-major), in any of the three notations that XLA prints.

On TPUs, exchanges between slices are not written as collectives. Each device sends its share, already summed inside its
slice, to its host, and the host's runtime (megascale) does the rest. The send instruction names a collective, and
is reported as that collective.

On tpu7x, the SparseCores run collectives while the TensorCore computes. Such a collective is in a computation of its
own, which a call-start instruction begins and a call-done instruction awaits. XLA writes async-start and async-done in
the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ar_unified.planning.hlo import CALLED, Instruction, bytes_of, called_by, parse, source_of, times_of, trips_of

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective instruction, per device.

    Attributes:
      kind: one of KINDS.
      bytes: the size of the whole array, which is the input of reduce-scatter and the output of all other kinds.
      groups: int [groups, size], the mesh positions of the devices that exchange data; for a permute, the pairs
        (source, target).
      times: how often a step runs it.
      known: False if it is in a loop whose length depends on data; such a loop counts as one iteration.
      overlapped: whether the compiler runs it at the same time as a matrix product or a kernel. This product is in the
        same fusion, or between its start and its done instruction, or between those of the call that runs it.
      source: the name of the operation that needs the collective (`hlo.source_of`).
    """

    kind: str
    bytes: int
    groups: np.ndarray
    times: int
    known: bool
    overlapped: bool
    source: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one step. In a ring it sends (n - 1) / n of the array, and twice as much for
        all-reduce."""
        n = self.groups.shape[1]
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        return self.bytes * self.times * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


def collectives(hlo: str, devices: int) -> list[Collective]:
    """The collectives of a module for `devices` devices. Those that connect fewer than two devices are left out.

    A collective that the TPU compiler overlaps appears in several fusions with the same channel, and is counted once.
    The channel alone does not identify a collective, because all collectives of shard_map share one channel.
    """
    computations, entry = parse(hlo)
    times, known = times_of(computations, entry)
    callers = {
        callee: (each, part)
        for part in computations.values()
        for each in part
        if not each.opcode.endswith(("-update", "-done"))  # a start instruction has called the computation
        for callee in CALLED.findall(each.rest)
    }
    found: dict[Any, Collective] = {}
    for name, instructions in computations.items():
        if not times[name]:
            continue
        for each in instructions:
            between = _BETWEEN_SLICES.search(each.rest) if each.opcode == "send" else None
            kind = between.group(2).lower().replace("_", "-") if between else each.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if between:  # slices are the outermost mesh axis
                groups = np.arange(devices).reshape(between.group(1).count(",") + 1, -1).T
                size = bytes_of(each.type.partition("]")[0] + "]")  # the type is (what is sent, context, token)
            else:
                groups = _groups(each.rest, devices, kind)
                size = bytes_of(each.type, last=each.opcode.endswith("-start") and kind != "all-reduce")
            if kind == "reduce-scatter":
                size *= groups.shape[1]
            # On TPUs, a fused reduce-scatter is written as an all-reduce in a fusion that keeps only this device's part
            # of the result.
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            if groups.shape[1] > 1:
                caller, around = callers.get(name, (None, ()))
                source = source_of(each) or (source_of(caller) if caller else "")
                start, among = (caller, around) if caller and caller.opcode.endswith("-start") else (each, instructions)
                overlapped = name.startswith("async_collective_fusion") or _beside(start, among, computations)
                channel = re.search(r"channel_id=(\d+)", each.rest)
                fused = caller is not None and caller.opcode == "fusion"
                key: Any = (name, len(found))
                if channel and (between or fused):
                    key = (bool(between), channel.group(1), kind, size, groups.tobytes(), source_of(each))
                if (before := found.get(key)) is not None:
                    overlapped |= before.overlapped
                    source = source or before.source
                    count = max(before.times, times[name])
                else:
                    count = times[name]
                found[key] = Collective(kind, size, groups, count, known[name], overlapped, source)
    return list(found.values())


def unknown_loops(hlo: str) -> int:
    """Counts the loops that run with an unknown number of iterations."""
    computations, entry = parse(hlo)
    times, _ = times_of(computations, entry)
    return sum(
        each.opcode == "while" and trips_of(each, computations) is None
        for name, instructions in computations.items()
        if times[name]
        for each in instructions
    )


def _beside(
    start: Instruction, instructions: Sequence[Instruction], computations: Mapping[str, Sequence[Instruction]]
) -> bool:
    """Whether there is a product or a kernel between a start and its done instruction, in the order of execution."""
    if not start.opcode.endswith("-start"):
        return False
    behind = instructions[instructions.index(start) + 1 :]
    done = re.compile(rf"%?{re.escape(start.name)}\b")
    for each in behind:
        if each.opcode.endswith("-done") and done.match(each.rest):
            return False
        if _computes(each, computations):
            return True
    return False


def _computes(each: Instruction, computations: Mapping[str, Sequence[Instruction]]) -> bool:
    """Whether an instruction is a matrix product, a loop or a Pallas kernel, or a fusion or call that has one."""
    if each.opcode in ("convolution", "dot", "while", "conditional"):
        return True
    if each.opcode == "custom-call":
        return 'custom_call_target="tpu_custom_call"' in each.rest
    inside = called_by(each) if each.opcode in ("fusion", "call") else []
    return any(_computes(part, computations) for name in inside for part in computations.get(name, ()))


# ---- which devices exchange ---------------------------------------------------------------------------------------


def _groups(rest: str, devices: int, kind: str) -> np.ndarray:
    """The groups of devices that exchange data, as mesh positions, int [groups, size]."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
        numbers = [int(n) for n in re.findall(r"\d+", pairs.group(1))] if pairs else []
        moved = np.array(numbers, int).reshape(-1, 2)
        moved = moved[moved[:, 0] != moved[:, 1]]
        return moved if len(moved) else np.zeros((1, 1), int)
    given = rest.partition("replica_groups=")[2]
    if given.startswith("mesh["):
        return _mesh_groups(given)
    if given.startswith("["):
        shape, _, order = given.partition("<=")
        return _iota(order, devices).reshape(_numbers(shape))
    listed = re.match(r"\{(\{[\d,{} ]*\})\}", given)
    if listed is None:
        return np.arange(devices)[None]  # {} means one group of all devices
    return np.array([_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", listed.group(1))])


def _mesh_groups(given: str) -> np.ndarray:
    """Reads mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(1)2}. A group spans only the axes in braces."""
    match = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", given)
    if match is None:
        raise ValueError(f"expected replica groups in one of XLA's notations, found {given[:120]}")
    axes, order, chosen = match.groups()
    named = re.findall(r"'?([^'=,]+)'?=(\d+)", axes)
    sizes = [int(size) for _, size in named]
    ids = _iota(order or "", math.prod(sizes)).reshape(-1)
    # Each axis is split into three: (before, chosen part, after). A part of an axis is written 'axis':(before)size.
    shape: list[int] = []
    inner: list[int] = []
    parts = {name: (int(pre or 1), int(size or 0)) for name, pre, size in _CHOSEN.findall(chosen)}
    for (name, _), size in zip(named, sizes, strict=True):
        pre, part = parts.get(name, (size, 1))
        part = part or size // pre
        inner.append(len(shape) + 1)
        shape += [pre, part, size // (pre * part)]
    outer = [axis for axis in range(len(shape)) if axis not in inner]
    count = math.prod(shape[axis] for axis in inner)
    return ids.reshape(shape).transpose([*outer, *inner]).reshape(-1, count)


_BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"')
_CHOSEN = re.compile(r"'?([^',:{}\s]+)'?(?::\((\d+)\)(\d+))?")


def _iota(order: str, devices: int) -> np.ndarray:
    """Reads [4,16]T(1,0), which means 0 .. 63 as 4 x 16 with the axes exchanged, or a plain list of ids. An empty text
    means ascending order.
    """
    if match := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        ids = np.arange(devices).reshape(_numbers(match.group(1)))
        return ids.transpose(_numbers(match.group(2))) if match.group(2) else ids
    numbers = _numbers(order)
    return np.array(numbers) if len(numbers) == devices else np.arange(devices)


def _numbers(text: str) -> Sequence[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
