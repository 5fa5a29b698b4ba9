"""Decode attention on TPU: one pass over the live blocks of all rows; the query heads of a KV head are the rows of one
product.

The grid is as long as the list of live blocks, not as B * S. Blocks of slots that no query sees, before a window or
after a row's end, are not fetched and not visited. While the last block of a row is computed, the first block of the
next row is being copied. A core runs its steps one after the other and carries the running softmax along, so no row is
split into parts that must be merged. If a chip has two cores (v4, v5p), each takes half of the KV heads.

A register has 128 lanes. If the last axis of an array is shorter, XLA lays out the axis before it along the lanes. So
a cache of head dim 64 is passed as [B, K, H, S]. This is its layout in memory, so no copy is made.

B batch, S cache slot, N query heads, K KV heads, G = N / K, H head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_unified.kernels.decode_attention.spec import Cache, Spec

BLOCK_BYTES = 512 * 1024  # bytes of keys in a step: a copy long enough to hide the step's fixed cost of 0.3 us
HEADS = 8  # KV heads per step, at most; each is a separate product
DTYPES = (jnp.float32, jnp.bfloat16)
SMALL_DTYPES = (jnp.int8, jnp.float8_e4m3fn)  # only a cache may have these


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Returns the reason why this module cannot compute these arguments, or None if it can."""
    if q.dtype not in DTYPES or k.dtype not in (*DTYPES, *SMALL_DTYPES):
        expected = "q in float32 or bfloat16 and a cache in one of these, int8 or float8_e4m3fn"
        return f"expected {expected}; found {q.dtype} and {k.dtype}"
    if q.shape[-1] % 64:
        return f"expected a head dim in multiples of 64; found {q.shape[-1]}"
    return None


def forward(spec: Spec, q: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, N, H] in the dtype of q, and log-sum-exp float32 [B, N]."""
    B, N, H = q.shape
    K, S = cache.k.shape[1:3]
    G = N // K
    heads, block = _tiles(K, S, H, cache.k.dtype.itemsize)
    # If each KV head has one query, the rows of a tile are the heads of a step: an axis of size 1 would be padded to 8.
    rows = (heads,) if G == 1 else (heads, G)
    query = (q * jnp.asarray(spec.scale, q.dtype)).reshape(B, K // heads, *rows, H)
    row_of, block_of, count = _live_blocks(cache, block)

    def by_row(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *rows, width), lambda h, i, row_of, *_: (row_of[i], h, *(0 for _ in rows), 0))

    if turned := H % 128 != 0:
        slots = pl.BlockSpec((1, heads, H, block), lambda h, i, row_of, block_of, *_: (row_of[i], h, 0, block_of[i]))
        k, v = jnp.swapaxes(cache.k, 2, 3), jnp.swapaxes(cache.v, 2, 3)
    else:
        slots = pl.BlockSpec((1, heads, block, H), lambda h, i, row_of, block_of, *_: (row_of[i], h, block_of[i], 0))
        k, v = cache.k, cache.v
    # A block of some heads of [B, K, S] would not be a whole tile. With an axis of size 1 between K and S, it is.
    scales = pl.BlockSpec((1, heads, 1, block), lambda h, i, row_of, block_of, *_: (row_of[i], h, 0, block_of[i]))
    quantized = [] if cache.scales is None else list(cache.scales)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, spec, block, turned),
        out_shape=(
            jax.ShapeDtypeStruct(query.shape, q.dtype),
            jax.ShapeDtypeStruct((*query.shape[:-1], 1), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(K // heads, count),
            in_specs=[by_row(H), slots, slots, *[scales] * len(quantized)],
            out_specs=(by_row(H), by_row(1)),
            scratch_shapes=[pltpu.VMEM((heads, G, width), jnp.float32) for width in (1, 1, H)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=spec.interpret,
        name="decode_attention",
    )(row_of, block_of, cache.begin, cache.end, query, k, v, *quantized)
    return out.reshape(B, N, H), lse.reshape(B, N)


def _tiles(K: int, S: int, H: int, itemsize: int) -> tuple[int, int]:
    """The numbers of KV heads and of slots per step. A step has at most half of the heads, so that two cores can share
    them, and about BLOCK_BYTES of keys."""
    heads = max(n for n in range(1, max(K // 2, 1) + 1) if K % n == 0 and n <= HEADS)
    fit = BLOCK_BYTES // (heads * max(H, 128) * itemsize)  # a power of two if the head dim is a power of two
    return heads, min(S, max(fit // 128 * 128, 128))


def _live_blocks(cache: Cache, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the row of each live block, its place in the row, both int32 [B * blocks per row], and the number of live
    blocks. Entries after this number are never read. A row without live slots is listed with its first block, so that
    its zeros are written.
    """
    B, S = cache.k.shape[0], cache.k.shape[2]
    first = cache.begin // block
    count = jnp.maximum(pl.cdiv(cache.end, block) - first, 1)
    behind = jnp.cumsum(count)  # for each row: one more than the place of its last block in the list
    i = jnp.arange(B * pl.cdiv(S, block), dtype=jnp.int32)
    # All pairs are compared, because on a TPU a binary search would become loops and gathers, in every layer.
    row = jnp.minimum((behind <= i[:, None]).sum(1, dtype=jnp.int32), B - 1)
    shift = jnp.where(row[:, None] == jnp.arange(B), first - (behind - count), 0).sum(1, dtype=jnp.int32)
    return row, i + shift, behind[-1]


