"""The product of a layer's input with one of its matrices.

B batch, T position, I inputs, O outputs.
"""

from __future__ import annotations

import jax

from ar_unified.kernels.product import product
from ar_unified.model.quantized import Quantized, widened_product


def linear(x: jax.Array, weight: jax.Array | Quantized) -> jax.Array:
    """x [B, T, I] @ weight [I, O]."""
    return widened_product(x, weight) if isinstance(weight, Quantized) else _linear(x, weight)


@jax.custom_vjp
def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`linear` for an array. Backward computes the weight's gradient as [I, O]; JAX would compute [O, I] and transpose
    it, which is 2.5x slower on XLA CPU."""
    return product("BTI,IO->BTO", x, weight)


def _linear_forward(x, weight):
    return product("BTI,IO->BTO", x, weight), (x, weight)


def _linear_backward(residuals, out_bar):
    x, weight = residuals
    return product("BTO,IO->BTI", out_bar, weight), product("BTI,BTO->IO", x, out_bar)


_linear.defvjp(_linear_forward, _linear_backward)
