"""Dropout with a key for each token, so that the result depends on neither the batch nor the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes a fraction `rate` (to 1/65536) of x and scales the rest up; the identity without keys.

    Args:
      x: [..., D].
      keys: [...], one for each vector: what a token loses then depends on neither its batch nor its device.
    """
    if keys is None or rate == 0.0:
        return x
    threshold = round(rate * 65536)

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.bits(key, x.shape[-1:], jnp.uint16)

    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    keep = draw(keys) >= threshold
    return jnp.where(keep, x * jnp.asarray(65536 / (65536 - threshold), x.dtype), 0)


def fold(keys: jax.Array | None, index: jax.Array | int) -> jax.Array | None:
    """Another key from each of keys [B, T]."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    return None if keys is None else fold(keys, index)
