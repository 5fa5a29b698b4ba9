"""Attention on TPU by Pallas (Mosaic): forward, dQ and dK/dV, without steps in which no query sees a key.

The grid of a kernel is a list (visits.py). For each block of queries, the list has an entry for each block of keys
that these queries see. Entries that add to the same sum are adjacent. Scalar prefetch passes the list to the index
maps, so blocks of other documents are neither fetched nor computed, and the pipeline never runs empty between two
documents. Two other ways are worse. A dense grid with clamped index maps pays for each empty step, and most steps are
empty for documents of 1k in a row of 8k. A loop inside the kernel with its own copies must fill its pipeline again for
each block of queries. The list costs scalar memory, 8 bytes per visit; if the rows of a batch do not all fit, they are
computed in groups.

A step computes several query heads, if possible all of one KV head. So keys are fetched and masks computed once for all
of them, and a step is long enough to hide its fixed cost even with the short blocks that documents need.

Scores are [S, T], so the numbers of a query (its bounds, maximum, log-sum-exp) lie along lanes and need not be copied
over 128 lanes. Exponentials have base 2. Except for float32, the scale and log2(e) multiply the H numbers of a query,
and not its S scores.

v4 and v5p have two cores, which share the first axis of a grid. If one step computes all heads of a device, this axis
has two entries, one for each half of the list.

B batch, T query position, S key position, N query heads, K KV heads, G = N / K, H head dim; in one step, r is one of
the query heads and p one of the KV heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from ar_unified.kernels import device
from ar_unified.kernels.attention import visits as lists
from ar_unified.kernels.attention.blocks import blocks, cores
from ar_unified.kernels.attention.bounds import Bounds, key_ranges, pad_queries, query_ranges
from ar_unified.kernels.attention.spec import Spec

HEAD_DIMS = (64, 128, 256)
VISITS = 96 * 1024  # per call at most; they take three quarters of the scalar memory, which is 1 MiB on TPU v4 to 7
_HIDDEN = -1e30  # the score of a key that is not seen; finite, so that a query that sees no key does not give NaN
_LOG2E = math.log2(math.e)


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Returns the reason why these shapes cannot be computed here, or None if they can."""
    if q.shape[-1] not in HEAD_DIMS:
        return f"expected a head dim of {', '.join(map(str, HEAD_DIMS))}; found {q.shape[-1]}"
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"expected queries and keys of bfloat16 or float32, both the same; found {q.dtype} and {k.dtype}"
    if (most := _tile(q, k).visits(None)) > VISITS:
        return f"{q.shape[1]} queries by {k.shape[1]} keys may take {most} steps; scalar memory has room for {VISITS}"
    return None


class Work(NamedTuple):
    """The bounds in the form that the kernels take. It is made once for all layers of a step, and used again in
    backward.

    Attributes:
      bounds: int32 [B, 2, T], padded to whole blocks.
      by_query, by_key: the visits in which blocks of queries (of keys) are the outer blocks, for each group of rows
        that one call computes.
    """

    bounds: jax.Array
    by_query: lists.Visits
    by_key: lists.Visits


def prepare(spec: Spec, q: jax.Array, k: jax.Array, bounds: Bounds) -> Work:
    """The `Work` of attention with these bounds, for queries and keys of these shapes."""
    tile = _tile(q, k)
    bounds = pad_queries(bounds, tile.padded[0], tile.S)
    groups = jax.tree.map(lambda x: x.reshape(-1, tile.rows(spec, len(x)), x.shape[1]), bounds)
    return Work(jnp.stack(bounds, 1), *jax.vmap(functools.partial(_visits, spec, tile))(groups))


