"""The layers over time of Emu3's vision tokenizer, as equivalent 2-D layers for a single picture.

Axes: B batch, h w codes, Z features at the codes; in published kernels F' features out, F features in, T taps.

Emu3 (arXiv:2409.18869; baaivision/Emu3, modeling_emu3visionvq.py) encodes a picture as four equal frames. Two
convolutions over time reduce them to one frame. The decoder makes four frames again, and the first is the picture.
Every convolution pads two zero frames before the first frame, so it is known in advance which frame each tap sees:

- The first halving has four taps and stride 2. Its first step sees two padding frames and two equal frames, so it
  equals a convolution with the sum of the last two taps. Its second step sees four equal frames, so it equals a
  convolution with the sum of all taps.
- The second halving sees two padding frames and these two results: its third tap sees the first result, its fourth tap
  the second.
- All other convolutions see one frame after the padding, with their last tap.

Batch norms use fixed statistics from training, so each is a scale and a shift.

`fold` computes these sums. The taps cannot be recovered from the sums, so the original layers are kept for an export.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ar_tokenizers.image.layers import Conv3x3

FACTOR = 4  # frames that two halvings reduce to one
_EPSILON = 1e-5  # epsilon of the batch norms
_FLOAT32 = jnp.dtype("float32")
_STATISTICS = ("weight", "bias", "running_mean", "running_var")
_COUNT = "num_batches_tracked"


class BeforeCodes(nnx.Module):
    """The encoder's layers after its last convolution: float32 [B, h, w, Z] -> the same shape."""

    def __init__(self, width: int, blocks: int, *, rngs: nnx.Rngs) -> None:
        self.halve0 = Conv3x3(width, 2 * width, dtype=_FLOAT32, rngs=rngs)  # the results of both steps, concatenated
        self.halve1 = Conv3x3(2 * width, width, dtype=_FLOAT32, rngs=rngs)
        self.stack = Stack(width, blocks, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Both halvings, then the blocks."""
        return self.stack(jax.nn.silu(self.halve1(jax.nn.silu(self.halve0(x)))))


class AfterCodes(nnx.Module):
    """The decoder's layers before its first convolution: float32 [B, h, w, Z] -> the same shape."""

    def __init__(self, width: int, blocks: int, *, rngs: nnx.Rngs) -> None:
        self.stack = Stack(width, blocks, rngs=rngs)
        self.double0 = Conv3x3(width, width, dtype=_FLOAT32, rngs=rngs)
        self.double1 = Conv3x3(width, width, dtype=_FLOAT32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The blocks, then both doublings."""
        return jax.nn.silu(self.double1(jax.nn.silu(self.double0(self.stack(x)))))


class Stack(nnx.Module):
    """Residual blocks with an Affine in place of each batch norm: [B, h, w, Z] -> the same shape."""

    def __init__(self, width: int, blocks: int, *, rngs: nnx.Rngs) -> None:
        self.blocks = blocks
        for index in range(blocks):
            setattr(self, f"block{index}", Block(width, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """All blocks in order."""
        for index in range(self.blocks):
            x = getattr(self, f"block{index}")(x)
        return x


class Block(nnx.Module):
    """A residual block: [B, h, w, Z] -> the same shape. At the start of training it is the identity."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = Affine(width), Affine(width)
        self.conv1 = Conv3x3(width, width, dtype=_FLOAT32, rngs=rngs)
        self.conv2 = Conv3x3(width, width, dtype=_FLOAT32, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Two convolutions, added to the input."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        return x + self.conv2(jax.nn.silu(self.norm2(y)))


class Affine(nnx.Module):
    """A scale and a shift of every feature."""

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale and shift of every feature: a batch norm with fixed statistics."""
        return x * self.scale[...] + self.bias[...]


# ---- as published -----------------------------------------------------------------------------------------------


def published_shapes(width: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """The shape of every array that `fold` takes, by its published name. The original and transformers have the same
    names.

    Kernels are [F', F, T, 3, 3]; those of the two convolutions next to the codes are [F', F, T, 1, 1].
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, *window: int) -> None:
        shapes[f"{name}.conv.weight"], shapes[f"{name}.conv.bias"] = (width, width, *window), (width,)

    for side, taps in (("encoder", 4), ("decoder", 3)):
        for index in range(2):
            conv(f"{side}.time_conv.{index}.conv", taps, 3, 3)
        for index in range(blocks):
            block = f"{side}.time_res_stack.{index}"
            for half in (1, 2):
                conv(f"{block}.conv{half}", 3, 3, 3)
                shapes |= {f"{block}.norm{half}.{name}": (width,) for name in _STATISTICS}
                shapes[f"{block}.norm{half}.{_COUNT}"] = ()
    for name in ("quant_conv", "post_quant_conv"):
        conv(name, 3, 1, 1)
    return shapes


def fold(published: Mapping[str, np.ndarray], blocks: int) -> dict[str, dict[str, object]]:
    """Converts the arrays of `published_shapes` to the float32 arrays that replace them in our encoder and decoder.

    Returns:
      {"encoder": {"temporal": BeforeCodes, "to_code": ...}, "decoder": {"temporal": AfterCodes, "from_code": ...}}
    """

    def stack(side: str) -> dict[str, object]:
        return {f"block{index}": block(f"{side}.time_res_stack.{index}") for index in range(blocks)}

    def block(at: str) -> dict[str, object]:
        convs = {name: last_tap(f"{at}.{name}.conv") for name in ("conv1", "conv2")}
        return convs | {name: affine(f"{at}.{name}") for name in ("norm1", "norm2")}

    def affine(at: str) -> dict[str, np.ndarray]:
        weight, shift, mean, variance = (np.asarray(published[f"{at}.{name}"], np.float64) for name in _STATISTICS)
        scale = weight / np.sqrt(variance + _EPSILON)
        return {"scale": scale.astype(np.float32), "bias": (shift - mean * scale).astype(np.float32)}

    def last_tap(at: str) -> dict[str, np.ndarray]:
        return {"kernel": _kernel(taps(at)[-1]), "bias": bias(at)}

    def bias(at: str) -> np.ndarray:
        return np.asarray(published[f"{at}.bias"], np.float32)

    def taps(at: str) -> np.ndarray:  # [T, F', F, 3, 3] in float64, so that a sum of taps is rounded only once
        return np.moveaxis(np.asarray(published[f"{at}.weight"], np.float64), 2, 0)

    def product(at: str) -> dict[str, np.ndarray]:
        tap = last_tap(at)
        return tap | {"kernel": tap["kernel"][0, 0]}

    first, second = (f"encoder.time_conv.{index}.conv.conv" for index in range(2))
    steps = [_kernel(taps(first)[2:].sum(0)), _kernel(taps(first).sum(0))]
    before = {
        "halve0": {"kernel": np.concatenate(steps, 3), "bias": np.tile(bias(first), 2)},
        "halve1": {
            "kernel": np.concatenate([_kernel(tap) for tap in taps(second)[2:]], 2),
            "bias": bias(second),
        },
        "stack": stack("encoder"),
    }
    doubles = {f"double{index}": last_tap(f"decoder.time_conv.{index}.conv.conv") for index in range(2)}
    return {
        "encoder": {"temporal": before, "to_code": product("quant_conv.conv")},
        "decoder": {"temporal": {"stack": stack("decoder")} | doubles, "from_code": product("post_quant_conv.conv")},
    }


def _kernel(tap: np.ndarray) -> np.ndarray:
    """One tap [F', F, 3, 3] -> float32 [3, 3, F, F']."""
    return np.ascontiguousarray(tap.transpose(2, 3, 1, 0), np.float32)
