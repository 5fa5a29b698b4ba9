"""The discriminators, which distinguish images from reconstructions. PatchGAN judges patches, StyleGAN's judges the
whole image.

Axes: B batch, H W pixels, h w positions, F features.

No layer looks at other images of the batch: there are no batch statistics and no minibatch standard deviation. So
training works with a batch of one, real and reconstructed images may be judged in one call or in two, and neither
microbatches nor the mesh change a logit. All layers can be differentiated twice, which R1 needs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.layers import GroupNorm


class Discriminator(nnx.Module):
    """The interface. `least`: the shortest side of an image, in pixels, that a discriminator can judge."""

    least: int

    @abstractmethod
    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """[B, H, W, 3] in [-1, 1] -> (logits float32 [B, ...], activations [B, h, w, F], fine to coarse)."""


class PatchDiscriminator(Discriminator):
    """Judges overlapping patches, each by itself: logits [B, h, w]. With 3 layers, a patch has 70 x 70 pixels.

    It follows pix2pix (Isola et al. 2016, arXiv:1611.07004), as used by VQGAN and LlamaGen: `layers` convolutions of
    stride 2, then one of stride 1, then one that gives the logits. All kernels are 4 x 4. A group norm replaces their
    batch norm, because an image must not influence the logits of another.
    """

    def __init__(self, width: int, layers: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.least, self.dtype, self.layers = 3 * 2**layers, dtype, layers
        widths = [3] + [width * min(2**index, 8) for index in range(layers + 1)]
        for index in range(layers + 1):
            stride, fan_out = (2 if index < layers else 1), widths[index + 1]
            conv = _conv(widths[index], fan_out, 4, dtype=dtype, rngs=rngs, strides=stride, use_bias=index == 0)
            setattr(self, f"conv{index}", conv)
            if index:
                setattr(self, f"norm{index}", GroupNorm(fan_out, dtype=dtype))
        self.head = _conv(widths[-1], 1, 4, dtype=jnp.float32, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """float32 [B, H, W, 3] -> logits float32 [B, h, w] of patches, and the features of every layer."""
        x, features = pixels.astype(self.dtype), []
        for index in range(self.layers + 1):
            x = getattr(self, f"conv{index}")(x)
            x = _leaky(getattr(self, f"norm{index}")(x) if index else x)
            features.append(x)
        return self.head(x.astype(jnp.float32))[..., 0], features


class StyleDiscriminator(Discriminator):
    """Judges the whole image: one logit for each, [B].

    StyleGAN2's residual discriminator (Karras et al. 2019, arXiv:1912.04958). MaskGIT and MAGVIT train tokenizers with
    it. It has `layers` residual blocks, followed by dense layers. Each block blurs and halves the features. The dense
    layers see features averaged into 4 x 4 cells, so one set of parameters works for any H x W. After log2(side / 4)
    blocks, the features have exactly 4 x 4 positions.
    """

    GRID = 4

    def __init__(self, width: int, layers: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.least, self.dtype, self.layers = 2**layers, dtype, layers
        widths = [width * min(2**index, 8) for index in range(layers + 1)]
        self.stem = _conv(3, widths[0], 3, dtype=dtype, rngs=rngs)
        for index in range(layers):
            setattr(self, f"block{index}", Block(widths[index], widths[index + 1], dtype=dtype, rngs=rngs))
        self.last = _conv(widths[-1], widths[-1], 3, dtype=dtype, rngs=rngs)
        dense = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": rngs}
        self.dense = nnx.Linear(self.GRID**2 * widths[-1], widths[-1], kernel_init=_HE, **dense)
        self.head = nnx.Linear(widths[-1], 1, **dense)

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """float32 [B, H, W, 3] -> logits of whole images, and the features of every level."""
        x = _leaky(self.stem(pixels.astype(self.dtype)))
        features = [x]
        for index in range(self.layers):
            x = getattr(self, f"block{index}")(x)
            features.append(x)
        x = _leaky(self.last(x))
        features.append(x)
        x = average_into(x.astype(jnp.float32), self.GRID)
        return self.head(_leaky(self.dense(x.reshape(len(x), -1))))[:, 0], features


class Block(nnx.Module):
    """[B, h, w, F] -> [B, h/2, w/2, F']: two convolutions with a blur and a halving between them, and a skip
    connection."""

    def __init__(self, fan_in: int, fan_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv(fan_in, fan_in, 3, dtype=dtype, rngs=rngs)
        self.conv2 = _conv(fan_in, fan_out, 3, dtype=dtype, rngs=rngs)
        self.skip = _conv(fan_in, fan_out, 1, dtype=dtype, rngs=rngs, use_bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, F] -> [B, H/2, W/2, F']."""
        y = _leaky(self.conv2(blur_and_halve(_leaky(self.conv1(x)))))
        return (self.skip(blur_and_halve(x)) + y) * math.sqrt(0.5)  # keeps the variance at 1


def blur_and_halve(x: jax.Array) -> jax.Array:
    """[B, h, w, F] -> [B, h // 2, w // 2, F], filtered with (1, 3, 3, 1) / 8 along both sides, which prevents
    aliasing."""
    for axis in (1, 2):
        half = x.shape[axis] // 2
        padding = [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)]
        padded = jnp.pad(x, padding, mode="edge")
        taps = [jax.lax.slice_in_dim(padded, k, k + 2 * half - 1, 2, axis) for k in range(4)]
        x = (taps[0] + taps[3]) * 0.125 + (taps[1] + taps[2]) * 0.375
    return x


def average_into(x: jax.Array, grid: int) -> jax.Array:
    """[B, h, w, F] -> [B, grid, grid, F]. With n = grid, cell i is the mean of the positions from floor(i h / n) to
    ceil((i + 1) h / n) - 1."""

    def cells(size: int) -> jax.Array:
        position, cell = jnp.arange(size), jnp.arange(grid)[:, None]
        inside = (position >= cell * size // grid) & (position < -(-(cell + 1) * size // grid))
        return inside / inside.sum(1, keepdims=True)

    return jnp.einsum("ih,jw,bhwf->bijf", cells(x.shape[1]), cells(x.shape[2]), x, precision="highest")


_HE = nnx.initializers.he_normal()


def _conv(fan_in: int, fan_out: int, side: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, **options: Any) -> nnx.Conv:
    padding = ((side - 1) // 2, (side - 1) // 2)  # one position less per side than "same", as in pix2pix
    kind = {"dtype": dtype, "param_dtype": jnp.float32, "kernel_init": _HE, "rngs": rngs}
    return nnx.Conv(fan_in, fan_out, (side, side), padding=(padding, padding), **kind, **options)


def _leaky(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.2)