def forward(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, work: Work) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, T, N, H] in the dtype of v, and log-sum-exp float32 [B, N, T]."""
    tile = _tile(q, k)
    state = (tile.heads, tile.queries)

    def rows(visits, bounds, query, key, value):
        ins = dict(bounds=bounds, query=query, key=key, value=value)
        outs = dict(query=_like(query, v.dtype), lse=tile.per_query(query.shape[0]))
        return _call(_forward, spec, tile, visits, ins, outs, [(tile.heads, tile.H, tile.queries), state, state])

    T, S = tile.padded
    ins = work.bounds, _lay(_scaled(spec, q), T), _lay(k, S), _lay(v, S)
    out, lse = _by_rows(rows, work.by_query, ins)
    return _unlay(out, tile.T), lse.reshape(*out.shape[:3])[..., : tile.T]


def backward(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    work: Work,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v; `delta` float32 [B, N, T] is sum(dout * out) over H, minus the gradient of `lse`."""
    tile = _tile(q, k)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse * _LOG2E)  # if a query sees nothing, its hidden scores get weight 0

    def rows(visits, bounds, query, key, value, lse, delta, dout):
        by_query, by_key = visits
        ins = dict(bounds=bounds, query=query, key=key, value=value, lse=lse, delta=delta, dout=dout)
        sums = (tile.kv_heads, tile.keys, tile.H)
        outs = dict(key=_like(key, k.dtype), value=_like(value, v.dtype))
        dk, dv = _call(_dkey, spec, tile, by_key, ins, outs, [sums, sums])
        outs = dict(query=_like(query, q.dtype))
        (dq,) = _call(_dquery, spec, tile, by_query, ins, outs, [(tile.heads, tile.H, tile.queries)])
        return dq, dk, dv

    T, S = tile.padded
    per_query = (
        jnp.pad(x, [(0, 0), (0, 0), (0, T - tile.T)]).reshape(tile.per_query(x.shape[0]).shape) for x in (lse, delta)
    )
    ins = work.bounds, _lay(_scaled(spec, q), T), _lay(k, S), _lay(v, S), *per_query, _lay(dout, T)
    dq, dk, dv = _by_rows(rows, (work.by_query, work.by_key), ins)
    return _unlay(dq, tile.T), _unlay(dk, tile.S), _unlay(dv, tile.S)


# ---- the kernels: query (scaled), dout, out, dq [r, T, H]; key, value, dk, dv [p, S, H]; lse, delta [r, T];
# bounds [2, T]; outer, inner, cuts of Visits -------------------------------------------------------------------------


