"""Keys and values in 8 bits: each vector by its own largest value, so that one float32 scale restores it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., H] as int8 [..., H] and scale float32 [...]: x is about int8 * scale, to half a scale in each place.

    Symmetric, scale = max |x| / 127; a vector of zeros has scale 0 and stays exact zeros. A vector with an infinity or
    a NaN has a scale that is not finite either, so the result shows it.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    values = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    return values.astype(jnp.int8), scale
