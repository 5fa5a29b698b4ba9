"""The backbone of SBER-MoVQGAN and of Emu3's vision tokenizer: VQGAN with a decoder that reads the codes in every norm.

Axes: B batch, H W pixels, h w codes (H/factor, W/factor), h' w' positions of a level, C code dim, F features.

Zheng et al. 2022, arXiv:2209.09002 (MoVQ). The encoder is vqgan's. Lumina-mGPT 2.0 uses the network unchanged
(ai-forever/MoVQGAN, movqgan_270M). Emu3 (arXiv:2409.18869) added layers over time on both sides of the codes; for
single pictures they are equal to 2-D layers (temporal.py).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image import vqgan
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.layers import GroupNorm, linear
from ar_tokenizers.image.temporal import AfterCodes, BeforeCodes


class Encoder(vqgan.Encoder):
    """float32 [B, H, W, 3] -> float32 [B, h, w, C]."""

    def __init__(self, config: AutoencoderConfig, dim: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, dim, rngs=rngs)
        blocks = config.temporal_blocks
        self.temporal = BeforeCodes(config.z_channels, blocks, rngs=rngs) if blocks else None

    def features(self, pixels: jax.Array) -> jax.Array:
        """VQGAN's features, followed by the layers over time if there are any."""
        z = super().features(pixels)
        return self.temporal(z) if self.temporal else z


class Decoder(vqgan.Decoder):
    """float32 [B, h, w, C] -> float32 [B, H, W, 3]: vqgan's decoder, in which every norm is a SpatialNorm and
    reads the code vectors."""

    def __init__(self, config: AutoencoderConfig, dim: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, dim, rngs=rngs, norm=functools.partial(SpatialNorm, dim, rngs=rngs))
        blocks = config.temporal_blocks
        self.temporal = AfterCodes(dim, blocks, rngs=rngs) if blocks else None

    def __call__(self, vectors: jax.Array) -> jax.Array:
        """Vectors of codes -> pixels; every norm reads the vectors again (SpatialNorm)."""
        z = self.from_code(vectors)
        if self.temporal:  # the norms read these layers' result
            z, vectors = self.temporal(z), self.temporal(vectors)
        return self.pixels(z, vectors)


class SpatialNorm(nnx.Module):
    """GroupNorm, whose result is scaled and shifted by the code at each position. At the start of training it is plain
    GroupNorm.

    The original repeats the code vectors to the size of the level (nearest neighbour) before the two 1 x 1
    convolutions, `gain` and `shift`. Here the convolutions come first, which gives the same numbers with fewer
    products.
    """

    def __init__(self, dim: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
        self.group = GroupNorm(width, dtype=dtype)
        self.gain = linear(dim, width, dtype=jnp.float32, rngs=rngs, kernel_init=zeros, bias_init=ones)
        self.shift = linear(dim, width, dtype=jnp.float32, rngs=rngs, kernel_init=zeros)

    def __call__(self, x: jax.Array, codes: jax.Array) -> jax.Array:
        """x [B, h', w', F], codes float32 [B, h, w, C], where h divides h' and w divides w' -> [B, h', w', F]."""
        (b, h, w, _), (height, width, features) = codes.shape, x.shape[1:]
        y = self.group(x).reshape(b, h, height // h, w, width // w, features)
        gain, shift = (each(codes).astype(y.dtype)[:, :, None, :, None] for each in (self.gain, self.shift))
        return (y * gain + shift).reshape(x.shape)
