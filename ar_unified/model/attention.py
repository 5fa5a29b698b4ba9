"""Causal attention inside documents, and over a cache of keys and values: one masked softmax behind two calls.

B batch, T query position, S key position, N query heads, K KV heads, G = N / K, H head dim.

A query sees the keys first <= s <= last, two numbers a query. Queries are taken in chunks, each against the prefix of
the keys it can see, and backward makes a chunk's weights again from the log-sum-exp forward left (FlashAttention,
arXiv 2205.14135, at the size of XLA's products): memory grows with T, not with T * T, and causal halves are not
computed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 128  # queries whose scores exist at once, per head
PREFIXES = 8  # lengths of prefix a row is cut into; beyond PREFIXES * CHUNK queries, chunks share a prefix in a loop
_HIDDEN = -1e30  # added to the score of a key that is not seen; finite, for a row that sees none must not make NaN


def attention(query: jax.Array, key: jax.Array, value: jax.Array, doc_start: jax.Array) -> jax.Array:
    """Attention of each position to its own document up to itself: query t sees the keys doc_start[t] <= s <= t.

    A padding query has doc_start = T, sees nothing and gets exact zeros, forward and backward.

    Args:
      query: [B, T, N, H], rotated, not scaled.
      key, value: [B, T, K, H].
      doc_start: int32 [B, T].

    Returns:
      [B, T, N, H] in the dtype of `value`; scores and softmax are float32.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    chunk = min(CHUNK, T)
    pad = -T % chunk
    query = jnp.moveaxis(query.reshape(B, T, K, N // K, H), 1, 3)  # [B, K, G, T, H]
    key, value = jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)  # [B, K, S, H]
    first, last = doc_start, jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if pad:
        query = jnp.pad(query, [(0, 0)] * 3 + [(0, pad), (0, 0)])
        first, last = (jnp.pad(x, [(0, 0), (0, pad)], constant_values=c) for x, c in ((first, T), (last, 0)))
    chunks = (T + pad) // chunk
    edges = [chunks * i // min(chunks, PREFIXES) * chunk for i in range(min(chunks, PREFIXES) + 1)]
    outs = []
    for begin, end in zip(edges, edges[1:], strict=False):
        rows = query[..., begin:end, :], first[:, begin:end], last[:, begin:end]
        outs.append(_attend_in_chunks(*rows, key[:, :, :end], value[:, :, :end], chunk))
    out = jnp.concatenate(outs, axis=3)[..., :T, :]
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)


def cached_attention(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array) -> jax.Array:
    """Attention over a cache in which slot s holds the key of position s: a query at p sees the slots s <= p.

    Args:
      query: [B, T, N, H], rotated, not scaled.
      key, value: [B, K, S, H], the cache with the queries' own keys already in it.
      positions: int32 [B, T] of the queries.
    """
    B, T, N, H = query.shape
    K = key.shape[1]
    query = jnp.moveaxis(query.reshape(B, T, K, N // K, H), 1, 3)
    out = _attend(query, key, value, _bias(jnp.zeros_like(positions), positions, key.shape[2]))
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)


def _attend_in_chunks(query, first, last, key, value, chunk):
    """Attention of query [B, K, G, T, H], `chunk` queries at a time; a loop where there are several chunks."""

    def split(x: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0)

    if first.shape[1] == chunk:
        return _attend(query, key, value, _bias(first, last, key.shape[2]))
    # In a loop each bias would be kept for backward, T * S in all: (first, last) goes in, and it is made where needed.
    pieces = split(query, 3), split(first, 1), split(last, 1)
    out = jax.lax.map(lambda piece: _attend(piece[0], key, value, piece[1:]), pieces)
    return jnp.moveaxis(out, 0, 3).reshape(query.shape)


@jax.custom_vjp
def _attend(query, key, value, bias):
    """Softmax attention of query [B, K, G, T, H] with `bias` on the scores; zeros where all is hidden.

    `bias` is `_bias(first, last, S)`, which layers share, or the pair (first, last) it is made of.
    """
    return _attend_forward(query, key, value, bias)[0]


def _bias(first: jax.Array, last: jax.Array, length: int) -> jax.Array:
    """float32 [B, T, S]: 0 where first <= s <= last. Layers and heads share it: cheaper than masking their scores."""
    s = jnp.arange(length, dtype=jnp.int32)
    return jnp.where((first[..., None] <= s) & (s <= last[..., None]), 0.0, _HIDDEN)


def _scores(query, key, bias):
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", query, key, preferred_element_type=jnp.float32)
    if isinstance(bias, tuple):
        first, last = bias
        bias = _bias(first, last, key.shape[2])
    return scores + bias[:, None, None]


def _row_max(x: jax.Array) -> jax.Array:
    """x.max(-1, keepdims=True). XLA CPU does not vectorise a maximum that keeps NaN; this one need not: 4x faster."""

    def greater(x):
        return jax.lax.reduce(x, np.float32(-np.inf), lambda a, b: jnp.where(a > b, a, b), (x.ndim - 1,))

    return jax.lax.platform_dependent(x, cpu=greater, default=lambda x: x.max(-1))[..., None]


def _attend_forward(query, key, value, bias):
    scores = _scores(query, key, bias)
    highest = jnp.maximum(_row_max(scores), _HIDDEN / 2)  # of a row that sees nothing: then its weights are exact zeros
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    out = (out / total).astype(value.dtype)
    return out, (query, key, value, bias, out, highest + jnp.log(total))


def _attend_backward(residuals, out_bar):
    query, key, value, bias, out, lse = residuals
    weights = jnp.exp(_scores(query, key, bias) - lse)
    delta = (out_bar.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    weights_bar = jnp.einsum("BKGTH,BKSH->BKGTS", out_bar, value, preferred_element_type=jnp.float32)
    scale = jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    scores_bar = (weights * (weights_bar - delta)).astype(query.dtype)
    # The sums over queries are written as [H, S] and turned: XLA CPU's product is 3x faster than into [S, H].
    value_bar = jnp.einsum("BKGTS,BKGTH->BKHS", weights.astype(value.dtype), out_bar)
    key_bar = jnp.einsum("BKGTS,BKGTH->BKHS", scores_bar, query * scale)
    query_bar = jnp.einsum("BKGTS,BKSH->BKGTH", scores_bar, key) * scale
    return query_bar, jnp.swapaxes(key_bar, 2, 3), jnp.swapaxes(value_bar, 2, 3), None


_attend.defvjp(_attend_forward, _attend_backward)
