"""Products of bfloat16, as fast as a CPU can make them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.kernels import device


def product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum(axes, a, b) of two arrays of one dtype, which is the result's.

    XLA CPU makes a product of bfloat16 into bfloat16 by widening both sides: at the speed of float32, and slower by the
    widening. It has the machine's own (AVX512-BF16, AMX) for one into float32, which is rounded here afterwards: 2x
    faster, the same numbers. Elsewhere the result is asked for as it is: a sum over devices would travel as float32.
    """
    if a.dtype == jnp.bfloat16 and device.current().platform == "cpu":
        return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32).astype(a.dtype)
    return jnp.einsum(axes, a, b)
