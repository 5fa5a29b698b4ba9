"""The small backbone. It begins with a space-to-depth, so nothing is computed at pixel resolution.

Axes: B batch, H W pixels, h w codes (H/factor, W/factor), h' w' positions of a level, C code dim, F features.

Space-to-depth divides the sides by `patch` (Cosmos, arXiv:2501.03575, uses a Haar transform instead), and convolutions
of stride 2 divide them by the rest of the factor. This makes small images cheap on a CPU. Levels, residual blocks and
the mirrored decoder are as in VQGAN (Esser et al. 2020, arXiv:2012.09841). RMSNorm over the features of each position
replaces GroupNorm, so a code depends on its surroundings and not on statistics of the whole image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.layers import Conv3x3, depth_to_space, linear, space_to_depth


class Encoder(nnx.Module):
    """float32 [B, H, W, 3] -> float32 [B, h, w, C]."""

    def __init__(self, config: AutoencoderConfig, dim: int, *, rngs: nnx.Rngs) -> None:
        dtype, widths = jnp.dtype(config.dtype), config.widths
        self.patch, self.dtype = config.patch, dtype
        self.stem = Conv3x3(3 * config.patch**2, widths[0], dtype=dtype, rngs=rngs)
        self.depth = len(widths)
        for index, (width, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            if index:
                setattr(self, f"down{index}", linear(4 * widths[index - 1], width, dtype=dtype, rngs=rngs))
            setattr(self, f"level{index}", Level(width, blocks, dtype=dtype, rngs=rngs))
        self.norm = _norm(widths[-1], dtype=dtype, rngs=rngs)
        self.to_code = linear(widths[-1], dim, dtype=jnp.float32, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """float32 [B, H, W, 3] -> float32 [B, h, w, C]."""
        x = self.stem(space_to_depth(pixels.astype(self.dtype), self.patch))
        for index in range(self.depth):
            if index:
                x = getattr(self, f"down{index}")(space_to_depth(x, 2))
            x = getattr(self, f"level{index}")(x)
        return self.to_code(self.norm(x).astype(jnp.float32))


class Decoder(nnx.Module):
    """float32 [B, h, w, C] -> float32 [B, H, W, 3]: the mirrored encoder."""

    def __init__(self, config: AutoencoderConfig, dim: int, *, rngs: nnx.Rngs) -> None:
        dtype, widths = jnp.dtype(config.dtype), config.widths
        self.patch, self.dtype = config.patch, dtype
        self.from_code = linear(dim, widths[-1], dtype=jnp.float32, rngs=rngs)
        self.depth = len(widths)
        for index, (width, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            setattr(self, f"level{index}", Level(width, blocks, dtype=dtype, rngs=rngs))
            if index:
                setattr(self, f"up{index}", linear(width, 4 * widths[index - 1], dtype=dtype, rngs=rngs))
        self.norm = _norm(widths[0], dtype=dtype, rngs=rngs)
        self.head = Conv3x3(widths[0], 3 * config.patch**2, dtype=dtype, rngs=rngs)

    def __call__(self, vectors: jax.Array) -> jax.Array:
        """float32 [B, h, w, C] -> float32 [B, H, W, 3]."""
        x = self.from_code(vectors).astype(self.dtype)
        for index in reversed(range(self.depth)):
            x = getattr(self, f"level{index}")(x)
            if index:
                x = depth_to_space(getattr(self, f"up{index}")(x), 2)
        return depth_to_space(self.head(jax.nn.silu(self.norm(x))).astype(jnp.float32), self.patch)


def receptive_radius(config: AutoencoderConfig) -> int:
    """The reach of a code, in pixels from the edge of its own cell. A code depends only on pixels within this reach,
    and changes only these pixels."""
    blocks = sum(2 * count << level for level, count in enumerate(config.blocks))  # each has two convolutions
    return config.patch * (1 + blocks)


class Level(nnx.Module):
    """Residual blocks at one resolution: [B, h', w', F] -> the same shape."""

    def __init__(self, width: int, blocks: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.blocks = blocks
        for index in range(blocks):
            setattr(self, f"block{index}", Block(width, dtype=dtype, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h', w', F] -> the same shape, through all blocks."""
        for index in range(self.blocks):
            x = getattr(self, f"block{index}")(x)
        return x


class Block(nnx.Module):
    """Pre-activation residual block of two 3 x 3 convolutions. At the start of training it is the identity."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.norm1 = _norm(width, dtype=dtype, rngs=rngs)
        self.conv1 = Conv3x3(width, width, dtype=dtype, rngs=rngs)
        self.norm2 = _norm(width, dtype=dtype, rngs=rngs)
        self.conv2 = Conv3x3(width, width, dtype=dtype, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h', w', F] -> the same shape: two convolutions, added to the input."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        return x + self.conv2(jax.nn.silu(self.norm2(y)))


def _norm(width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=1e-6, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
