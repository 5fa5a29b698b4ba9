"""A short definition of attention, which computes all scores at once. It is slow and exact, and JAX differentiates
it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.kernels.attention.bounds import Bounds
from ar_unified.kernels.attention.spec import Spec


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Returns the reason why these shapes cannot be computed here, or None if they can."""
    return None


def prepare(spec: Spec, q: jax.Array, k: jax.Array, bounds: Bounds) -> Bounds:
    """Returns the bounds in the form that `forward` and `backward` take, here unchanged."""
    return bounds


def forward(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, T, N, H] in the dtype of v, and log-sum-exp [B, N, T] in float32 (float64 for float64 inputs).

    B batch, T query position, S key position, N query heads, K KV heads, G = N / K, H head dim.
    """
    scores, seen = _scores(spec, q, k, bounds)
    some = seen.any(-1, keepdims=True)
    scores = jnp.where(seen, scores, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.where(some, scores.max(-1, keepdims=True), 0.0))
    weights = jnp.where(seen, jnp.exp(scores - highest), 0.0)
    total = jnp.where(some, weights.sum(-1, keepdims=True), 1.0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights / total, v.astype(scores.dtype), precision="highest")
    lse = jnp.where(some, highest + jnp.log(total), -jnp.inf)
    return out.reshape(q.shape).astype(v.dtype), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


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
    """Gradients of q, k and v. `lse` and `delta` [B, N, T] may come from attention to more keys than k."""
    B, T, N, H = q.shape

    def objective(q, k, v):  # with weight = exp(score - lse), the gradient of a score is weight * (dout . v - delta)
        scores, seen = _scores(spec, q, k, bounds)
        grouped = (B, k.shape[2], -1, T, 1)
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - lse.reshape(grouped), 0.0)), 0.0)
        dweights = jnp.einsum(
            "BTKGH,BSKH->BKGTS", dout.reshape(B, T, k.shape[2], -1, H), v.astype(scores.dtype), precision="highest"
        )
        return (weights * (dweights - delta.reshape(grouped))).sum()

    return jax.grad(objective, argnums=(0, 1, 2))(q, k, v)


def _scores(spec: Spec, q: jax.Array, k: jax.Array, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """Scores [B, K, G, T, S], and which keys are seen, bool [B, 1, 1, T, S]."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=wide, precision="highest") * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    s = jnp.arange(S)
    return scores, ((bounds.first[..., None] <= s) & (s <= bounds.last[..., None]))[:, None, None]
