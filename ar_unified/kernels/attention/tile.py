"""The arithmetic of one tile of scores, in base 2: a GPU computes powers of 2, so log2(e) is part of the softmax's
scale.

Plain functions of arrays, called inside the Hopper kernels. factor(spec) * scores are the true scores times log2(e).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ar_unified.kernels.attention.spec import Spec

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # the maximum before any score; finite, so that exp2(-inf - LOWEST) = 0 in a row that sees nothing
Broadcast = Callable[[jax.Array, jax.Array], jax.Array]  # broadcasts a vector over rows to the shape of a tile


def factor(spec: Spec) -> float:
    """The factor that multiplies the result of `scores` before exp2."""
    return (spec.scale if spec.soft_cap is None else spec.soft_cap) * LOG2_E


def scores(spec: Spec, products: jax.Array) -> jax.Array:
    """Scores from the products q k, without `factor`: the products themselves, or their tanh under a soft cap."""
    return products if spec.soft_cap is None else jnp.tanh(products * (spec.scale / spec.soft_cap))


def seen(first: jax.Array, last: jax.Array, s: jax.Array) -> jax.Array:
    """Whether a query with the bounds first..last sees key s."""
    return (first <= s) & (s <= last)


def softmax_step(
    spec: Spec, scores: jax.Array, highest: jax.Array, broadcast: Broadcast
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights of a tile [T, S], the factor for earlier sums of weights, and the new maximum [T]."""
    new = jnp.maximum(highest, scores.max(1) * factor(spec))
    return jnp.exp2(scores * factor(spec) - broadcast(new, scores)), jnp.exp2(highest - new), new


def log_sum_exp(highest: jax.Array, total: jax.Array) -> jax.Array:
    """Natural log-sum-exp [T] from the maximum and the sum of weights; -inf for a row that sees nothing."""
    some = total > 0
    return jnp.where(some, highest * (1 / LOG2_E) + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)


def weights(spec: Spec, scores: jax.Array, lse: jax.Array) -> jax.Array:
    """Computes the weights of a tile again, from the base-2 log-sum-exp in the tile's shape. They are 0 in rows with a
    log-sum-exp of +inf."""
    return jnp.exp2(scores * factor(spec) - lse)


def slopes(spec: Spec, scores: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns x such that x * (dweights - delta) * spec.scale is the gradient of the products q k. The caller
    multiplies by spec.scale only once, after the sum over tiles.
    """
    return weights if spec.soft_cap is None else weights * (1 - scores * scores)