def _forward(spec, tile, outer, inner, cuts, bounds, query, key, value, out, lse, sums, highest, total):
    word = _visit(outer, inner, cuts)[1]

    @pl.when(word & lists.FIRST != 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        highest[...] = jnp.full_like(highest, _HIDDEN / 2)  # above _HIDDEN, so that hidden scores get weight zero
        total[...] = jnp.zeros_like(total)

    def add(seen):
        @_each_head(tile)
        def _(p, r):
            scores, _ = _scores(spec, key[p], query[r], seen)
            before = highest[pl.ds(r, 1)]
            now = jnp.maximum(before, scores.max(0, keepdims=True))
            weights, shrink = jnp.exp2(scores - now), jnp.exp2(before - now)
            total[pl.ds(r, 1)] = total[pl.ds(r, 1)] * shrink + weights.sum(0, keepdims=True)
            sums[r] = sums[r] * shrink + _dot(value[p].T, weights.astype(value.dtype))
            highest[pl.ds(r, 1)] = now

    _masked_or_clean(add, word, tile, bounds, lists.inner_block(word))

    @pl.when(word & lists.LAST != 0)
    def _():
        some = total[...] > 0
        divisor = jnp.where(some, total[...], 1.0)
        lse[...] = jnp.where(some, highest[...] * (1 / _LOG2E) + jnp.log(divisor), -jnp.inf)
        for r in range(tile.heads):
            out[r] = (sums[r] / divisor[r : r + 1]).T.astype(out.dtype)


def _dquery(spec, tile, outer, inner, cuts, bounds, query, key, value, lse, delta, dout, dq, sums):
    word = _visit(outer, inner, cuts)[1]

    @pl.when(word & lists.FIRST != 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    def add(seen):
        @_each_head(tile)
        def _(p, r):
            _, dscores = _weights(spec, key[p], value[p], query[r], dout[r], lse[pl.ds(r, 1)], delta[pl.ds(r, 1)], seen)
            sums[r] += _dot(key[p].T, dscores.astype(key.dtype))

    _masked_or_clean(add, word, tile, bounds, lists.inner_block(word))

    @pl.when(word & lists.LAST != 0)
    def _():
        for r in range(tile.heads):
            dq[r] = (sums[r] * spec.scale).T.astype(dq.dtype)


def _dkey(spec, tile, outer, inner, cuts, bounds, query, key, value, lse, delta, dout, dk, dv, key_sums, value_sums):
    block, word = _visit(outer, inner, cuts)
    part = pl.program_id(2)

    @pl.when((word & lists.FIRST != 0) & (part == 0))
    def _():
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    def add(seen):
        @_each_head(tile)
        def _(p, r):
            weights, dscores = _weights(
                spec, key[p], value[p], query[r], dout[r], lse[pl.ds(r, 1)], delta[pl.ds(r, 1)], seen
            )
            value_sums[p] += _dot(weights.astype(dout.dtype), dout[r])
            key_sums[p] += _dot(dscores.astype(query.dtype), query[r])

    _masked_or_clean(add, word, tile, bounds, block)

    @pl.when((word & lists.LAST != 0) & (part == tile.parts - 1))
    def _():
        dk[...] = (key_sums[...] * (spec.scale / _factors(spec, query.dtype)[0])).astype(dk.dtype)
        dv[...] = value_sums[...].astype(dv.dtype)


def _visit(outer, inner, cuts):
    """The outer block of this step, and this step's word of `inner`, or 0 (nothing to do) after the core's last
    visit."""
    at, live = _entry(pl.program_id(0) // (pl.num_programs(0) // (cuts.shape[0] - 1)), pl.program_id(1), cuts)
    return lists.outer_block(outer[at]), jnp.where(live, inner[at], 0)


def _entry(core, step, cuts):
    """Returns (entry, active): the entry of a core at this step, and whether it is a visit. After its last visit a core
    stays at the last entry.
    """
    at, end = cuts[core] + step, cuts[core + 1]
    return jnp.minimum(at, end - 1), at < end


def _each_head(tile: _Tile) -> Callable[[Callable], None]:
    """Calls body(p, r) for each query head of a step. Two at a time would take 4% fewer cycles by libtpu's schedules,
    but twice as long to compile."""

    def run(body: Callable) -> None:
        pl.loop(0, tile.heads)(lambda r: body(r * tile.kv_heads // tile.heads, r))

    return run


def _masked_or_clean(add: Callable, word, tile: _Tile, bounds, key_block) -> None:
    """Calls `add` with the mask, bool [S, T], at the left edge and the diagonal; with None if all keys are seen."""

    @pl.when(word & lists.MASKED != 0)
    def _():
        s = key_block * tile.keys + jax.lax.broadcasted_iota(jnp.int32, (tile.keys, tile.queries), 0)
        add((bounds[0:1] <= s) & (s <= bounds[1:2]))

    @pl.when(word & lists.CLEAN != 0)
    def _():
        add(None)


def _factors(spec: Spec, dtype: DTypeLike) -> tuple[float, float]:
    """The factors for queries and for scores. With them, scores have base 2 or, with a soft cap, are the argument of
    tanh.

    float32 queries are not scaled, to avoid one more rounding: float32 is used when precision matters.
    """
    factor = spec.scale * _LOG2E if spec.soft_cap is None else spec.scale / spec.soft_cap
    return (1.0, factor) if dtype == jnp.float32 else (factor, 1.0)


def _scaled(spec: Spec, q: jax.Array) -> jax.Array:
    on_queries, _ = _factors(spec, q.dtype)
    return q if on_queries == 1.0 else (q.astype(jnp.float32) * on_queries).astype(q.dtype)


def _scores(spec, key, query, seen):
    """Scores times log2(e), [S, T], from scaled queries, and the derivative of the soft cap (None: 1)."""
    scores, slope = _dot(key, query, transposed=True), None
    if (on_scores := _factors(spec, query.dtype)[1]) != 1.0:
        scores *= on_scores
    if spec.soft_cap is not None:
        bent = jnp.tanh(scores)
        scores, slope = bent * (spec.soft_cap * _LOG2E), 1 - bent * bent
    return scores if seen is None else jnp.where(seen, scores, _HIDDEN), slope


def _weights(spec, key, value, query, dout, lse, delta, seen):
    """The softmax, and the gradient for scale * q k before the soft cap, both [S, T]. `lse` has base 2."""
    scores, slope = _scores(spec, key, query, seen)
    weights = jnp.exp2(scores - lse)
    dscores = weights * (_dot(value, dout, transposed=True) - delta)
    return weights, dscores if slope is None else dscores * slope


def _dot(a, b, transposed=False):
    """a @ b, or a @ b.T. Products of float32 inputs are computed in float32, without rounding them to bfloat16."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


# ---- how a call is cut into steps ----------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """Shapes of a call (without the batch) and of a step."""

    T: int
    S: int
    N: int
    K: int
    H: int
    queries: int  # in a step
    keys: int
    heads: int  # query heads in a step
    kv_heads: int
    cores: int  # of a device

    @property
    def parts(self) -> int:
        """How many steps the query heads of a KV head take."""
        return self.N * self.kv_heads // (self.K * self.heads)

    @property
    def padded(self) -> tuple[int, int]:
        """T and S, padded to whole blocks."""
        return self.T + -self.T % self.queries, self.S + -self.S % self.keys

    def per_query(self, rows: int) -> jax.ShapeDtypeStruct:
        """The shape of one number per query, grouped by the heads of a step, so that a block has whole rows."""
        shape = (rows, self.N // self.heads, self.heads, self.padded[0])
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def visits(self, shift: int | None) -> int:
        return lists.most(self.T, self.S, self.queries, self.keys, shift)

    def rows(self, spec: Spec, rows: int) -> int:
        """The number of rows in a call: the largest divisor of `rows` whose visits fit into scalar memory."""
        most = VISITS // self.visits(spec.shift)
        return max(b for b in range(1, min(rows, most) + 1) if rows % b == 0)


def _tile(q: jax.Array, k: jax.Array) -> _Tile:
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G = N // K
    # Without a TPU it is interpreted, or compiled for no particular target, with the smallest blocks.
    kind = device.current().kind
    want = blocks(kind if kind.startswith("TPU") else "cpu", "tpu", H, max(T, S), G, q.dtype.itemsize)
    queries, keys = min(want.block_q, T + -T % 128), min(want.block_k, S + -S % 128)  # whole rows of 128 lanes
    if want.heads <= G:
        heads, kv_heads = max(r for r in range(1, want.heads + 1) if G % r == 0), 1
    else:
        kv_heads = max(p for p in range(1, want.heads // G + 1) if K % p == 0)
        heads = kv_heads * G
    return _Tile(T, S, N, K, H, queries, keys, heads, kv_heads, cores(kind))


def _visits(spec: Spec, tile: _Tile, bounds: Bounds) -> tuple[lists.Visits, lists.Visits]:
    """The visits that compute blocks of queries, and those that compute blocks of keys."""
    by_query = key_ranges(bounds, tile.S, tile.queries, tile.keys)
    by_key = query_ranges(by_query, -(-tile.S // tile.keys))
    rows = bounds.first.shape[0]

    def listed(outer, heads, outer_is_keys):
        # Whether a core would be idle if cores shared only heads.
        idle = heads % tile.cores and outer.begin.size >= tile.cores
        return lists.visits(
            outer,
            by_query,
            tile.visits(spec.shift) * rows,
            outer_is_keys=outer_is_keys,
            cores=tile.cores if idle else 1,
        )

    return listed(by_query, tile.N // tile.heads, False), listed(by_key, tile.K // tile.kv_heads, True)


def _call(kernel, spec, tile, visits, ins: dict[str, jax.Array], outs: dict[str, jax.ShapeDtypeStruct], scratch):
    """Runs a kernel over its visits. The name of an array determines how it is cut into blocks."""
    outer_is_keys = kernel is _dkey

    heads, parts = (tile.K // tile.kv_heads, tile.parts) if outer_is_keys else (tile.N // tile.heads, 1)
    cores = visits.cuts.size - 1

    def place(h, t, part, outer, inner, cuts):  # -> row, block of query heads, of queries, of KV heads, of keys
        at, _ = _entry(h // heads, t, cuts)
        h = h % heads
        own, other = lists.outer_block(outer[at]), lists.inner_block(inner[at])
        i, j = (other, own) if outer_is_keys else (own, other)
        n, kv = (h * tile.parts + part, h) if outer_is_keys else (h, h // tile.parts)
        return lists.row(outer[at]), n, i, kv, j

    def block(shape, index):
        return pl.BlockSpec(shape, lambda *at: index(*place(*at)))

    query = block((None, tile.heads, tile.queries, tile.H), lambda b, n, i, kv, j: (b, n, i, 0))
    key = block((None, tile.kv_heads, tile.keys, tile.H), lambda b, n, i, kv, j: (b, kv, j, 0))
    per_query = block((None, None, tile.heads, tile.queries), lambda b, n, i, kv, j: (b, n, 0, i))
    specs = dict(
        bounds=block((None, 2, tile.queries), lambda b, n, i, kv, j: (b, 0, i)),
        query=query, dout=query, key=key, value=key, lse=per_query, delta=per_query,
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(kernel, spec, tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores * heads, visits.steps, parts),
            in_specs=[specs[name] for name in ins],
            out_specs=[specs[name] for name in outs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=list(outs.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=spec.interpret,
        name=f"attention{kernel.__name__}",
    )(*visits, *ins.values())


def _like(x: jax.Array, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype)


def _lay(x: jax.Array, length: int) -> jax.Array:
    """Changes [B, T, N, H] to [B, N, length, H], with zeros after T, because a weight of zero times an arbitrary value
    may be NaN.
    """
    x = jnp.moveaxis(x, 1, 2)
    return jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)]) if length > x.shape[2] else x


def _unlay(x: jax.Array, length: int) -> jax.Array:
    return jnp.moveaxis(x[:, :, :length], 2, 1)


def _by_rows(function: Callable, visits: Any, arrays: Any) -> Any:
    """Calls function(visits, *arrays) for one group of rows after the other. Given are arrays [B, ...] and visits
    [groups, ...]."""
    groups = len(jax.tree.leaves(visits)[0])
    if groups == 1:
        return function(jax.tree.map(lambda x: x[0], visits), *arrays)
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), arrays)
    outs = jax.lax.map(lambda each: function(each[0], *each[1]), (visits, split))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outs)
