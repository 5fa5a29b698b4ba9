"""A convolutional VQ-VAE for pictures of any H x W divisible by its factor.

Axes: B batch, H W pixels, h w codes (H/factor, W/factor), K codebook size.

An encoder, a quantiser and a decoder; which ones is the config's choice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image import folded, vqgan
from ar_tokenizers.image.config import AutoencoderConfig

Params = dict[str, Any]


class Reconstruction(NamedTuple):
    pixels: jax.Array  # float32 [B, H, W, 3], about [-1, 1]: not clipped
    codes: jax.Array  # int32 [B, h, w]
    quantizer_loss: jax.Array  # float32 []


class Autoencoder(nnx.Module):
    """pixels float32 [B, H, W, 3] in [-1, 1] -> Reconstruction."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.quantizer = config._quantizer(rngs)
        backbone: Any = folded if config.backbone == "folded" else vqgan
        self.encoder = backbone.Encoder(config, self.quantizer.dim, rngs=rngs)
        self.decoder = backbone.Decoder(config, self.quantizer.dim, rngs=rngs)

    @staticmethod
    def bind(config: AutoencoderConfig, params: Params) -> Autoencoder:
        """The module that computes with `params`, as `init` made them; to be called inside the traced function."""
        graph, state = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def __call__(self, pixels: jax.Array) -> Reconstruction:
        quantized = self.quantizer(self._latents(pixels))
        return Reconstruction(self.decoder(quantized.vectors), quantized.codes, quantized.loss)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """float32 [B, H, W, 3] in [-1, 1] -> codes int32 [B, h, w]."""
        return self.quantizer.encode(self._latents(pixels))

    def decode(self, codes: jax.Array) -> jax.Array:
        """int32 [B, h, w] in [0, K) -> float32 [B, H, W, 3]: exactly what the training pass makes of these codes."""
        return self.decoder(self.quantizer.vectors(codes))

    def _latents(self, pixels: jax.Array) -> jax.Array:
        self.config.grid(*pixels.shape[1:3])
        return self.encoder(pixels)


def init(config: AutoencoderConfig, key: jax.Array) -> Params:
    """Parameters: a nested dict of float32 arrays. Works under jax.jit and jax.eval_shape."""
    return nnx.to_pure_dict(nnx.state(Autoencoder(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def loss(
    config: AutoencoderConfig, params: Params, pixels: jax.Array, key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, Any]]:
    """What to minimise for a batch.

    Args:
      pixels: [B, H, W, 3], uint8, or float32 in [-1, 1].
      key: of no use here, because nothing is drawn; every loss of the training loop takes one.

    Returns:
      The mean loss over the pictures, and metrics: (sum, count) over the pictures of `l1` and `mse` (of pixels in
      [-1, 1]), `psnr` (dB, of the clipped reconstruction, per picture) and `quantizer_loss`; and `code_counts`, how
      often each code was used, int32 [K].
    """
    target = to_float(pixels)
    reconstruction = Autoencoder.bind(config, params)(target)
    error = reconstruction.pixels - target
    l1 = jnp.mean(jnp.abs(error), axis=(1, 2, 3))
    mse = jnp.mean(jnp.square(error), axis=(1, 2, 3))
    total = jnp.mean(config.l1_weight * l1 + config.l2_weight * mse) + reconstruction.quantizer_loss

    seen = jnp.mean(jnp.square(jnp.clip(reconstruction.pixels, -1, 1) - target), axis=(1, 2, 3))
    psnr = 10 * jnp.log10(4 / jnp.maximum(seen, 4e-10))  # at most 100 dB, as in metrics.psnr
    count = float(target.shape[0])
    metrics: dict[str, Any] = {"l1": (l1.sum(), count), "mse": (mse.sum(), count), "psnr": (psnr.sum(), count)}
    metrics["quantizer_loss"] = (reconstruction.quantizer_loss * count, count)
    metrics["code_counts"] = jnp.zeros(config.codebook_size, jnp.int32).at[reconstruction.codes.ravel()].add(1)
    return total, jax.lax.stop_gradient(metrics)


def to_float(pixels: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]; float32 stays as it is."""
    return pixels.astype(jnp.float32) / 127.5 - 1 if pixels.dtype == jnp.uint8 else pixels


def to_uint8(pixels: jax.Array) -> jax.Array:
    """float32 in [-1, 1] -> uint8: clipped and rounded."""
    return jnp.round((jnp.clip(pixels, -1, 1) + 1) * 127.5).astype(jnp.uint8)
