"""Dropout with one key per token, so that the result does not depend on the batch or the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Sets a fraction `rate` (rounded to 1/65536) of x to zero and scales the rest up. Without keys it returns x.

    Args:
      x: [..., D].
      keys: [...], one for each vector, so that the zeros of a token do not depend on its batch or its device.
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
    """Derives a new key from each of keys [B, T]."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    return None if keys is None else fold(keys, index)
