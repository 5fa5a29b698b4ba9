"""A short definition of decode attention: it dequantizes the whole cache and computes all scores at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.kernels.decode_attention.spec import Cache, Spec


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Returns the reason why this module cannot compute these arguments, or None if it can."""
    return None


def forward(spec: Spec, q: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, N, H] in the dtype of q, and log-sum-exp float32 [B, N] (both in float64 for float64 queries).

    B batch, S cache slot, N query heads, K KV heads, G = N / K, H head dim.
    """
    B, N, H = q.shape
    K = cache.k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    k, v = cache.k.astype(wide), cache.v.astype(wide)
    if cache.scales is not None:
        k, v = (x * jnp.swapaxes(scale, 2, 3) for x, scale in zip((k, v), cache.scales, strict=True))
    query = q.astype(wide).reshape(B, K, N // K, H)
    scores = jnp.einsum("BKGH,BKSH->BKGS", query, k, precision="highest") * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    seen = cache.seen[:, None, None]  # [B, 1, 1, S]
    some = seen.any(-1, keepdims=True)
    highest = jnp.where(some, jnp.where(seen, scores, -jnp.inf).max(-1, keepdims=True), 0.0)
    weights = jnp.where(seen, jnp.exp(scores - highest), 0.0)
    total = jnp.where(some, weights.sum(-1, keepdims=True), 1.0)
    out = jnp.einsum("BKGS,BKSH->BKGH", weights / total, v, precision="highest")
    lse = jnp.where(some, highest + jnp.log(total), -jnp.inf)
    return out.reshape(B, N, H).astype(q.dtype), lse.reshape(B, N)
