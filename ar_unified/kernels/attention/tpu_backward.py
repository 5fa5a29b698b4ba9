"""The backward kernels of attention on TPU.

Two kernels take seven products: `_dquery` walks the list of query blocks, `_dkey` the list of key blocks, and both
compute scores, weights and their gradients. `_backward` takes five products and walks the list of key blocks. It sums
the gradients of a block's keys and values until the block's last visit, as `_dkey` does. It sums the gradients of all
queries of a row until the row's last visit. These sums stay in VMEM, so nothing is read back from memory, and the order
of the additions is always the same. The kernel copies the gradients of queries out of VMEM itself, because a pipeline
would need two blocks that are each as large as the sums.

If VMEM has too little room for the queries of all G heads of a KV head, a step has fewer heads. Then each part of the
heads has its own sums for keys and values, which XLA adds. The two cores of a chip share the heads in the same way.

query (scaled), dout, dq [r, T, H]; key, value, dk, dv [p, S, H]; lse, delta [r, T]; bounds [2, T]; outer, inner, cuts
of Visits. `tpu_steps.py` explains the letters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_unified.kernels.attention import visits as lists
from ar_unified.kernels.attention.spec import Spec
from ar_unified.kernels.attention.tpu_scores import dot, factors, weights_of
from ar_unified.kernels.attention.tpu_steps import Tile, call, each_head, masked_or_clean, visit


def gradients(
    spec: Spec, tile: Tile, by_query: lists.Visits, by_key: lists.Visits, ins: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values. Each has the layout and the dtype of its input.

    ins: bounds, query (scaled), key, value, lse (with base 2), delta, dout, as `call` takes them.
    """
    query, key, value = (jax.ShapeDtypeStruct(ins[x].shape, ins[x].dtype) for x in ("query", "key", "value"))
    sums = (tile.kv_heads, tile.keys, tile.H)
    if not tile.fused:
        dk, dv = call(_dkey, spec, tile, by_key, ins, dict(key=key, value=value), [sums, sums], outer_is_keys=True)
        (dq,) = call(_dquery, spec, tile, by_query, ins, dict(query=query), [(tile.heads, tile.H, tile.queries)])
        return dq, dk, dv
    rows, _, *each = key.shape
    shares = [
        jax.ShapeDtypeStruct((rows, tile.K * tile.parts, *each), x.dtype if tile.parts == 1 else jnp.float32)
        for x in (key, value)
    ]
    buffers = pltpu.VMEM((2, tile.heads, tile.queries, tile.H), query.dtype)
    turned = pltpu.VMEM((tile.kv_heads, tile.H, tile.keys), key.dtype)
    scratch = [sums, sums, tile.query_sums, turned, buffers, pltpu.SemaphoreType.DMA((2,))]
    outs = dict(zip(("by_copies", "key_share", "value_share"), (query, *shares), strict=True))
    dq, dk, dv = call(_backward, spec, tile, by_key, ins, outs, scratch, outer_is_keys=True)
    if tile.parts > 1:
        dk, dv = (x.reshape(rows, tile.K, tile.parts, *each).sum(2) for x in (dk, dv))
    return dq, dk.astype(key.dtype), dv.astype(value.dtype)


