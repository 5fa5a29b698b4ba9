"""The backward kernels of attention as libtpu schedules them: cycles of a layer, with one kernel and with two.

    PYTHONPATH=.:tokenizers python experiments/benchmarks/attention_cycles.py [--targets v5p v6e] [CASE ...]

libtpu compiles the kernels on this machine's CPU and writes their schedules, one line for each instruction bundle. The
cycles of a piece of a kernel are its bundles or, if that is more, the time of its products, because the schedule does
not count how long a matrix unit is occupied. OCCUPIED has the cycles of one product instruction, from XLA's estimate of
a plain product. How often a piece runs follows from the documents of a row. Waiting for memory is left out. Nothing is
timed, because no TPU is used. A case takes about a minute for each target.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
OCCUPIED = {"v5e": 16, "v5p": 16, "v6e": 8, "tpu7x": 8}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row on one device: N query heads, K KV heads, T queries in documents of this many tokens. If `before`, there
    are as many keys, and all precede the queries, as in most rounds of ring attention.
    """

    N: int
    K: int
    T: int
    document: int
    before: bool = False
    H: int = 128

    def seen(self) -> np.ndarray:
        """Whether a query sees a key, bool [T, S]."""
        t = np.arange(self.T)[:, None]
        return (t >= t.T) & (t // self.document == t.T // self.document) if not self.before else t >= 0 * t.T


CASES = {
    "chameleon_7b": Case(32, 32, 4096, 4096),
    "chameleon_7b packed": Case(32, 32, 4096, 1024),
    "chameleon_34b": Case(64, 8, 4096, 4096),
    "emu3_8b": Case(32, 8, 8192, 8192),
    "lwm_7b ring": Case(32, 32, 4096, 131072, before=True),
}


class Piece(NamedTuple):
    """A part of a kernel that runs as a whole.

    Attributes:
      depth: the number of loops around it; the outermost is the loop over the grid.
      bundles: instruction bundles.
      products: instructions for the busiest matrix unit.
      powers, stores: other instructions.
    """

    depth: int
    bundles: int
    products: int
    powers: int
    stores: int


def pieces(schedule: str) -> Iterator[Piece]:
    """The pieces of a kernel inside the loop over its grid, from the text of its final bundles."""
    found: list[tuple[int, list[str]]] = []
    for line in schedule.splitlines():
        said = re.match(r"\s*(?:0x[0-9a-f]+|0)\s*(\w\w)?\s*: (>*)", line)
        if said is None:
            continue
        label, depth = said[1], len(said[2])
        if found and (depth == 0 or (depth == found[-1][0] and not label)):
            found[-1][1].append(line)
        elif depth:
            found.append((depth, [line]))
    for depth, lines in found:
        text = "\n".join(lines)
        units = [len(re.findall(rf"vmatmul[\w.]*mxu{unit}\b", text)) for unit in range(4)]
        yield Piece(depth, len(lines), max(units), text.count("= vpow2"), len(re.findall(r"\bvst\b", text)))


def cycles(found: list[Piece], kernel: str, tile: dict[str, int], case: Case, occupied: int) -> float:
    """Cycles of one kernel for all heads of a row, on each core."""

    def of(some: list[Piece]) -> int:
        return sum(max(each.bundles, each.products * occupied) for each in some)

    queries, keys, heads = tile["queries"], tile["keys"], tile["heads"]
    blocks = case.seen().reshape(case.T // queries, queries, -1, keys)
    whole = blocks.all((1, 3)).sum()
    visits = blocks.any((1, 3)).sum()
    groups = case.N // heads
    loops = [i for i, each in enumerate(found) if each.powers > 0]
    assert len(loops) == 2 and found[loops[0]].depth == 2, [tuple(each) for each in found]
    masked, clean = (found[i] for i in loops)
    mask = found[loops[0] - 1]
    rest = [each for each in found if each not in (masked, clean, mask)]
    of_row = [each for each in rest if each.depth > 1]
    of_outer = [each for each in rest if each.depth == 1 and each.stores >= 64]
    always = [each for each in rest if each.depth == 1 and each.stores < 64]
    outer = case.T // (queries if kernel == "attention_dquery" else keys)
    writers = groups // tile["parts"] if kernel == "attention_dkey" else groups
    total = groups * (visits * of(always) + (visits - whole) * of([mask]))
    total += groups * heads * ((visits - whole) * of([masked]) + whole * of([clean]))
    total += writers * outer * of(of_outer) + groups * (case.T // queries) * of(of_row)
    return total / tile["cores"]


def compile_here(target: str, case: Case, two: bool) -> dict[str, Any]:
    """Compiles the backward pass and returns the tile of its kernels. Compiling is quicker for fewer heads. Four rows
    are too large for VMEM, in which XLA would place small arrays."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.topologies import get_topology_desc
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from ar_unified.kernels.attention import attention_gradients, blocks, tpu_steps

    if two:
        blocks.ROOM.update(dict.fromkeys(blocks.ROOM, 0))
    devices = get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target]).devices
    mesh = jax.make_mesh((1,), ("data",), devices=devices[:1], axis_types=(AxisType.Auto,))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def gradients(offset, q, k, lse, dout, doc_start):
        where = dict(q_offset=offset) if case.before else {}
        return attention_gradients(q, k, k, lse, lse, dout, doc_start=doc_start, backend="tpu", **where)

    q, k = (array(jnp.bfloat16, 4, case.T, heads, case.H) for heads in (16, 16 * case.K // case.N))
    lse, doc_start = array(jnp.float32, 4, case.T, 16), array(jnp.int32, 4, case.T)
    with jax.set_mesh(mesh):
        traced = jax.jit(gradients).trace(array(jnp.int32), q, k, lse, q, doc_start)
        traced.lower(lowering_platforms=("tpu",)).compile()
        tile = tpu_steps.backward_tile(q, k)
    return tile._asdict() | {"parts": tile.parts}


def schedules(target: str, name: str, two: bool) -> tuple[dict[str, int], dict[str, list[Piece]]]:
    """The tile, and the pieces of each kernel. Another process compiles, because libtpu reads its flags only once."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        )
        library = Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
        known = {"TPU_LIBRARY_PATH": str(library)} if library.exists() else {}
        environment = dict(os.environ, LIBTPU_INIT_ARGS=flags, JAX_PLATFORMS="cpu", **known)
        environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        command = [sys.executable, __file__, name, "--targets", target, "--compile", "two" if two else "one"]
        said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = {}
        for path in Path(folder).glob("*-attention_*final_bundles.txt"):
            kernel = re.search(r"-(attention_[a-z]+)", path.name)
            if kernel and "schedule-analysis" not in path.name:
                found[kernel[1]] = list(pieces(path.read_text()))
    return json.loads(said.splitlines()[-1]), found


def rows(target: str, name: str) -> Iterator[str]:
    """The rows of the table for all cases that have the shapes of this one."""
    compiled, case, occupied = [schedules(target, name, two) for two in (True, False)], CASES[name], OCCUPIED[target]
    for tile, kernels in compiled:
        for kernel, found in kernels.items():
            (head,) = [each for each in found if each.powers][-1:]
            print(f"{target} {kernel}: {tile}; a head of a clean step: {head}", file=sys.stderr)
    for other, like in CASES.items():
        if dataclasses.replace(like, document=0, before=False) == dataclasses.replace(case, document=0, before=False):
            numbers = [
                {kernel: cycles(found, kernel, tile, like, rate) / 1e6 for kernel, found in kernels.items()}
                for tile, kernels in compiled
                for rate in (occupied, 0)
            ]
            two, one = numbers[0], numbers[2]
            totals = [sum(each.values()) for each in numbers]
            yield (
                f"| {other} | {target} | {two['attention_dquery']:.2f}M + {two['attention_dkey']:.2f}M | "
                f"{sum(one.values()):.2f}M | {1 - totals[2] / totals[0]:.0%} | {1 - totals[3] / totals[1]:.0%} |"
            )


def main() -> None:
    """Prints a row of a table for each case and target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(CASES)}; default: all")
    parser.add_argument("--targets", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--compile", choices=("one", "two"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        print(json.dumps(compile_here(arguments.targets[0], CASES[arguments.cases[0]], arguments.compile == "two")))
        return
    print("| case | target | dQ + dK, dV | one kernel | saved | saved, bundles alone |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.cases or ("chameleon_7b", "chameleon_34b", "emu3_8b"):
        for target in arguments.targets:
            for row in rows(target, name):
                print(row, flush=True)


if __name__ == "__main__":
    main()
