"""Attention by XLA alone, for any platform and shape. Its memory grows with T, not with T * T.

Queries are computed in chunks, each with the prefix of keys that it can see. Backward computes a chunk's weights again
from the log-sum-exp of forward, as in FlashAttention (arXiv 2205.14135), but with XLA's large products. Keys of other
documents inside the prefix are computed and masked; only the kernels skip them.

B batch, T query position, S key position, N query heads, K KV heads, G = N / K, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from ar_unified.kernels.attention.bounds import Bounds, pad_queries
from ar_unified.kernels.attention.spec import Spec
from ar_unified.kernels.product import product
from ar_unified.kernels.row_max import row_max

CHUNK = 128  # queries per head whose scores are in memory at once
PREFIXES = 8  # at most 8 prefix lengths; with more than PREFIXES * CHUNK queries, several chunks share one, in a loop
_HIDDEN = -1e30  # added to the score of an unseen key; finite, so that a row that sees no key gives no NaN


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Returns the reason why these shapes cannot be computed here, or None if they can."""
    return None


def recomputed(q: jax.Array, k: jax.Array) -> int:
    """See `attention.recomputed`."""
    return 1


def prepare(spec: Spec, q: jax.Array, k: jax.Array, bounds: Bounds) -> Bounds:
    """Returns the bounds in the form that `forward` and `backward` take, here unchanged."""
    return bounds


def forward(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, T, N, H] in the dtype of v, and log-sum-exp float32 [B, N, T]."""
    T, chunk = q.shape[1], min(CHUNK, q.shape[1])
    query, key, value = _grouped(q, k, chunk), jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    bounds = pad_queries(bounds, query.shape[3], k.shape[1])
    outs, lses = [], []
    for begin, end, seen in _pieces(query.shape[3], chunk, spec.shift, k.shape[1]):
        keys, values = key[:, :, :seen], value[:, :, :seen]

        def one(piece, keys=keys, values=values):
            return _forward(spec, piece, keys, values)

        pieces = query[..., begin:end, :], bounds.first[:, begin:end], bounds.last[:, begin:end]
        out, lse = _map(one, pieces, (3, 1, 1), (3, 3), chunk)
        outs.append(out)
        lses.append(lse)
    out, lse = jnp.concatenate(outs, 3)[..., :T, :], jnp.concatenate(lses, 3)[..., :T]
    return _flat(out), lse.reshape(q.shape[0], q.shape[2], T)


def backward(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: Bounds,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v; `delta` float32 [B, N, T] is sum(dout * out) over H, minus the gradient of `lse`."""
    T, chunk = q.shape[1], min(CHUNK, q.shape[1])
    query, dout = _grouped(q, k, chunk), _grouped(dout, k, chunk)
    key, value = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    bounds = pad_queries(bounds, query.shape[3], k.shape[1])
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)  # if a row sees nothing, its weights are exactly zero
    lse, delta = (
        jnp.pad(x, [(0, 0), (0, 0), (0, query.shape[3] - T)]).reshape(*query.shape[:3], -1) for x in (lse, delta)
    )
    dquery, dkey, dvalue = [], jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    for begin, end, seen in _pieces(query.shape[3], chunk, spec.shift, k.shape[1]):
        keys, values = key[:, :, :seen], value[:, :, :seen]

        def add(sums, piece, keys=keys, values=values):
            dq, dk, dv = _backward(spec, piece, keys, values)
            return (sums[0] + dk, sums[1] + dv), dq

        pieces = (
            query[..., begin:end, :], bounds.first[:, begin:end], bounds.last[:, begin:end],
            lse[..., begin:end], delta[..., begin:end], dout[..., begin:end, :],
        )  # fmt: skip
        if end - begin == chunk:
            dq, dk, dv = _backward(spec, pieces, keys, values)
        else:
            zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
            (dk, dv), dq = jax.lax.scan(add, zeros, _split(pieces, (3, 1, 1, 3, 3, 3), chunk))
            dq = _join(dq, 3)
        dquery.append(dq)
        dkey, dvalue = dkey.at[:, :, :seen].add(dk), dvalue.at[:, :, :seen].add(dv)
    dq = _flat(jnp.concatenate(dquery, 3)[..., :T, :])
    return dq, jnp.moveaxis(dkey, 2, 1).astype(k.dtype), jnp.moveaxis(dvalue, 2, 1).astype(v.dtype)


# ---- one chunk: query [B, K, G, T, H], key and value [B, K, S, H] --------------------------------------------------


