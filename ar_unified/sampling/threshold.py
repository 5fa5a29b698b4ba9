"""Finds the threshold of a row's top-k or top-p set without sorting, by a search on the bits of the floats.

Axes: B rows, V vocabulary, P thresholds that are tried at once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_FORBIDDEN = np.uint32(0x007FFFFF)  # the rank of -inf


def ranked(x: Array) -> Array:
    """Maps floats to uint32 in the same order: flips all bits of a negative float, and the sign bit of a positive
    one.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _floats(ranks: Array) -> Array:
    """The inverse of `ranked`."""
    bits = jnp.where(ranks >> 31 == 1, ranks ^ jnp.uint32(1 << 31), ~ranks)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def threshold(ranks: Array, weight: Array | None, least: Array, used: Array) -> Array:
    """Returns a threshold t, uint32 [B], for each row that is `used`. {rank >= t} is then the smallest set of this form
    that has weight `least` or more. If all tokens together weigh less, the set has all tokens above -inf.

    Args:
        ranks: uint32 [B, V], from `ranked`.
        weight: f32 [B, V], the probability of each token. None: each token has weight 1.
        least: f32 [B].
        used: bool [B].

    The search narrows a bracket around t. A pass over the logits tries one threshold. If tokens are only counted, it
    tries three, because a CPU counts tokens twice as fast as it adds probabilities. The first pass divides the bracket
    into equal ranges of values. Later passes assume that the tokens' values are spread evenly over the bracket, and try
    the expected t. For a count, they also try one standard deviation below and above it. Every second pass (for a
    count, every third) divides the bracket into equal ranges of ranks, so the search ends after at most 64 passes,
    whatever the logits are. A row is done as soon as its bracket contains a single token. This takes 6 to 10 passes for
    a count, and 12 to 25 for a probability.
    """
    if weight is None:
        around, cycle, scale, value = jnp.array([-1.0, 0.0, 1.0]), 3, lambda x: x, lambda x: x
    else:  # a token at x has weight exp(x) times a constant, so the weight above t is linear in exp(t)
        around, cycle, scale, value = jnp.array([0.0]), 2, jnp.exp, jnp.log
    parts = len(around) + 1
    cuts = jnp.arange(1, parts, dtype=jnp.uint32)

    def measure(t: Array) -> tuple[Array, Array]:
        """The weight and the number, each f32 [B, P], of the tokens at or above each threshold, uint32 [B, P]."""
        inside = ranks[:, None] >= t[..., None]
        number = jnp.sum(inside, axis=-1, dtype=jnp.int32).astype(jnp.float32)
        return number if weight is None else jnp.sum(jnp.where(inside, weight[:, None], 0), axis=-1), number

    def unsettled(low: Array, high: Array, at_low: Any, at_high: Any) -> Array:
        return used & (high - low > 1) & (at_low[1] - at_high[1] > 1) & (at_low[0] > least)

    def tried(i: Array, low: Array, high: Array, at_low: Any, at_high: Any) -> Array:
        """The thresholds of pass i, uint32 [B, P], in ascending order."""
        share = jnp.clip((at_low[0] - least) / jnp.maximum(at_low[0] - at_high[0], 1e-30), 0, 1)
        number = at_low[1] - at_high[1]
        deviation = jnp.sqrt(share * (1 - share) / number) + 0.5 / number
        expected = share[:, None] + deviation[:, None] * around
        place = jnp.clip(jnp.where(i == 0, cuts / parts, expected), 0, 1)
        bottom, top = scale(_floats(low))[:, None], scale(_floats(high))[:, None]
        by_value = ranked(value(bottom + (top - bottom) * place))
        by_bits = low[:, None] + (high - low)[:, None] // parts * cuts
        return jnp.clip(jnp.where(i % cycle == cycle - 1, by_bits, by_value), low[:, None] + 1, high[:, None] - 1)

    def body(carry: Any) -> Any:
        i, bracket = carry
        low, high, at_low, at_high = bracket
        t = tried(i, *bracket)
        found = measure(t)
        enough = jnp.sum(found[0] >= least[:, None], axis=-1, keepdims=True)
        ladder = jax.tree.map(
            lambda below, between, above: jnp.concatenate([below[:, None], between, above[:, None]], axis=1),
            (low, at_low), (t, found), (high, at_high),
        )  # fmt: skip

        def rung(at: Array) -> Any:
            return jax.tree.map(lambda x: jnp.take_along_axis(x, at, axis=1)[:, 0], ladder)

        (low, at_low), (high, at_high) = rung(enough), rung(enough + 1)
        going = unsettled(*bracket)
        new = low, high, at_low, at_high
        return i + 1, jax.tree.map(lambda new, old: jnp.where(going, new, old), new, bracket)

    low = jnp.min(jnp.where(ranks > _FORBIDDEN, ranks, ~np.uint32(0)), axis=-1)
    nothing = jnp.zeros(low.shape, jnp.float32)
    at_low = jax.tree.map(lambda x: x[:, 0], measure(low[:, None]))
    bracket = low, jnp.max(ranks, axis=-1) + 1, at_low, (nothing, nothing)
    return jax.lax.while_loop(lambda carry: jnp.any(unsettled(*carry[1])), body, (jnp.int32(0), bracket))[1][0]
