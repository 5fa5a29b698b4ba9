"""The text of an optimised HLO module: its instructions, and how often each of them runs in one run of the module.

This text is what will run on the device, after fusion, layout assignment and scheduling. An instruction inside a loop
counts once for each iteration.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a compiled module, parsed."""

    type: str
    opcode: str
    rest: str  # operands and attributes
    name: str


_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_NAMED = re.compile(r"^\s+(?:ROOT )?%?([^\s=]+) = ")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([^\s,}]+)")
_MANY_CALLED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif named := _NAMED.match(line):
            kind, rest = _split_type(line[named.end() :])
            opcode, _, rest = rest.partition("(")
            current.append(Instruction(kind, opcode, rest, named.group(1)))
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """Splits an instruction into its type, which comes first, and the rest. A tuple ends at its own parenthesis."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: at + 1], text[at + 2 :]
    raise ValueError(f"unfinished tuple type: {text[:80]}")


def bytes_of(kind: str, last: bool = False) -> int:
    """Bytes of a type. In a tuple, all arrays count. last: whether only the results count; this is for start
    instructions, whose type also includes the operands.
    """
    arrays = []
    for letters, bits, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", kind)):
        width = 8 if letters == "pred" else int(bits or 0)
        if width:
            arrays.append(math.prod(int(n) for n in shape.split(",") if n) * width // 8)
    if last and len(arrays) > 1:  # the arrays are operands, then results; a permute adds two u32 scalars
        arrays = [a for a in arrays if a > 4] or arrays
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def times_of(computations: dict[str, list[Instruction]], entry: str) -> tuple[dict[str, int], dict[str, bool]]:
    """How often one run of the module runs each computation, and whether that number is known."""
    times: dict[str, int] = defaultdict(int)
    known: dict[str, bool] = defaultdict(lambda: True)

    def visit(name: str, count: int, certain: bool) -> None:
        times[name] += count
        known[name] &= certain
        for each in computations.get(name, ()):
            if each.opcode in ("async-update", "async-done"):  # async-start has already called the computation
                continue
            turns = trips_of(each, computations) if each.opcode == "while" else 1
            for callee in called_by(each):
                visit(callee, count * (turns or 1), certain and turns is not None)

    visit(entry, 1, True)
    return times, known


def called_by(each: Instruction) -> list[str]:
    """The computations that an instruction runs: body and condition of a loop, all branches of a conditional."""
    called = CALLED.findall(each.rest)
    for names in _MANY_CALLED.findall(each.rest):
        called += [word.strip().lstrip("%") for word in names.split(",")]
    return called


def trips_of(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """The number of iterations of a loop. XLA states it, or else it is the constant with which the loop compares its
    counter (from 0, in steps of 1).

    If the condition compares anything else, the loop may end earlier. Then the number is not known, and the result is
    None.
    """
    if stated := re.search(r'"?known_trip_count"?:\{"n":"(\d+)"\}', loop.rest):
        return int(stated.group(1))
    condition = re.search(r"condition=%?([^\s,}]+)", loop.rest)
    if condition is None:
        return None
    names, bounds, compared = [condition.group(1)], [], []
    while names:
        for each in computations.get(names.pop(), ()):
            names += CALLED.findall(each.rest)
            if each.opcode == "constant" and each.type.startswith("s32[]"):
                bounds.append(int(each.rest.partition(")")[0]))
            if each.opcode == "compare":
                compared.append("direction=LT" in each.rest)
    return bounds[0] if len(bounds) == 1 and compared == [True] else None


def source_of(each: Instruction) -> str:
    """The name that JAX gave to the operation that an instruction comes from; "" if it gave none."""
    named = re.search(r'op_name="([^"]*)"', each.rest)
    return named.group(1) if named else ""
