"""The arithmetic of one head in a step of the TPU kernels: scores, weights and their gradients, [S, T].

Exponentials have base 2. The scale and log2(e) multiply the H numbers of a query, or in float32 its S scores.

T queries and S keys of a step, H head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_unified.kernels.attention.spec import Spec

HIDDEN = -1e30  # the score of a key that is not seen; finite, so that a query that sees no key does not give NaN
LOG2E = math.log2(math.e)


def factors(spec: Spec, dtype: DTypeLike) -> tuple[float, float]:
    """The factors for queries and for scores. The products with both factors are the scores in base 2 or, with a soft
    cap, the argument of tanh.

    float32 queries are not scaled, to avoid one more rounding: float32 is used when precision matters.
    """
    factor = spec.scale * LOG2E if spec.soft_cap is None else spec.scale / spec.soft_cap
    return (1.0, factor) if dtype == jnp.float32 else (factor, 1.0)


def scaled(spec: Spec, q: jax.Array) -> jax.Array:
    """Queries times their factor."""
    on_queries, _ = factors(spec, q.dtype)
    return q if on_queries == 1.0 else (q.astype(jnp.float32) * on_queries).astype(q.dtype)


def scores_of(spec, key, query, seen):
    """Scores times log2(e), [S, T], from scaled queries, and the derivative of the soft cap (None means 1)."""
    scores, slope = dot(key, query, transposed=True), None
    if (on_scores := factors(spec, query.dtype)[1]) != 1.0:
        scores *= on_scores
    if spec.soft_cap is not None:
        bent = jnp.tanh(scores)
        scores, slope = bent * (spec.soft_cap * LOG2E), 1 - bent * bent
    return scores if seen is None else jnp.where(seen, scores, HIDDEN), slope


def weights_of(spec, key, value, query, dout, lse, delta, seen):
    """The softmax, and the gradient for scale * q k before the soft cap, both [S, T]. `lse` has base 2."""
    scores, slope = scores_of(spec, key, query, seen)
    weights = jnp.exp2(scores - lse)
    dscores = weights * (dot(value, dout, transposed=True) - delta)
    return weights, dscores if slope is None else dscores * slope


def dot(a, b, transposed=False):
    """a @ b, or a @ b.T. Products of float32 inputs are computed in float32, without rounding them to bfloat16."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
