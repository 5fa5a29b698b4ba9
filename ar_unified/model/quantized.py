"""Matrices in 8 bits: each output channel is scaled by its own largest value, and scaled back after the product.

A step of decoding reads every weight once and computes little with it, so half the bytes take half the time. A separate
scale for each channel keeps the error of a product below a percent (LLM.int8(), arXiv 2208.07339, section 2). Training
an adapter (model/lora.py) needs a quarter of the memory of float32 for these fixed matrices.

L layers, I inputs, O output channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ar_unified.kernels.product import product

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # dtype -> the largest stored value


class Quantized(NamedTuple):
    """values [I, O] in a dtype of LARGEST, and scale float32 [O]: the matrix is about values * scale.

    In training, layers are stacked and heads are an axis: [L, D, N, H] and [L, N, H]. `scale` has no input axis.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.values.shape

    def flat(self, inputs: int) -> Quantized:
        """One layer's matrix as [I, O]; a product sums over its first `inputs` axes."""
        scale = self.scale.reshape(-1)
        return Quantized(self.values.reshape(math.prod(self.shape[:inputs]), scale.size), scale)


def quantized(matrix: jax.Array, dtype: str, inputs: tuple[int, ...] = (0,)) -> Quantized:
    """Rounds a matrix [I, O] or a stack of them. `inputs`: the axes that a product sums over. A channel of zeros stays
    exactly zero; a channel that is not finite gets a scale that is not finite."""
    matrix = matrix.astype(jnp.float32)
    scale = jnp.abs(matrix).max(inputs, keepdims=True) / LARGEST[dtype]
    values = matrix / jnp.where(scale > 0, scale, 1.0)
    return Quantized((jnp.round(values) if dtype == "int8" else values).astype(dtype), scale.squeeze(inputs))


def widened(matrix: Quantized, inputs: tuple[int, ...]) -> jax.Array:
    """The matrix of a `Quantized`, in float32."""
    return matrix.values.astype(jnp.float32) * jnp.expand_dims(matrix.scale, inputs)


@jax.custom_vjp
def widened_product(x: jax.Array, matrix: Quantized) -> jax.Array:
    """x [..., I] times the matrix [I, O], in the dtype of x. Values are widened while they are read, not before.

    Only x has a gradient. Backward keeps the 8-bit values; JAX's own gradient would keep the widened ones.
    """
    return (product("...I,IO->...O", x, matrix.values.astype(x.dtype)) * matrix.scale).astype(x.dtype)


def _product_forward(x, matrix):
    return widened_product(x, matrix), matrix


def _product_backward(matrix, out_bar):
    scaled = (out_bar * matrix.scale).astype(out_bar.dtype)
    return product("...O,IO->...I", scaled, matrix.values.astype(out_bar.dtype)), None


widened_product.defvjp(_product_forward, _product_backward)