def _scores(spec, query, key, first, last):
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", query, key, preferred_element_type=jnp.float32)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    # A bias is added instead of masking scores, because all layers and heads share it, which costs less.
    s = jnp.arange(key.shape[2], dtype=jnp.int32)
    bias = jnp.where((first[..., None] <= s) & (s <= last[..., None]), 0.0, _HIDDEN)
    return scores + bias[:, None, None]


def _forward(spec, piece, key, value):
    query, first, last = piece
    scores = _scores(spec, query * jnp.asarray(spec.scale, query.dtype), key, first, last)
    highest = jnp.maximum(row_max(scores), _HIDDEN / 2)  # in a row that sees nothing, weights are exactly zero
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    lse = jnp.where(total > 0, highest + jnp.log(total), -jnp.inf)
    return (out / jnp.where(total > 0, total, 1.0)).astype(value.dtype), lse[..., 0]


def _backward(spec, piece, key, value):
    query, first, last, lse, delta, dout = piece
    scale = jnp.asarray(spec.scale, query.dtype)
    scores = _scores(spec, query * scale, key, first, last)
    weights = jnp.exp(scores - lse[..., None])
    dweights = jnp.einsum("BKGTH,BKSH->BKGTS", dout, value, preferred_element_type=jnp.float32)
    dscores = weights * (dweights - delta[..., None])
    if spec.soft_cap is not None:
        dscores *= 1 - jnp.square(jnp.maximum(scores / spec.soft_cap, -1.0))  # unseen scores give no infinity
    dscores = dscores.astype(query.dtype)
    # The sums over queries are computed as [H, S] and then transposed: on a CPU, XLA computes such a product 3x faster
    # than one of shape [S, H]. The barrier keeps XLA from transposing the product itself. The caller adds chunks in
    # float32.
    weights, dscores, dout, query = (_over_group(x) for x in (weights.astype(value.dtype), dscores, dout, query))
    sums = product("BKTS,BKTH->BKHS", dscores, query * scale), product("BKTS,BKTH->BKHS", weights, dout)
    dquery = product("BKTS,BKSH->BKTH", dscores, key).reshape(piece[0].shape) * scale
    dkey, dvalue = (jnp.swapaxes(x, 2, 3) for x in jax.lax.optimization_barrier(sums))
    return dquery, dkey, dvalue


def _over_group(x: jax.Array) -> jax.Array:
    """Reshapes [B, K, G, T, ...] to [B, K, G T, ...], which has one axis to sum over."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


# ---- rows to chunks and back ---------------------------------------------------------------------------------------


def _grouped(x: jax.Array, k: jax.Array, chunk: int) -> jax.Array:
    """Changes [B, T, N, H] to [B, K, G, T', H], where T' is the next multiple of `chunk`."""
    B, T, N, H = x.shape
    x = jnp.moveaxis(x.reshape(B, T, k.shape[2], -1, H), 1, 3)
    return jnp.pad(x, [(0, 0)] * 3 + [(0, -T % chunk), (0, 0)]) if T % chunk else x


def _flat(x: jax.Array) -> jax.Array:
    """Changes [B, K, G, T, H] back to [B, T, N, H]."""
    B, _, _, T, H = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(B, T, -1, H)


def _pieces(length: int, chunk: int, shift: int | None, keys: int) -> Iterator[tuple[int, int, int]]:
    """Yields (begin, end, seen): queries begin .. end - 1 are whole chunks and see only the first `seen` keys."""
    chunks = length // chunk
    count = min(chunks, PREFIXES) if shift is not None else 1
    edges = [chunks * i // count * chunk for i in range(count + 1)]
    for begin, end in zip(edges, edges[1:], strict=False):
        yield begin, end, keys if shift is None else max(1, min(keys, end + shift))


def _split(arrays, axes, chunk):
    """Cuts array i into chunks along axes[i]. The chunks become the first axis."""

    def one(x: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0)

    return tuple(one(x, axis) for x, axis in zip(arrays, axes, strict=True))


def _join(x: jax.Array, axis: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _map(function, arrays, axes, out_axes, chunk):
    """Applies function to the chunks of the arrays, in a loop if there are several."""
    if arrays[0].shape[axes[0]] == chunk:
        return function(arrays)
    outs = jax.lax.map(function, _split(arrays, axes, chunk))
    return tuple(_join(x, axis) for x, axis in zip(outs, out_axes, strict=True))
