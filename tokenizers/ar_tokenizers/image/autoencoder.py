"""A convolutional VQ-VAE for images of any H x W divisible by its factor.

Axes: B batch, H W pixels, h w codes (H/factor, W/factor x depth), K codebook size.

It has an encoder, a quantizer and a decoder, which the config chooses. If a quantizer has D codes per position, the
grid of codes is D times as wide: the D codes of a position are side by side, so other modules see a grid with one
code per cell.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image import movq, space_to_depth, vqgan
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.layers import Params, fresh

NO_DECODER = (
    "this image tokenizer can read images but not draw them, because its file has no decoder. If the model is "
    "Chameleon: the files for transformers have no decoder, but Meta's tokenizer/vqgan.ckpt has one: import that file "
    "too"
)


class Reconstruction(NamedTuple):
    """The result of a training pass of the autoencoder."""

    pixels: jax.Array  # float32 [B, H, W, 3], about [-1, 1], not clipped
    codes: jax.Array  # int32 [B, h, w]
    quantizer_loss: jax.Array  # float32 []
    quantizer_sums: dict[str, jax.Array]  # sums for the quantizer's `update_state`; {} if called without keys


class Autoencoder(nnx.Module):
    """pixels float32 [B, H, W, 3] in [-1, 1] -> Reconstruction.

    Args:
      decoder: if False, there is no decoder, and only `encode` works.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, decoder: bool = True) -> None:
        self.config = config
        self.quantizer = config.make_quantizer(rngs)
        backbone: Any = {"space_to_depth": space_to_depth, "vqgan": vqgan, "movq": movq}[config.backbone]
        self.encoder = backbone.Encoder(config, self.quantizer.dim, rngs=rngs)
        self.decoder: Any = backbone.Decoder(config, self.quantizer.dim, rngs=rngs) if decoder else None

    @staticmethod
    def bind(config: AutoencoderConfig, params: Params) -> Autoencoder:
        """Puts `params`, in the form of `init`, into a module. Call it inside the traced function.

        If the params have no "decoder", the module has no decoder.
        """
        graph, state = _abstract(config, "decoder" in params)
        state = jax.tree.map(lambda leaf: leaf, state)  # a copy
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def __call__(self, pixels: jax.Array, keys: jax.Array | None = None) -> Reconstruction:
        """keys: PRNG keys [B], one for each image; None: not training."""
        quantized = self.quantizer(self._latents(pixels), keys)
        codes = self._in_grid(quantized.codes)
        return Reconstruction(self.decoder(quantized.vectors), codes, quantized.loss, quantized.sums)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """float32 [B, H, W, 3] in [-1, 1] -> codes int32 [B, h, w]."""
        return self._in_grid(self.quantizer.encode(self._latents(pixels)))

    def decode(self, codes: jax.Array) -> jax.Array:
        """int32 [B, h, w] in [0, K) -> float32 [B, H, W, 3]: exactly as in the training pass."""
        if self.decoder is None:
            raise ValueError(NO_DECODER)
        depth = self.quantizer.depth
        if depth > 1:
            codes = codes.reshape(*codes.shape[:2], -1, depth)
        return self.decoder(self.quantizer.vectors(codes))

    def _in_grid(self, codes: jax.Array) -> jax.Array:
        return codes.reshape(*codes.shape[:2], -1)

    def _latents(self, pixels: jax.Array) -> jax.Array:
        self.config.grid(*pixels.shape[1:3])
        return self.encoder(pixels)


def init(config: AutoencoderConfig, key: jax.Array) -> Params:
    """Parameters: a nested dict of float32 arrays. Works under jax.jit and jax.eval_shape."""
    return nnx.to_pure_dict(nnx.state(Autoencoder(config, rngs=fresh(key)), nnx.Param))


@functools.lru_cache(maxsize=64)
def shapes(config: AutoencoderConfig) -> Params:
    """The shapes and dtypes of the parameters that `init` makes. Do not change the result: the next caller gets the
    same dict."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


@functools.lru_cache(maxsize=64)
def _abstract(config: AutoencoderConfig, decoder: bool) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=fresh(), decoder=decoder)))


def to_float(pixels: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]; float32 stays as it is."""
    return pixels.astype(jnp.float32) / 127.5 - 1 if pixels.dtype == jnp.uint8 else pixels


def to_uint8(pixels: jax.Array) -> jax.Array:
    """float32 in [-1, 1] -> uint8, clipped and rounded."""
    return jnp.round((jnp.clip(pixels, -1, 1) + 1) * 127.5).astype(jnp.uint8)
