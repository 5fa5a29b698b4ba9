"""Attention on TPU by Pallas (Mosaic), without steps in which no query sees a key.

The grid of a kernel is a list (visits.py). For each block of queries, the list has an entry for each block of keys
that these queries see. Entries that add to the same sum are adjacent. Scalar prefetch passes the list to the index
maps, so blocks of other documents are neither fetched nor computed, and the pipeline never runs empty between two
documents. Two other ways are worse. A dense grid with clamped index maps pays for each empty step, and most steps are
empty for documents of 1k in a row of 8k. A loop inside the kernel with its own copies must fill its pipeline again for
each block of queries. The list costs scalar memory, 8 bytes per visit; if the rows of a batch do not all fit, they are
computed in groups.

A step computes several query heads, if possible all of one KV head. So keys are fetched once and masks are computed
once for all these heads, and a step is long enough to hide its fixed cost even with the short blocks that documents
need.

Scores are [S, T], so the numbers of a query (its bounds, maximum, log-sum-exp) lie along lanes and need not be copied
over 128 lanes.

v4 and v5p have two cores, which share the first axis of a grid. If one step computes all heads of a device, this axis
has two entries, one for each half of the list.

tpu_steps.py     how a call is cut into steps
tpu_scores.py    the arithmetic of one head in a step
tpu_backward.py  the backward kernels

B batch, T query position, S key position, N query heads, K KV heads, H head dim; in one step, r is one of the query
heads and p one of the KV heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ar_unified.kernels.attention import tpu_steps as steps
from ar_unified.kernels.attention import visits as lists
from ar_unified.kernels.attention.bounds import Bounds, pad_queries
from ar_unified.kernels.attention.spec import Spec
from ar_unified.kernels.attention.tpu_backward import gradients
from ar_unified.kernels.attention.tpu_scores import HIDDEN, LOG2E, dot, scaled, scores_of

HEAD_DIMS = (64, 128, 256)


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Returns the reason why these shapes cannot be computed here, or None if they can."""
    if q.shape[-1] not in HEAD_DIMS:
        return f"expected a head dim of {', '.join(map(str, HEAD_DIMS))}; found {q.shape[-1]}"
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"expected queries and keys of bfloat16 or float32, both the same; found {q.dtype} and {k.dtype}"
    if (most := steps.forward_tile(q, k).visits(None)) > steps.VISITS:
        room = f"scalar memory has room for {steps.VISITS}"
        return f"{q.shape[1]} queries by {k.shape[1]} keys may take {most} steps; {room}"
    return None


def recomputed(q: jax.Array, k: jax.Array) -> int:
    """See `attention.recomputed`."""
    return 1 if steps.backward_tile(q, k).fused else 3


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
    tile, of_backward = steps.forward_tile(q, k), steps.backward_tile(q, k)
    bounds = pad_queries(bounds, tile.padded[0], tile.S)
    groups = jax.tree.map(lambda x: x.reshape(-1, tile.rows(spec, len(x)), x.shape[1]), bounds)
    return Work(jnp.stack(bounds, 1), *jax.vmap(lambda x: steps.list_visits(spec, tile, of_backward, x))(groups))


def forward(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, work: Work) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, T, N, H] in the dtype of v, and log-sum-exp float32 [B, N, T]."""
    tile = steps.forward_tile(q, k)
    state = (tile.heads, tile.queries)

    def rows(visits, bounds, query, key, value):
        ins = dict(bounds=bounds, query=query, key=key, value=value)
        outs = dict(query=jax.ShapeDtypeStruct(query.shape, v.dtype), lse=tile.per_query(query.shape[0]))
        return steps.call(_forward, spec, tile, visits, ins, outs, [(tile.heads, tile.H, tile.queries), state, state])

    T, S = tile.padded
    ins = work.bounds, _lay(scaled(spec, q), T), _lay(k, S), _lay(v, S)
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
    tile = steps.backward_tile(q, k)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse * LOG2E)  # if a query sees nothing, its hidden scores get weight 0

    def rows(visits, bounds, query, key, value, lse, delta, dout):
        ins = dict(bounds=bounds, query=query, key=key, value=value, lse=lse, delta=delta, dout=dout)
        by_query, by_key = visits
        return gradients(spec, tile, by_query, by_key, ins)

    T, S = tile.padded
    per_query = (
        jnp.pad(x, [(0, 0), (0, 0), (0, T - tile.T)]).reshape(tile.per_query(x.shape[0]).shape) for x in (lse, delta)
    )
    ins = work.bounds, _lay(scaled(spec, q), T), _lay(k, S), _lay(v, S), *per_query, _lay(dout, T)
    dq, dk, dv = _by_rows(rows, (work.by_query, work.by_key), ins)
    return _unlay(dq, tile.T), _unlay(dk, tile.S), _unlay(dv, tile.S)


# ---- the kernel: query (scaled), out [r, T, H]; key, value [p, S, H]; lse [r, T]; bounds [2, T]; outer, inner, cuts
# of Visits -----------------------------------------------------------------------------------------------------------


def _forward(spec, tile, outer, inner, cuts, bounds, query, key, value, out, lse, sums, highest, total):
    word = steps.visit(outer, inner, cuts)[2]

    @pl.when(word & lists.FIRST != 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        highest[...] = jnp.full_like(highest, HIDDEN / 2)  # above HIDDEN, so that hidden scores get weight zero
        total[...] = jnp.zeros_like(total)

    def add(seen):
        @steps.each_head(tile)
        def _(p, r):
            scores, _ = scores_of(spec, key[p], query[r], seen)
            before = highest[pl.ds(r, 1)]
            now = jnp.maximum(before, scores.max(0, keepdims=True))
            weights, shrink = jnp.exp2(scores - now), jnp.exp2(before - now)
            total[pl.ds(r, 1)] = total[pl.ds(r, 1)] * shrink + weights.sum(0, keepdims=True)
            sums[r] = sums[r] * shrink + dot(value[p].T, weights.astype(value.dtype))
            highest[pl.ds(r, 1)] = now

    steps.masked_or_clean(add, word, tile, bounds, lists.inner_block(word))

    @pl.when(word & lists.LAST != 0)
    def _():
        some = total[...] > 0
        divisor = jnp.where(some, total[...], 1.0)
        lse[...] = jnp.where(some, highest[...] * (1 / LOG2E) + jnp.log(divisor), -jnp.inf)
        for r in range(tile.heads):
            out[r] = (sums[r] / divisor[r : r + 1]).T.astype(out.dtype)


# ---- arrays as kernels take them -----------------------------------------------------------------------------------


def _lay(x: jax.Array, length: int) -> jax.Array:
    """Changes [B, T, N, H] to [B, N, length, H]. Positions from T on are zeros, because a weight of zero times an
    arbitrary value may be NaN.
    """
    x = jnp.moveaxis(x, 1, 2)
    return jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)]) if length > x.shape[2] else x


def _unlay(x: jax.Array, length: int) -> jax.Array:
    return jnp.moveaxis(x[:, :, :length], 2, 1)


def _by_rows(function: Callable, visits: Any, arrays: Any) -> Any:
    """Calls function(visits, *arrays) for one group of rows after the other. `arrays` are [B, ...], and `visits` are
    [groups, ...]."""
    groups = len(jax.tree.leaves(visits)[0])
    if groups == 1:
        return function(jax.tree.map(lambda x: x[0], visits), *arrays)
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), arrays)
    outs = jax.lax.map(lambda each: function(each[0], *each[1]), (visits, split))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outs)
