"""Matrices in 8 bits, for decoding: each output channel is scaled by its own largest value, and scaled back after the
product.

A step of decoding reads every weight once and computes little with it, so half the bytes are half the time. Rounding
each channel alone is what keeps the error of a product below a percent (LLM.int8(), arXiv 2208.07339, section 2).

I inputs, O output channels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # by dtype, what a channel's largest value becomes


class Quantized(NamedTuple):
    """values [I, O] of a dtype of LARGEST, scale float32 [O]: the matrix is about values * scale."""

    values: jax.Array
    scale: jax.Array


def quantized(matrix: jax.Array, dtype: str) -> Quantized:
    """[I, O] rounded; a channel of zeros stays exact zeros, and a channel that is not finite has a scale that is not
    finite.
    """
    matrix = matrix.astype(jnp.float32)
    scale = jnp.abs(matrix).max(0) / LARGEST[dtype]
    values = matrix / jnp.where(scale > 0, scale, 1.0)
    return Quantized((jnp.round(values) if dtype == "int8" else values).astype(dtype), scale)


def product(x: jax.Array, matrix: Quantized) -> jax.Array:
    """x [..., I] times the matrix, in the dtype of x. The values are widened as they are read, not before."""
    return ((x @ matrix.values.astype(x.dtype)) * matrix.scale).astype(x.dtype)
