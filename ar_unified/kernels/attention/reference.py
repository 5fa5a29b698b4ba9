"""What attention computes, in a screenful: every score at once. Slow, exact, and differentiated by JAX itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.kernels.attention.bounds import Bounds
from ar_unified.kernels.attention.spec import Spec


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Why these cannot be computed here; None: they can."""
    return None


def forward(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, T, N, H] in the dtype of v, and log-sum-exp [B, N, T] in float32 (float64 for float64 inputs).

    B batch, T query position, S key position, N query heads, K KV heads, G = N / K, H head dim.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=wide, precision="highest") * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    s = jnp.arange(S)
    seen = ((bounds.first[..., None] <= s) & (s <= bounds.last[..., None]))[:, None, None]  # [B, 1, 1, T, S]
    some = seen.any(-1, keepdims=True)
    scores = jnp.where(seen, scores, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.where(some, scores.max(-1, keepdims=True), 0.0))
    weights = jnp.where(seen, jnp.exp(scores - highest), 0.0)
    total = jnp.where(some, weights.sum(-1, keepdims=True), 1.0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights / total, v.astype(wide), precision="highest")
    lse = jnp.where(some, highest + jnp.log(total), -jnp.inf)
    return out.reshape(B, T, N, H).astype(v.dtype), lse.reshape(B, N, T)
