"""How a device's memory is used: the compiler's total, and the parts that can be known.

The sizes of parameters, optimizer state, batch and cache are computed from their shardings and checked against the
compiler's argument size. For temporaries, the compiler gives one number. Gradients and the activations that the forward
pass keeps for backward are computed from shapes. What remains of the compiler's number is reported as "temporaries":
gathered weights, logits of a chunk, buffers of collectives, workspace.
"""

from __future__ import annotations

from typing import NamedTuple

from ar_unified.planning.programs import Compiled, Program, Run, gradient_bytes, local_bytes, saved_for_backward

# All parts that a program's memory may have, in the order in which they are shown, and the source of each number.
PARTS = {
    "parameters": "exact: shapes and shardings",
    "optimizer": "exact: shapes and shardings",
    "reference": "exact: shapes and shardings; the weights that a policy is compared with",
    "cache": "exact: shapes and shardings",
    "held": "exact: arrays that the program does not use. In training by rewards: the sampler's weights. In sampling: "
    "the head for scores, the prompts read so far and, while prompts are read, the pool",
    "inputs": "exact: shapes and shardings, with the padding of layouts",
    "gradients": "arithmetic: float32, for all trained parameters",
    "activations": "arithmetic: what JAX keeps of the forward pass for the backward pass",
    "temporaries": "the compiler's temporaries, without gradients and activations: gathered weights, logits, workspace",
    "outputs": "from the compiler: outputs that are not stored in place of an argument",
    "code": "from the compiler",
}


_EXACT = ("parameters", "optimizer", "reference", "cache")


class Memory(NamedTuple):
    """Bytes per device.

    Attributes:
      parts: bytes by name, with names from PARTS; they add up to `peak`.
      peak: the compiler's peak, plus the arrays in memory that the program does not use ("held").
      capacity: the device's memory.
    """

    parts: dict[str, float]
    peak: float
    capacity: float

    @property
    def fits(self) -> bool:
        """Whether the peak fits into a device's memory."""
        return self.peak <= self.capacity


def memory(program: Program, compiled: Compiled, run: Run, capacity: float) -> Memory:
    """The parts of a device's memory: exact sizes, estimates, and the rest of the compiler's total."""
    arguments = dict(program.local_bytes())
    parts: dict[str, float] = {name: arguments.pop(name) for name in _EXACT if name in arguments}
    parts["inputs"] = max(compiled.arguments - sum(parts.values()), 0)
    parts |= _held(program)
    rest = float(compiled.temporaries)
    if program.name == "train":
        for name, size in state_of_backward(program, run).items():
            parts[name] = min(size, rest)
            rest -= parts[name]
    parts |= {"temporaries": rest, "outputs": compiled.outputs - compiled.aliased, "code": compiled.code}
    parts = {name: parts[name] for name in PARTS if name in parts}
    return Memory(parts, float(sum(parts.values())), capacity)


def state_of_backward(program: Program, run: Run) -> dict[str, int]:
    """Bytes of gradients and kept activations per device, by arithmetic."""
    return {"gradients": gradient_bytes(run, program.mesh), "activations": saved_for_backward(run, program.mesh)}


def at_least(program: Program, run: Run) -> dict[str, float]:
    """The least memory that a program needs, in bytes per device, by arithmetic alone, without compiling it."""
    arguments = dict(program.local_bytes())
    parts: dict[str, float] = {name: arguments.pop(name) for name in _EXACT if name in arguments}
    parts |= _held(program) | {"inputs": sum(arguments.values())}
    return parts | (state_of_backward(program, run) if program.name == "train" else {})


def _held(program: Program) -> dict[str, float]:
    held = local_bytes(program.held)
    return {"held": held} if held else {}
