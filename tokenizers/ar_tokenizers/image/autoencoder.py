"""A convolutional VQ-VAE for pictures of any H x W divisible by its factor.

Axes: B batch, H W pixels, h w codes (H/factor, W/factor x depth), C code dim, K codebook size, F features.

A quantiser with D codes a position makes the grid of codes D times as wide, depth innermost: whoever reads codes sees
one wider grid of single codes.

The first `patch` of the factor is a space-to-depth (Cosmos, arXiv:2501.03575, has a Haar transform there), the rest
halvings: nothing is computed at the resolution of the pixels, which is what makes small pictures cheap on a CPU.
Levels, residual blocks and mirrored decoder after VQGAN (Esser et al. 2020, arXiv:2012.09841), with RMSNorm over the
features of each position instead of GroupNorm, so that a code depends on its surroundings and not on statistics of the
whole picture. No discriminator and no perceptual loss here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image import quantizers

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """What an image tokenizer is. Raises ValueError where the numbers do not fit together."""

    factor: int = 16  # pixels along the side of one code
    patch: int = 4  # of which this many are folded into features at once
    width: int = 64  # features at the finest level
    multipliers: tuple[int, ...] = (1, 2, 2)  # x width, one per level: fine to coarse, log2(factor / patch) + 1 levels
    blocks: tuple[int, ...] = (0, 1, 2)  # residual blocks per level, in the encoder and again in the decoder
    quantizer: str = "fsq"  # one of quantizers.NAMES; the next ten are settings of quantizers.make
    levels: tuple[int, ...] = (8, 5, 5, 5)  # fsq: the codebook size is their product
    activation: str = "tanh"  # fsq: or "ifsq"
    codes: int = 1024  # all others: the codebook size
    code_dim: int = 0  # numbers in a code; 0: the quantiser's usual
    depth: int = 4  # rq: codes a position
    update: str = "gradient"  # vq, rq: what moves the codes; or "ema"
    gradient: str = "straight_through"  # vq, simvq, rq: or "rotation"
    beta: float = 0.25  # weight of the commitment
    entropy: float = -1.0  # weight of the entropy penalty; negative: the quantiser's usual
    restart: float = 0.1  # vq, rq: codes used less than this share of the mean become latents; 0: never
    l1_weight: float = 0.0
    l2_weight: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the networks' arithmetic; parameters and codes: float32

    def __post_init__(self) -> None:
        for name in ("multipliers", "blocks", "levels"):  # JSON and ml_collections bring lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        depth = (self.factor // max(self.patch, 1)).bit_length()
        if self.patch < 1 or depth < 1 or self.factor != self.patch << (depth - 1):
            raise ValueError(f"factor must be patch x a power of two, got factor {self.factor} and patch {self.patch}")
        for name in ("multipliers", "blocks"):
            if len(getattr(self, name)) != depth:
                raise ValueError(
                    f"factor {self.factor} and patch {self.patch} make {depth} levels, fine to coarse, "
                    f"but {name} has {len(getattr(self, name))}: {getattr(self, name)}"
                )
        if min(self.width, *self.multipliers) < 1 or min(self.blocks) < 0:
            raise ValueError(f"width and multipliers must be at least 1, and blocks at least 0: {self}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        self._sizes  # noqa: B018 (the quantiser checks its own numbers)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AutoencoderConfig:
        """Raises ValueError naming the keys that are no field."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"an AutoencoderConfig has no {unknown}; it has {known}")
        return cls(**values)

    def make_quantizer(self, rngs: nnx.Rngs) -> quantizers.Quantizer:
        return quantizers.make(**{name: getattr(self, name) for name in quantizers.SETTINGS}, rngs=rngs)

    @functools.cached_property
    def _sizes(self) -> quantizers.Quantizer:
        """The quantiser without its arrays."""
        return nnx.eval_shape(lambda: self.make_quantizer(nnx.Rngs(0)))

    @property
    def codebook_size(self) -> int:
        return self._sizes.codebook_size

    @property
    def codes_per_position(self) -> int:
        return self._sizes.depth

    @property
    def widths(self) -> tuple[int, ...]:
        """Features per level, fine to coarse."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Pixels -> the grid of codes (h, w). Raises ValueError unless both sides are multiples of the factor."""
        if height <= 0 or width <= 0 or height % self.factor or width % self.factor:
            raise ValueError(
                f"a picture of {height} x {width} pixels does not divide into codes of {self.factor} x {self.factor}: "
                f"resize, crop or pad both sides to multiples of {self.factor}"
            )
        return height // self.factor, width // self.factor * self.codes_per_position


class Reconstruction(NamedTuple):
    pixels: jax.Array  # float32 [B, H, W, 3], about [-1, 1]: not clipped
    codes: jax.Array  # int32 [B, h, w]
    quantizer_loss: jax.Array  # float32 []
    quantizer_sums: dict[str, jax.Array]  # for the quantiser's `settle`; {} without keys


