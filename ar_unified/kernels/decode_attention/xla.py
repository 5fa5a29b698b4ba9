"""Decode attention by XLA alone: any platform, any shape; the whole cache is read, however short the rows are.

B batch, S cache slot, N query heads, K KV heads, G = N / K, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.kernels.attention.xla import row_max
from ar_unified.kernels.decode_attention.spec import Cache, Spec

_HIDDEN = -1e30  # added to the score of a slot that is not seen; finite, for a row that sees none must not make NaN


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Why these cannot be computed here; None: they can."""
    return None


def forward(spec: Spec, q: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, N, H] in the dtype of q, and log-sum-exp float32 [B, N]."""
    B, N, H = q.shape
    K = cache.k.shape[1]
    # The heads of a group are the rows of one matrix, without an axis for the one query: XLA CPU's product of these is
    # up to 3x faster at B = 1 than the same with that axis.
    query = (q * jnp.asarray(spec.scale, q.dtype)).reshape(B, K, N // K, H)
    k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
    scores = jnp.einsum("BKGH,BKSH->BKGS", query, k, preferred_element_type=jnp.float32)
    if cache.scales is not None:
        scores *= cache.scales[0][:, :, None]
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    # Added, not selected: layers and heads share the bias, which costs less than masking the scores of each.
    scores += jnp.where(cache.seen, 0.0, _HIDDEN)[:, None, None]
    highest = jnp.maximum(row_max(scores), _HIDDEN / 2)  # of a row that sees nothing: then its weights are exact zeros
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    if cache.scales is not None:
        weights *= cache.scales[1][:, :, None]
    out = jnp.einsum("BKGS,BKSH->BKGH", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, highest + jnp.log(total), -jnp.inf)
    return out.reshape(B, N, H).astype(q.dtype), lse.reshape(B, N)
