"""How a TPU kernel of attention is cut into steps, and what all of these kernels do in a step.

B batch, T query position, S key position, N query heads, K KV heads, G = N / K, H head dim; in one step, r is one of
the query heads and p one of the KV heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_unified.kernels import device
from ar_unified.kernels.attention import visits as lists
from ar_unified.kernels.attention.blocks import VMEM, blocks, cores, room_for_sums
from ar_unified.kernels.attention.bounds import Bounds, key_ranges, query_ranges
from ar_unified.kernels.attention.spec import Spec

VISITS = 96 * 1024  # per call at most; they take three quarters of the scalar memory, which is 1 MiB on TPU v4 to 7


class Tile(NamedTuple):
    """Shapes of a call (without the batch) and of a step.

    Attributes:
      queries, keys, heads, kv_heads: numbers in a step; heads are query heads.
      cores: cores of a device.
      fused: whether one kernel computes all gradients. Then query heads of one KV head that are in different steps have
        sums of their own for the gradients of keys and values.
    """

    T: int
    S: int
    N: int
    K: int
    H: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    cores: int
    fused: bool = False

    @property
    def parts(self) -> int:
        """The number of steps for the query heads of one KV head."""
        return self.N * self.kv_heads // (self.K * self.heads)

    @property
    def padded(self) -> tuple[int, int]:
        """T and S, padded to whole blocks."""
        return self.T + -self.T % self.queries, self.S + -self.S % self.keys

    @property
    def query_sums(self) -> tuple[int, int, int, int]:
        """The shape of the float32 gradients of all queries of a row, transposed, for the heads of a step."""
        return self.padded[0] // self.queries, self.heads, self.H, self.queries

    def per_query(self, rows: int) -> jax.ShapeDtypeStruct:
        """The shape of an array with one number per query and head. Heads are grouped by step, so that a block has
        whole rows."""
        shape = (rows, self.N // self.heads, self.heads, self.padded[0])
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def visits(self, shift: int | None) -> int:
        """The largest number of visits that a row can need."""
        return lists.most(self.T, self.S, self.queries, self.keys, shift)

    def rows(self, spec: Spec, rows: int) -> int:
        """The number of rows in a call: the largest divisor of `rows` for which the visits fit into scalar memory."""
        most = VISITS // self.visits(spec.shift)
        return max(b for b in range(1, min(rows, most) + 1) if rows % b == 0)


def forward_tile(q: jax.Array, k: jax.Array) -> Tile:
    """The tile of the forward kernel, and of the backward kernels if there are two."""
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G = N // K
    # Without a TPU it is interpreted, or compiled for no particular target, with the smallest blocks.
    want = blocks(_kind(), "tpu", H, max(T, S), G, q.dtype.itemsize)
    queries, keys = min(want.block_q, T + -T % 128), min(want.block_k, S + -S % 128)  # whole rows of 128 lanes
    heads, kv_heads = next(each for each in _heads(N, K) if each[0] <= max(want.heads, 1))
    return Tile(T, S, N, K, H, queries, keys, heads, kv_heads, cores(_kind()))


def backward_tile(q: jax.Array, k: jax.Array) -> Tile:
    """The tile of backward. Backward is one fused kernel if VMEM has room. A step has as many heads as there is room
    for, but no more than a step of the forward kernel. If a single head has too little room, or if the heads cannot be
    shared evenly among the cores, backward has two kernels.
    """
    tile = forward_tile(q, k)
    for heads, kv_heads in _heads(tile.N, tile.K):
        fused = tile._replace(heads=heads, kv_heads=kv_heads, fused=True)
        small = heads <= tile.heads and 4 * math.prod(fused.query_sums) <= room_for_sums(_kind())
        if small and tile.N // heads % tile.cores == 0:
            return fused
    return tile


def _heads(N: int, K: int) -> Iterator[tuple[int, int]]:
    """Yields the numbers of query heads and of KV heads that a step may have, the largest first: all query heads of
    some KV heads, or some query heads of one KV head."""
    G = N // K
    yield from ((p * G, p) for p in range(K, 0, -1) if K % p == 0)
    yield from ((r, 1) for r in range(G - 1, 0, -1) if G % r == 0)


def _kind() -> str:
    """The kind of TPU; "cpu" if there is none."""
    kind = device.current().kind
    return kind if kind.startswith("TPU") else "cpu"


def list_visits(spec: Spec, forward: Tile, backward: Tile, bounds: Bounds) -> tuple[lists.Visits, lists.Visits]:
    """The visits that compute blocks of queries, and those that compute blocks of keys."""
    by_query = key_ranges(bounds, forward.S, forward.queries, forward.keys)
    by_key = query_ranges(by_query, -(-forward.S // forward.keys))
    rows = bounds.first.shape[0]

    def listed(outer, tile, outer_is_keys):
        # Whether a core would be idle if cores shared only heads.
        idle = tile.N // tile.heads // _inner(tile, outer_is_keys) % tile.cores and outer.begin.size >= tile.cores
        return lists.visits(
            outer,
            by_query,
            tile.visits(spec.shift) * rows,
            outer_is_keys=outer_is_keys,
            cores=tile.cores if idle else 1,
        )

    return listed(by_query, forward, False), listed(by_key, backward, True)


def _inner(tile: Tile, outer_is_keys: bool) -> int:
    """The size of a grid's innermost axis: the number of parts that add to the same gradients of keys and values."""
    return tile.parts if outer_is_keys and not tile.fused else 1


