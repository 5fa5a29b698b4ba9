"""The usual backbone: the encoder and decoder of VQGAN.

Axes: B batch, H W pixels, h w codes (H/factor, W/factor), h' w' positions of a level, S = h'w', C code dim, F features.

Esser et al. 2020, arXiv:2012.09841 (taming-transformers' model.py). LlamaGen, Chameleon, IBQ, MaskGIT, Open-MAGVIT2 and
the base of Emu3's tokenizer are this network with other widths, blocks and attention. The layers have the same order as
in taming-transformers, so its weights, and those of `ChameleonVQVAE` in transformers, load after renaming and
transposing. Differences: residual branches start at zero, the 1 x 1 convolutions around the quantizer (`to_code` and
`from_code`) are float32, and a space-to-depth by `patch` may come first (published systems have patch 1).

GroupNorm uses the whole image, and attention uses every position. So a code depends weakly on all pixels.

Video clips are not supported. The network itself would need little change. The frames would be part of the batch, and a
temporal convolution over past frames would follow each block. It would be in a residual branch that starts at zero, so
a single frame would be treated exactly like an image. Halving over time (1 + 2n frames to 1 + n) is missing too.
Documents, data, grammar and sampling do not support clips either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.convolution import doubling_conv3x3, halving_conv3x3
from ar_tokenizers.image.layers import Conv3x3, GroupNorm, depth_to_space, linear, space_to_depth

Norm = Callable[..., Any]  # (width, dtype=...) -> a module that normalises [B, h', w', F]


class Encoder(nnx.Module):
    """float32 [B, H, W, 3] -> float32 [B, h, w, C]."""

    def __init__(self, config: AutoencoderConfig, dim: int, *, rngs: nnx.Rngs) -> None:
        dtype, widths = jnp.dtype(config.dtype), config.widths
        self.patch, self.dtype, self.depth = config.patch, dtype, len(widths)
        self.stem = Conv3x3(3 * config.patch**2, config.width, dtype=dtype, rngs=rngs)
        previous = config.width
        for index, (width, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            if index:
                setattr(self, f"down{index}", Conv3x3(previous, previous, halving_conv3x3, dtype=dtype, rngs=rngs))
            attention = config.attention == "lowest" and index == self.depth - 1
            setattr(self, f"level{index}", Level(previous, width, blocks, attention, dtype=dtype, rngs=rngs))
            previous = width
        self.middle = Middle(previous, config.attention != "none", dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(previous, dtype=dtype)
        self.head = Conv3x3(previous, config.z_channels, dtype=dtype, rngs=rngs)
        self.to_code = linear(config.z_channels, dim, dtype=jnp.float32, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """float32 [B, H, W, 3] -> float32 [B, h, w, C]."""
        return self.to_code(self.features(pixels))

    def features(self, pixels: jax.Array) -> jax.Array:
        """float32 [B, H, W, 3] -> float32 [B, h, w, z_channels]: all but the last layer."""
        x = self.stem(space_to_depth(pixels.astype(self.dtype), self.patch))
        for index in range(self.depth):
            if index:
                x = getattr(self, f"down{index}")(x)
            x = getattr(self, f"level{index}")(x)
        return self.head(jax.nn.silu(self.norm(self.middle(x)))).astype(jnp.float32)


class Decoder(nnx.Module):
    """float32 [B, h, w, C] -> float32 [B, H, W, 3]: the mirrored encoder, by default with one more block in each level.

    Args:
      norm: makes the normalisation before every convolution; called as norm(width, dtype=dtype).
    """

    def __init__(self, config: AutoencoderConfig, dim: int, *, rngs: nnx.Rngs, norm: Norm = GroupNorm) -> None:
        dtype, levels = jnp.dtype(config.dtype), config.decoder_levels
        self.patch, self.dtype, self.depth = config.patch, dtype, len(levels)
        previous = levels[-1][0]
        self.from_code = linear(dim, config.z_channels, dtype=jnp.float32, rngs=rngs)
        self.stem = Conv3x3(config.z_channels, previous, dtype=dtype, rngs=rngs)
        self.middle = Middle(previous, config.attention != "none", dtype=dtype, rngs=rngs, norm=norm)
        for index in reversed(range(self.depth)):
            width, blocks = levels[index]
            attention = config.attention == "lowest" and index == self.depth - 1
            level = Level(previous, width, blocks, attention, dtype=dtype, rngs=rngs, norm=norm)
            setattr(self, f"level{index}", level)
            if index:
                setattr(self, f"up{index}", Conv3x3(width, width, doubling_conv3x3, dtype=dtype, rngs=rngs))
            previous = width
        self.norm = norm(previous, dtype=dtype)
        self.head = Conv3x3(previous, 3 * config.patch**2, dtype=dtype, rngs=rngs)

    def __call__(self, vectors: jax.Array) -> jax.Array:
        """float32 [B, h, w, C] -> float32 [B, H, W, 3]."""
        return self.pixels(self.from_code(vectors))

    def pixels(self, z: jax.Array, *codes: jax.Array) -> jax.Array:
        """float32 [B, h, w, z_channels] -> float32 [B, H, W, 3]: all but the first layer. Every norm gets `codes`."""
        x = self.middle(self.stem(z), *codes)
        for index in reversed(range(self.depth)):
            x = getattr(self, f"level{index}")(x, *codes)
            if index:
                x = getattr(self, f"up{index}")(x)
        return depth_to_space(self.head(jax.nn.silu(self.norm(x, *codes))).astype(jnp.float32), self.patch)


class Level(nnx.Module):
    """Residual blocks at one resolution, each optionally with attention after it: [B, h', w', F] -> [B, h', w', F']."""

    def __init__(
        self,
        fan_in: int,
        width: int,
        blocks: int,
        attention: bool,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        norm: Norm = GroupNorm,
    ) -> None:
        self.blocks, self.attention = blocks, attention
        for index in range(blocks):
            block = Block(width if index else fan_in, width, dtype=dtype, rngs=rngs, norm=norm)
            setattr(self, f"block{index}", block)
            if attention:
                setattr(self, f"attention{index}", Attention(width, dtype=dtype, rngs=rngs, norm=norm))

    def __call__(self, x: jax.Array, *codes: jax.Array) -> jax.Array:
        """[B, h', w', F] -> [B, h', w', F']. `codes` go to the norms of MoVQ."""
        for index in range(self.blocks):
            x = getattr(self, f"block{index}")(x, *codes)
            if self.attention:
                x = getattr(self, f"attention{index}")(x, *codes)
        return x


class Middle(nnx.Module):
    """The blocks at the resolution of the codes: [B, h, w, F] -> the same shape."""

    def __init__(
        self, width: int, attention: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs, norm: Norm = GroupNorm
    ) -> None:
        self.block1 = Block(width, width, dtype=dtype, rngs=rngs, norm=norm)
        self.attention = Attention(width, dtype=dtype, rngs=rngs, norm=norm) if attention else None
        self.block2 = Block(width, width, dtype=dtype, rngs=rngs, norm=norm)

    def __call__(self, x: jax.Array, *codes: jax.Array) -> jax.Array:
        """[B, h', w', F] -> the same shape. `codes` go to the norms of MoVQ."""
        x = self.block1(x, *codes)
        return self.block2(self.attention(x, *codes) if self.attention else x, *codes)


class Block(nnx.Module):
    """Pre-activation residual block of two 3 x 3 convolutions. At the start of training it is only its shortcut."""

    def __init__(self, fan_in: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, norm: Norm = GroupNorm) -> None:
        self.norm1 = norm(fan_in, dtype=dtype)
        self.conv1 = Conv3x3(fan_in, width, dtype=dtype, rngs=rngs)
        self.norm2 = norm(width, dtype=dtype)
        self.conv2 = Conv3x3(width, width, dtype=dtype, rngs=rngs, kernel_init=nnx.initializers.zeros)
        self.shortcut = linear(fan_in, width, dtype=dtype, rngs=rngs) if fan_in != width else None

    def __call__(self, x: jax.Array, *codes: jax.Array) -> jax.Array:
        """[B, h', w', F] -> [B, h', w', F']: two convolutions, added to the shortcut."""
        y = self.conv1(jax.nn.silu(self.norm1(x, *codes)))
        y = self.conv2(jax.nn.silu(self.norm2(y, *codes)))
        return y + (self.shortcut(x) if self.shortcut else x)


class Attention(nnx.Module):
    """One head of self-attention over all positions, with a float32 softmax. At the start of training it is the
    identity."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, norm: Norm = GroupNorm) -> None:
        self.norm = norm(width, dtype=dtype)
        self.query, self.key, self.value = (linear(width, width, dtype=dtype, rngs=rngs) for _ in range(3))
        self.out = linear(width, width, dtype=dtype, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: jax.Array, *codes: jax.Array) -> jax.Array:
        """[B, h', w', F] -> the same shape: every position attends to all, and the result is added to the input."""
        y = self.norm(x, *codes).reshape(x.shape[0], -1, x.shape[-1])
        scores = jnp.einsum("bqf,bsf->bqs", self.query(y), self.key(y), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * x.shape[-1] ** -0.5).astype(y.dtype)
        return x + self.out(jnp.einsum("bqs,bsf->bqf", weights, self.value(y))).reshape(x.shape)
