"""What one iteration of a module's outermost loops does. In decoding, that is one step.

The TPU compiler writes its estimate of cycles beside each instruction, except for Pallas kernels, which are black boxes
to XLA. Their calls are counted instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ar_unified.planning.hlo import Instruction, bytes_of, called_by, parse, source_of, times_of

_COPIES = ("copy", "transpose", "reshape", "copy-start")
_MOVES = (*_COPIES, "parameter", "bitcast", "fusion")  # a fusion that has only these instructions computes nothing
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Copy(NamedTuple):
    """A copy of an array: its bytes per device, how often one iteration makes it, and the operation that needs it."""

    bytes: int
    times: int
    source: str


class Turn(NamedTuple):
    """
    Attributes:
      copies: the copies of arrays from one place in the device's memory to another, largest first.
      cycles: the compiler's estimate for everything except the kernels and the branches that are left out. 0 if the
        compiler makes no estimate; only the TPU compiler makes one.
      kernels: calls of Pallas kernels, by name.
    """

    copies: tuple[Copy, ...]
    cycles: int
    kernels: dict[str, int]


def turn(hlo: str, without: str = "") -> Turn:
    """Describes one iteration of the loops that the entry computation of a module runs.

    without: the name of a jax.named_scope whose conditionals are left out, such as "words" if only images are drawn.
    """
    computations, entry = parse(hlo)
    times, _ = times_of(computations, entry)
    bodies = [name for each in computations[entry] if each.opcode == "while" for name in called_by(each)]
    copies, cycles, kernels = [], 0, dict[str, int]()
    for name in _reached(computations, bodies, without):
        for each in computations[name]:
            if said := _CYCLES.search(each.rest):
                cycles += int(said.group(1)) * times[name]
            if each.opcode in _COPIES or (each.opcode == "fusion" and _moves(computations, each)):
                made = each.type.lstrip("(").partition("}")[0]
                if "S(" not in made:  # a move into another memory, written S(n), is a fetch, not a copy
                    copies.append(Copy(bytes_of(made.partition("{")[0]), times[name], source_of(each)))
            if 'custom_call_target="tpu_custom_call"' in each.rest:
                kernel = source_of(each).split("/")[-2]
                kernels[kernel] = kernels.get(kernel, 0) + times[name]
    return Turn(tuple(sorted(copies, reverse=True)), cycles, kernels)


def _reached(computations: dict[str, list[Instruction]], names: list[str], without: str) -> Iterator[str]:
    """Yields the computations with these names and all computations that they run, each once. It does not look inside
    fusions."""

    def runs(each: Instruction) -> bool:
        left_out = without and each.opcode == "conditional" and f"/{without}/" in source_of(each)
        return each.opcode != "fusion" and not left_out

    seen, names = set[str](), list(names)
    while names:
        if (name := names.pop()) not in seen and name in computations:
            seen.add(name)
            yield name
            names += [called for each in computations[name] if runs(each) for called in called_by(each)]


def _moves(computations: dict[str, list[Instruction]], fusion: Instruction) -> bool:
    """Whether a fusion only copies."""
    inside = [each for name in called_by(fusion) for each in computations[name]]
    nested = [each for each in inside if each.opcode == "fusion"]
    alike = all(each.opcode in _MOVES for each in inside) and any(each.opcode in _COPIES for each in inside)
    return alike and all(_moves(computations, each) for each in nested)