def call(
    kernel: Callable,
    spec: Spec,
    tile: Tile,
    visits: lists.Visits,
    ins: dict[str, jax.Array],
    outs: dict[str, jax.ShapeDtypeStruct],
    scratch: list[Any],
    *,
    outer_is_keys: bool = False,
) -> list[jax.Array]:
    """Runs a kernel over its visits. The name of an array determines how it is cut into blocks.

    Args:
      kernel: a function of tpu.py or tpu_backward.py. Its name begins with an underscore; a plan sees this name.
      scratch: shapes of float32 arrays, or other scratch as Pallas takes it.
      outer_is_keys: whether the visits are listed by blocks of keys.
    """
    parts = _inner(tile, outer_is_keys)
    heads = tile.N // tile.heads // parts
    cores = visits.cuts.size - 1

    def place(h, t, part, outer, inner, cuts):  # -> row, block of query heads, of queries, of KV heads, of keys
        at, _ = _entry(h // heads, t, cuts)
        own, other = lists.outer_block(outer[at]), lists.inner_block(inner[at])
        i, j = (other, own) if outer_is_keys else (own, other)
        n = h % heads * parts + part
        return lists.row(outer[at]), n, i, n // tile.parts, j

    def block(shape, index):
        return pl.BlockSpec(shape, lambda *at: index(*place(*at)))

    query = block((None, tile.heads, tile.queries, tile.H), lambda b, n, i, kv, j: (b, n, i, 0))
    key = block((None, tile.kv_heads, tile.keys, tile.H), lambda b, n, i, kv, j: (b, kv, j, 0))
    share = block((None, tile.kv_heads, tile.keys, tile.H), lambda b, n, i, kv, j: (b, n, j, 0))
    per_query = block((None, None, tile.heads, tile.queries), lambda b, n, i, kv, j: (b, n, 0, i))
    specs = dict(
        bounds=block((None, 2, tile.queries), lambda b, n, i, kv, j: (b, 0, i)),
        query=query, dout=query, key=key, value=key, lse=per_query, delta=per_query,
        key_share=share, value_share=share, by_copies=pl.BlockSpec(memory_space=pltpu.HBM),
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(kernel, spec, tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores * heads, visits.steps, parts),
            in_specs=[specs[name] for name in ins],
            out_specs=[specs[name] for name in outs],
            scratch_shapes=[pltpu.VMEM(x, jnp.float32) if isinstance(x, tuple) else x for x in scratch],
        ),
        out_shape=list(outs.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM + 4 * math.prod(tile.query_sums) if tile.fused else None,
        ),
        interpret=spec.interpret,
        name=f"attention{kernel.__name__}",
    )(*visits, *ins.values())


def visit(outer, inner, cuts):
    """The row, the outer block and the word of `inner` for this step. After the core's last visit the word is 0
    (nothing to do)."""
    at, live = _entry(pl.program_id(0) // (pl.num_programs(0) // (cuts.shape[0] - 1)), pl.program_id(1), cuts)
    return lists.row(outer[at]), lists.outer_block(outer[at]), jnp.where(live, inner[at], 0)


def _entry(core, step, cuts):
    """Returns (entry, active): the entry of a core at this step, and whether it is a visit. After its last visit a core
    stays at the last entry.
    """
    at, end = cuts[core] + step, cuts[core + 1]
    return jnp.minimum(at, end - 1), at < end


def each_head(tile: Tile) -> Callable[[Callable], None]:
    """Calls body(p, r) for each query head of a step. With two heads at a time, a step would take 4% fewer cycles by
    libtpu's schedules, but the kernel would take twice as long to compile."""

    def run(body: Callable) -> None:
        pl.loop(0, tile.heads)(lambda r: body(r * tile.kv_heads // tile.heads, r))

    return run


def masked_or_clean(add: Callable, word, tile: Tile, bounds, key_block) -> None:
    """Calls `add` with the mask, bool [S, T], if the step is at the left edge or at the diagonal. Calls it with None if
    all keys are seen."""

    @pl.when(word & lists.MASKED != 0)
    def _():
        s = key_block * tile.keys + jax.lax.broadcasted_iota(jnp.int32, (tile.keys, tile.queries), 0)
        add((bounds[0:1] <= s) & (s <= bounds[1:2]))

    @pl.when(word & lists.CLEAN != 0)
    def _():
        add(None)
