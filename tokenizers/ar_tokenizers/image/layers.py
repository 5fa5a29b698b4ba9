"""The layers that the backbones share.

Axes: B batch, H W rows and columns, F features. Parameters are float32, arithmetic is in `dtype`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.convolution import conv3x3
from ar_tokenizers.trees import Params as Params


class _Keys:
    def __init__(self, key: jax.Array) -> None:
        self._key, self._drawn = key, 0

    def params(self) -> jax.Array:
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn - 1)


def fresh(key: jax.Array | None = None) -> nnx.Rngs:
    """Keys for the parameters of new layers, the same as `nnx.Rngs(params=key)` gives. If you need only shapes, omit
    the key.

    nnx.Rngs is not used because it is slow while JAX traces. The counter in an nnx.Rngs is an array, and flax asks for
    the sharding of this array at every key. JAX then raises an error with a message made from the whole program so
    far. Making these messages took four fifths of the time to trace a large network.
    """
    return cast(nnx.Rngs, _Keys(jax.random.key(0) if key is None else key))


class Conv3x3(nnx.Module):
    """A 3 x 3 convolution with a bias. `convolution` is a function of convolution.py; the default keeps the size."""

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        convolution: Callable[[jax.Array, jax.Array], jax.Array] = conv3x3,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        kernel_init: Any = nnx.initializers.lecun_normal(),  # noqa: B008 (a pure function)
    ) -> None:
        self.convolution, self.dtype = convolution, dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (3, 3, fan_in, fan_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(fan_out, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, F] -> [B, H, W, F'] in `dtype`; some kinds of `convolution` change H and W."""
        return self.convolution(x.astype(self.dtype), self.kernel[...]) + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Zero mean and unit variance over the image and each of 32 groups of features (Wu & He, arXiv:1803.08494).

    Statistics are always float32. If 32 does not divide the width, the number of groups is their greatest common
    divisor.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype) -> None:
        self.groups, self.dtype = math.gcd(32, width), dtype
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, F] -> the same shape, in `dtype`. Statistics are float32, over positions and the features of a
        group."""
        y, width = x.astype(jnp.float32), x.shape[-1]
        # Sums over the features of a group, and the step from groups back to features, are matrix products with `of`.
        # XLA would fuse anything else into the loops over positions and compute it again at every position, which took
        # half of the forward pass on a CPU.
        of = jnp.repeat(jnp.eye(self.groups), width // self.groups, axis=1)  # [groups, F]: membership
        product = functools.partial(jnp.matmul, precision="highest")

        def mean_of_group(y: jax.Array) -> jax.Array:  # [B, H, W, F] -> [B, groups]
            return product(jnp.mean(jnp.mean(y, axis=2), axis=1), of.T * (self.groups / width))

        mean = product(mean_of_group(y), of)[:, None, None]
        variance = mean_of_group(jnp.square(y - mean))
        gain = product(jax.lax.rsqrt(variance + 1e-6), of * self.scale[...])[:, None, None]
        return ((y - mean) * gain + self.bias[...]).astype(self.dtype)


def linear(fan_in: int, fan_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, **options: Any) -> nnx.Linear:
    """A linear layer with float32 parameters that computes in `dtype`."""
    return nnx.Linear(fan_in, fan_out, dtype=dtype, param_dtype=jnp.float32, rngs=rngs, **options)


def space_to_depth(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, F] -> [B, H/size, W/size, size*size*F]."""
    b, h, w, f = x.shape
    x = x.reshape(b, h // size, size, w // size, size, f).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // size, w // size, size * size * f)


def depth_to_space(x: jax.Array, size: int) -> jax.Array:
    """The inverse of space_to_depth."""
    b, h, w, f = x.shape
    x = x.reshape(b, h, w, size, size, f // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * size, w * size, f // size**2)
