"""The largest number of every row, as fast as a CPU can find it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def row_max(x: jax.Array) -> jax.Array:
    """x.max(-1, keepdims=True). On a CPU, XLA does not vectorise a maximum that propagates NaN. This
    function does not propagate NaN, and is 4x faster.
    """

    def greater(x):
        return jax.lax.reduce(x, np.float32(-np.inf), lambda a, b: jnp.where(a > b, a, b), (x.ndim - 1,))

    return jax.lax.platform_dependent(x, cpu=greater, default=lambda x: x.max(-1))[..., None]
