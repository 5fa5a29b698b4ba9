"""Products of bfloat16 arrays, as fast as a CPU can compute them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.kernels import device


def product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum(axes, a, b) for two arrays of the same dtype, which is also the dtype of the result.

    For a bfloat16 result, XLA on a CPU first converts both inputs to float32, so it is slower than with float32 inputs.
    For a float32 result it uses the machine's bfloat16 instructions (AVX512-BF16, AMX). So here the result is float32,
    and is rounded afterwards: this is 2x faster and gives the same numbers. Other devices compute the bfloat16 result
    directly, because sums over devices would otherwise be sent as float32.
    """
    if a.dtype == jnp.bfloat16 and device.current().platform == "cpu":
        return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32).astype(a.dtype)
    return jnp.einsum(axes, a, b)
