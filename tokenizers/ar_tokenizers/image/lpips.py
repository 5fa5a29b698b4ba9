"""LPIPS: the perceptual distance of VGG16's features, used to train tokenizers and to report their quality.

Axes: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ar_tokenizers.image.weights import Params, Shapes, conv, conv_params, conv_shapes, max_pool

# The number of features of each convolution, by stage. Max pooling halves the image between stages.
_VGG: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _vgg_names() -> list[list[str]]:
    """torchvision's names of the convolutions, by stage. torchvision numbers all layers in one sequence, including relu
    and pooling."""
    index, names = 0, []
    for stage in _VGG:
        names.append([f"features.{index + 2 * i}" for i in range(len(stage))])
        index += 2 * len(stage) + 1
    return names


def _shapes() -> Shapes:
    shapes: Shapes = {f"lin{i}.model.1.weight": (1, stage[-1], 1, 1) for i, stage in enumerate(_VGG)}
    fan_in = 3
    for names, stage in zip(_vgg_names(), _VGG, strict=True):
        for name, fan_out in zip(names, stage, strict=True):
            shapes |= conv_shapes(name, fan_in, fan_out, (3, 3))
            fan_in = fan_out
    return shapes


SHAPES = _shapes()  # 13 convolutions of torchvision's VGG16, and the five heads of LPIPS


def arrange(arrays: Mapping[str, np.ndarray]) -> Params:
    """Converts the arrays of SHAPES, as they are in a file, to the parameters of `distance`."""
    heads = {f"lin{i}": arrays[f"lin{i}.model.1.weight"].reshape(-1) for i in range(len(_VGG))}
    return heads | {name: conv_params(arrays, name) for names in _vgg_names() for name in names}


def distance(params: Params, a: jax.Array, b: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """LPIPS of VGG16, version 0.1, of two batches of images: float32 [B, H, W, 3] in [-1, 1] twice -> float32 [B].

    Zhang et al. 2018, arXiv:1801.03924. The activations after each of five stages are normalised at each position.
    Their squared differences are weighted by learned heads, averaged over positions and summed over stages.

    Raises:
      ValueError: images have less than 16 pixels a side, so nothing is left after four halvings.
    """
    if min(a.shape[1:3]) < 16:
        raise ValueError(f"LPIPS needs images of at least 16 x 16 pixels, got {a.shape[1]} x {a.shape[2]}")
    shift, scale = jnp.array([-0.030, -0.088, -0.188]), jnp.array([0.458, 0.448, 0.450])
    x = ((jnp.concatenate([a, b]).astype(jnp.float32) - shift) / scale).astype(dtype)
    total = jnp.zeros(len(a), jnp.float32)
    for index, names in enumerate(_vgg_names()):
        x = max_pool(x, 2, 2) if index else x
        for name in names:
            x = jax.nn.relu(conv(params[name], x))
        unit = _unit(x.astype(jnp.float32))
        difference = jnp.square(unit[: len(a)] - unit[len(a) :])
        total += jnp.sum(difference * params[f"lin{index}"], axis=-1).mean((1, 2))
    return total


def _unit(x: jax.Array) -> jax.Array:
    """x / (|x| + 1e-10), with a finite gradient even at x = 0, where the gradient of the square root is infinite."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    some = square > 0
    return x / (jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0) + 1e-10)
