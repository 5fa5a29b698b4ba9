"""Keys and values in 8 bits: each vector is scaled by its own largest value, so one float32 scale restores it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Converts x [..., H] to int8 [..., H] and a scale, float32 [...]. x is about int8 * scale, with an error of at
    most half a scale in each element.

    The scale is max |x| / 127, for a symmetric range. A vector of zeros has scale 0 and stays exactly zero. A vector
    with an infinity or a NaN gets a scale that is not finite, so the result is not finite either.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    values = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    return values.astype(jnp.int8), scale
