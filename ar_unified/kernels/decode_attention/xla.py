"""Decode attention with XLA only: any platform, any shape.

XLA's shapes are static, so it reads the whole cache, or a half, a quarter or an eighth of it, depending on the longest
row of the batch. The result of a row does not depend on this: additional slots only add exact zeros, and do not change
the order of the sum. On a CPU the results are equal bit for bit if the cache's length is a multiple of SHORTEST.

B batch, S cache slot, N query heads, K KV heads, G = N / K, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.kernels.decode_attention.spec import Cache, Spec
from ar_unified.kernels.row_max import row_max

PREFIXES = (8, 4, 2, 1)  # prefix = cache length / one of these; more would not help, because XLA copies it
SHORTEST = 64  # the shortest prefix; prefixes except the whole cache are multiples of it
_HIDDEN = -1e30  # added to the score of an unseen slot; finite, so that a row that sees no slot gives no NaN


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Returns the reason why this module cannot compute these arguments, or None if it can."""
    return None


def forward(spec: Spec, q: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, N, H] in the dtype of q, and log-sum-exp float32 [B, N].

    For several queries per row the shapes are [B, T, N, H] and [B, T, N]. Queries are at the row's last positions, and
    each sees the slots up to its own.
    """
    lengths = prefixes(cache.k.shape[2])
    if len(lengths) == 1:
        return _forward(spec, q, cache)
    which = jnp.sum(jnp.max(cache.end) > jnp.array(lengths[:-1]), dtype=jnp.int32)
    return jax.lax.switch(which, [lambda n=n: _forward(spec, q, _first(cache, n)) for n in lengths])


def prefixes(length: int) -> list[int]:
    """The possible numbers of slots that are read from a cache of `length` slots, in ascending order."""
    parts = (-(-length // (SHORTEST * part)) * SHORTEST for part in PREFIXES)
    return sorted({min(part, length) for part in parts})


def _first(cache: Cache, slots: int) -> Cache:
    scales = None if cache.scales is None else (cache.scales[0][..., :slots], cache.scales[1][..., :slots])
    return cache._replace(k=cache.k[:, :, :slots], v=cache.v[:, :, :slots], scales=scales)


def _forward(spec: Spec, q: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array]:
    B, *_, N, H = q.shape
    K, T = cache.k.shape[1], q.shape[1] if q.ndim == 4 else 1
    # The queries of a row and the heads of a group are the rows of one matrix. A single query has no axis of its own,
    # because at B = 1 a product on a CPU is up to 3x faster without this axis.
    query = _rows(q * jnp.asarray(spec.scale, q.dtype), T, K)
    wide = cache.k.dtype if cache.k.dtype == jnp.float32 else q.dtype  # what a cache holds is never rounded
    query, k, v = query.astype(wide), cache.k.astype(wide), cache.v.astype(wide)
    scores = jnp.einsum("BKGH,BKSH->BKGS", query, k, preferred_element_type=jnp.float32)
    if cache.scales is not None:
        scores *= cache.scales[0]
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    # A bias is added instead of masking scores, because all layers and heads share it, which costs less.
    scores += _bias(cache, T, N // K)
    highest = jnp.maximum(row_max(scores), _HIDDEN / 2)  # if a row sees no slot, its weights become exactly 0
    weights = jnp.exp(scores - highest)
    # A product with ones computes the sum, because on a CPU the order of XLA's own sum depends on S.
    ones = jax.lax.optimization_barrier(jnp.ones(weights.shape[-1], weights.dtype))
    total = jnp.einsum("BKGS,S->BKG", weights, ones)[..., None]
    if cache.scales is not None:
        weights *= cache.scales[1]
    out = jnp.einsum("BKGS,BKSH->BKGH", weights.astype(wide), v, preferred_element_type=jnp.float32)
    out = out / jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, highest + jnp.log(total), -jnp.inf)
    return _queries(out, q.shape).astype(q.dtype), _queries(lse, (*q.shape[:-1], 1))[..., 0]


def _rows(q: jax.Array, T: int, K: int) -> jax.Array:
    """Queries [B, N, H] or [B, T, N, H] as rows [B, K, T * G, H]."""
    B, *_, N, H = q.shape
    return jnp.swapaxes(q.reshape(B, T, K, N // K, H), 1, 2).reshape(B, K, -1, H)


def _queries(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_rows`: [B, K, T * G, n] -> [B, N, n] or [B, T, N, n], like `shape`."""
    B, K, _, n = rows.shape
    T = shape[1] if len(shape) == 4 else 1
    return jnp.swapaxes(rows.reshape(B, K, T, -1, n), 1, 2).reshape(shape)


def _bias(cache: Cache, T: int, G: int) -> jax.Array:
    """The bias that is added to scores [B, K, T * G, S]."""
    if T == 1:
        return jnp.where(cache.seen, 0.0, _HIDDEN)[:, None, None]
    seen = jnp.stack([cache.before(T - 1 - t).seen for t in range(T)], axis=1)
    return jnp.repeat(jnp.where(seen, 0.0, _HIDDEN), G, axis=1)[:, None]