def _dquery(spec, tile, outer, inner, cuts, bounds, query, key, value, lse, delta, dout, dq, sums):
    word = visit(outer, inner, cuts)[2]

    @pl.when(word & lists.FIRST != 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    def add(seen):
        @each_head(tile)
        def _(p, r):
            _, dscores = _weights(spec, p, r, query, key, value, lse, delta, dout, seen)
            sums[r] += dot(key[p].T, dscores.astype(key.dtype))

    masked_or_clean(add, word, tile, bounds, lists.inner_block(word))

    @pl.when(word & lists.LAST != 0)
    def _():
        for r in range(tile.heads):
            dq[r] = _of_query(spec, sums[r], dq.dtype)


def _dkey(spec, tile, outer, inner, cuts, bounds, query, key, value, lse, delta, dout, dk, dv, key_sums, value_sums):
    block, word = visit(outer, inner, cuts)[1:]
    part = pl.program_id(2)

    @pl.when((word & lists.FIRST != 0) & (part == 0))
    def _():
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    def add(seen):
        @each_head(tile)
        def _(p, r):
            weights, dscores = _weights(spec, p, r, query, key, value, lse, delta, dout, seen)
            value_sums[p] += dot(weights.astype(dout.dtype), dout[r])
            key_sums[p] += dot(dscores.astype(query.dtype), query[r])

    masked_or_clean(add, word, tile, bounds, block)

    @pl.when((word & lists.LAST != 0) & (part == tile.parts - 1))
    def _():
        dk[...] = _of_key(spec, key_sums[...], query.dtype).astype(dk.dtype)
        dv[...] = value_sums[...].astype(dv.dtype)


def _backward(
    spec, tile, outer, inner, cuts, bounds, query, key, value, lse, delta, dout,
    dq, dk, dv, key_sums, value_sums, query_sums, turned, buffers, sent,
):  # fmt: skip
    row, block, word = visit(outer, inner, cuts)
    i = lists.inner_block(word)
    n, query_blocks = pl.program_id(0), len(query_sums)

    # Every block of keys has a visit, so a row's first visit is of its first block, and its last of its last block.
    @pl.when((word & lists.FIRST != 0) & (block == 0))
    def _():
        @pl.loop(0, query_blocks)
        def _(i):
            query_sums[i] = jnp.zeros_like(query_sums[0])

    @pl.when(word & lists.FIRST != 0)
    def _():
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)
        for p in range(tile.kv_heads):
            turned[p] = key[p].T

    def add(seen):
        @each_head(tile)
        def _(p, r):
            weights, dscores = _weights(spec, p, r, query, key, value, lse, delta, dout, seen)
            dscores = dscores.astype(query.dtype)
            value_sums[p] += dot(weights.astype(dout.dtype), dout[r])
            key_sums[p] += dot(dscores, query[r])
            query_sums[i, r] += dot(turned[p], dscores)

    masked_or_clean(add, word, tile, bounds, block)

    @pl.when(word & lists.LAST != 0)
    def _():
        dk[...] = _of_key(spec, key_sums[...], query.dtype).astype(dk.dtype)
        dv[...] = value_sums[...].astype(dv.dtype)

    @pl.when((word & lists.LAST != 0) & (block == tile.padded[1] // tile.keys - 1))
    def _():
        def copy(i):
            there = dq.at[row, pl.ds(n * tile.heads, tile.heads), pl.ds(i * tile.queries, tile.queries)]
            return pltpu.make_async_copy(buffers.at[i % 2], there, sent.at[i % 2])

        @pl.loop(0, query_blocks)
        def _(i):
            @pl.when(i >= 2)
            def _():
                copy(i - 2).wait()

            for r in range(tile.heads):
                buffers[i % 2, r] = _of_query(spec, query_sums[i, r], buffers.dtype)
            copy(i).start()

        for i in range(max(query_blocks - 2, 0), query_blocks):
            copy(i).wait()


def _weights(spec, p, r, query, key, value, lse, delta, dout, seen):
    """Calls `weights_of` for query head r and KV head p."""
    return weights_of(spec, key[p], value[p], query[r], dout[r], lse[pl.ds(r, 1)], delta[pl.ds(r, 1)], seen)


def _of_query(spec, sums, dtype):
    """The gradient of queries, [T, H], from its sums [H, T]."""
    return (sums * spec.scale).T.astype(dtype)


def _of_key(spec, sums, query_dtype):
    """The gradient of keys from its sums, which were computed with scaled queries."""
    return sums * (spec.scale / factors(spec, query_dtype)[0])
