"""Matrices in 8 bits: each output channel by its own largest value, restored behind the product.

A step of decoding reads every weight once and computes little with it, so half the bytes are half the time. Rounding
each channel alone is what keeps the error of a product below a percent (LLM.int8(), arXiv 2208.07339, section 2).
A training of an adapter beside them (model/lora.py) has a quarter of what it need not change in memory.

L layers, I inputs, O output channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ar_unified.kernels.product import product

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # by dtype, what a channel's largest value becomes


class Quantized(NamedTuple):
    """values [I, O] of a dtype of LARGEST, scale float32 [O]: the matrix is about values * scale.

    In a training the layers are stacked and heads apart, as [L, D, N, H] and [L, N, H]: `scale` has no axis of inputs.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape

    def flat(self, inputs: int) -> Quantized:
        """[I, O] of one layer's, whose first `inputs` axes are summed over."""
        scale = self.scale.reshape(-1)
        return Quantized(self.values.reshape(math.prod(self.shape[:inputs]), scale.size), scale)


def quantized(matrix: jax.Array, dtype: str, inputs: tuple[int, ...] = (0,)) -> Quantized:
    """[I, O] rounded, or a stack of such, `inputs` being the axes that a product sums over. A channel of zeros stays
    exact zeros, one that is not finite has a scale that shows it."""
    matrix = matrix.astype(jnp.float32)
    scale = jnp.abs(matrix).max(inputs, keepdims=True) / LARGEST[dtype]
    values = matrix / jnp.where(scale > 0, scale, 1.0)
    return Quantized((jnp.round(values) if dtype == "int8" else values).astype(dtype), scale.squeeze(inputs))


def widened(matrix: Quantized, inputs: tuple[int, ...]) -> jax.Array:
    """The matrix that `quantized` left, float32."""
    return matrix.values.astype(jnp.float32) * jnp.expand_dims(matrix.scale, inputs)


@jax.custom_vjp
def widened_product(x: jax.Array, matrix: Quantized) -> jax.Array:
    """x [..., I] times the matrix [I, O], in the dtype of x. The values are widened as they are read, not before.

    The gradient is of x alone. It keeps the 8 bits for backward, where JAX's own would keep the widened values.
    """
    return (product("...I,IO->...O", x, matrix.values.astype(x.dtype)) * matrix.scale).astype(x.dtype)


def _product_forward(x, matrix):
    return widened_product(x, matrix), matrix


def _product_backward(matrix, out_bar):
    scaled = (out_bar * matrix.scale).astype(out_bar.dtype)
    return product("...O,IO->...I", scaled, matrix.values.astype(out_bar.dtype)), None


widened_product.defvjp(_product_forward, _product_backward)