def _kernel(spec, block, turned, row_of, block_of, begin, end, q, k, v, *refs):
    *scales, out, lse, highest, total, acc = refs
    i = pl.program_id(1)
    row, start = row_of[i], block_of[i] * block
    first, last = begin[row], end[row] - 1  # the first and the last slot that the row sees

    @pl.when(start <= first)
    def _():
        highest[...] = jnp.full_like(highest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    whole = (first <= start) & (start + block - 1 <= last)

    @pl.when(whole)
    def _():
        _add_block(spec, turned, None, q, k, v, scales, highest, total, acc)

    @pl.when(jnp.logical_not(whole) & (last >= 0))
    def _():
        def seen(shape: tuple[int, ...], axis: int) -> jax.Array:
            s = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            return (first <= s) & (s <= last)

        _add_block(spec, turned, seen, q, k, v, scales, highest, total, acc)

    @pl.when(last < start + block)
    def _():
        some = total[...] > 0
        out[0, 0] = (acc[...] / jnp.where(some, total[...], 1.0)).astype(out.dtype).reshape(out.shape[2:])
        lse[0, 0] = jnp.where(some, highest[...] + jnp.log(total[...]), -jnp.inf).reshape(lse.shape[2:])


def _add_block(spec, turned, seen, q, k, v, scales, highest, total, acc):
    """Adds one block of slots to the running softmax. If it is an edge block, `seen` masks its unseen slots."""
    precise = dict(preferred_element_type=jnp.float32)
    if q.dtype == jnp.float32:
        precise["precision"] = jax.lax.Precision.HIGHEST
    cached = "KHS" if turned else "KSH"
    keys, values = k[0].astype(q.dtype), v[0].astype(q.dtype)
    scores = jnp.einsum(f"KGH,{cached}->KGS", q[0, 0].reshape(acc.shape), keys, **precise)
    if scales:
        scores *= scales[0][0]
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    if seen is not None:
        scores = jnp.where(seen(scores.shape, 2), scores, -jnp.inf)
        # Memory after the array's end has arbitrary values, perhaps NaN, and a weight of zero does not remove a NaN.
        values = jnp.where(seen(values.shape, cached.index("S")), values, 0)
    new = jnp.maximum(highest[...], scores.max(-1, keepdims=True))  # finite: each listed block has a seen slot
    weights, shrink = jnp.exp(scores - new), jnp.exp(highest[...] - new)
    highest[...] = new
    total[...] = shrink * total[...] + weights.sum(-1, keepdims=True)
    if scales:
        weights *= scales[1][0]
        if seen is not None:
            weights = jnp.where(seen(weights.shape, 2), weights, 0.0)
    acc[...] = shrink * acc[...] + jnp.einsum(f"KGS,{cached}->KGH", weights.astype(values.dtype), values, **precise)