class Autoencoder(nnx.Module):
    """pixels float32 [B, H, W, 3] in [-1, 1] -> Reconstruction."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.quantizer = config.make_quantizer(rngs)
        self.encoder = Encoder(config, self.quantizer.dim, rngs=rngs)
        self.decoder = Decoder(config, self.quantizer.dim, rngs=rngs)

    @staticmethod
    def bind(config: AutoencoderConfig, params: Params) -> Autoencoder:
        """The module that computes with `params`, as `init` made them; to be called inside the traced function."""
        graph, state = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def __call__(self, pixels: jax.Array, keys: jax.Array | None = None) -> Reconstruction:
        """keys: PRNG keys [B], one for each picture; None: not training."""
        quantized = self.quantizer(self._latents(pixels), keys)
        codes = self._in_grid(quantized.codes)
        return Reconstruction(self.decoder(quantized.vectors), codes, quantized.loss, quantized.sums)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """float32 [B, H, W, 3] in [-1, 1] -> codes int32 [B, h, w]."""
        return self._in_grid(self.quantizer.encode(self._latents(pixels)))

    def decode(self, codes: jax.Array) -> jax.Array:
        """int32 [B, h, w] in [0, K) -> float32 [B, H, W, 3]: exactly what the training pass makes of these codes."""
        depth = self.quantizer.depth
        if depth > 1:
            codes = codes.reshape(*codes.shape[:2], -1, depth)
        return self.decoder(self.quantizer.vectors(codes))

    def _in_grid(self, codes: jax.Array) -> jax.Array:
        return codes.reshape(*codes.shape[:2], -1)

    def _latents(self, pixels: jax.Array) -> jax.Array:
        self.config.grid(*pixels.shape[1:3])
        return self.encoder(pixels)


class Encoder(nnx.Module):
    """float32 [B, H, W, 3] -> float32 [B, h, w, C]."""

    def __init__(self, config: AutoencoderConfig, dim: int, *, rngs: nnx.Rngs) -> None:
        dtype, widths = jnp.dtype(config.dtype), config.widths
        self.patch, self.dtype = config.patch, dtype
        self.stem = _conv(3 * config.patch**2, widths[0], dtype=dtype, rngs=rngs)
        self.depth = len(widths)
        for index, (width, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            if index:
                setattr(self, f"down{index}", _linear(4 * widths[index - 1], width, dtype=dtype, rngs=rngs))
            setattr(self, f"level{index}", Level(width, blocks, dtype=dtype, rngs=rngs))
        self.norm = _norm(widths[-1], dtype=dtype, rngs=rngs)
        self.to_code = _linear(widths[-1], dim, dtype=jnp.float32, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.stem(space_to_depth(pixels.astype(self.dtype), self.patch))
        for index in range(self.depth):
            if index:
                x = getattr(self, f"down{index}")(space_to_depth(x, 2))
            x = getattr(self, f"level{index}")(x)
        return self.to_code(self.norm(x).astype(jnp.float32))


class Decoder(nnx.Module):
    """float32 [B, h, w, C] -> float32 [B, H, W, 3]: the encoder backwards."""

    def __init__(self, config: AutoencoderConfig, dim: int, *, rngs: nnx.Rngs) -> None:
        dtype, widths = jnp.dtype(config.dtype), config.widths
        self.patch, self.dtype = config.patch, dtype
        self.from_code = _linear(dim, widths[-1], dtype=jnp.float32, rngs=rngs)
        self.depth = len(widths)
        for index, (width, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            setattr(self, f"level{index}", Level(width, blocks, dtype=dtype, rngs=rngs))
            if index:
                setattr(self, f"up{index}", _linear(width, 4 * widths[index - 1], dtype=dtype, rngs=rngs))
        self.norm = _norm(widths[0], dtype=dtype, rngs=rngs)
        self.head = _conv(widths[0], 3 * config.patch**2, dtype=dtype, rngs=rngs)

    def __call__(self, vectors: jax.Array) -> jax.Array:
        x = self.from_code(vectors).astype(self.dtype)
        for index in reversed(range(self.depth)):
            x = getattr(self, f"level{index}")(x)
            if index:
                x = depth_to_space(getattr(self, f"up{index}")(x), 2)
        return depth_to_space(self.head(jax.nn.silu(self.norm(x))).astype(jnp.float32), self.patch)


class Level(nnx.Module):
    """Residual blocks at one resolution: [B, h', w', F] -> the same shape."""

    def __init__(self, width: int, blocks: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.blocks = blocks
        for index in range(blocks):
            setattr(self, f"block{index}", Block(width, dtype=dtype, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.blocks):
            x = getattr(self, f"block{index}")(x)
        return x


class Block(nnx.Module):
    """Pre-activation residual block of two 3 x 3 convolutions; the identity at the start of training."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.norm1 = _norm(width, dtype=dtype, rngs=rngs)
        self.conv1 = _conv(width, width, dtype=dtype, rngs=rngs)
        self.norm2 = _norm(width, dtype=dtype, rngs=rngs)
        self.conv2 = _conv(width, width, dtype=dtype, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        return x + self.conv2(jax.nn.silu(self.norm2(y)))


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


def _conv(fan_in: int, fan_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, **options: Any) -> nnx.Conv:
    return nnx.Conv(fan_in, fan_out, (3, 3), dtype=dtype, param_dtype=jnp.float32, rngs=rngs, **options)


def _linear(fan_in: int, fan_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(fan_in, fan_out, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def _norm(width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=1e-6, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
