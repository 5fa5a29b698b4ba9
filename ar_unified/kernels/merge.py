"""Merges partial attentions, each over its own part of the keys, by the log-sum-exps of their scores."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge(outs: jax.Array | Sequence[jax.Array], lses: jax.Array | Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from the attention over each.

    A part with a log-sum-exp of -inf saw no key and gets weight 0, even if its output is NaN. If no part saw a key, the
    output is exactly zero and the log-sum-exp -inf.

    Args:
      outs: the normalised outputs of the P parts, an array [P, ..., H] or P arrays [..., H].
      lses: the log-sum-exps (natural logarithm), an array [P, ...] or P arrays [...].

    Returns:
      The output [..., H] in the dtype of `outs`, and the log-sum-exp [...] in the dtype of `lses`.
    """
    out, lse = jnp.stack(outs), jnp.stack(lses)
    highest = lse.max(0)
    highest = jnp.where(highest == -jnp.inf, 0.0, highest)  # -inf - -inf would be NaN
    weights = jnp.exp(lse - highest)  # at most 1 for scores of any size, and 1 for the largest
    total = weights.sum(0)
    shares = (weights / jnp.where(total > 0, total, 1.0))[..., None]
    merged = jnp.where(shares > 0, out.astype(shares.dtype) * shares, 0.0).sum(0)
    return merged.astype(out.dtype), jnp.where(total > 0, highest + jnp.log(total), -jnp.inf)
