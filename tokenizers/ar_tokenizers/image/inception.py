"""The InceptionV3 of FID, and the Frechet distance of two sets of images.

Axes: B batch, H W pixels, h w positions, F features.

FID (Heusel et al. 2017, arXiv:1706.08500) compares the features of one specific network with specific weights. This is
the TF-2015 Inception, which mseitzer/pytorch-fid ported to torch and which everybody uses. torchvision's weights, or
another way to resize, give a different number, which should be called FD-<name>.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_tokenizers.image.weights import Params, Shapes, conv, conv_params, conv_shapes, max_pool

SIDE, _EPSILON = 299, 1e-3


class Conv(NamedTuple):
    """Convolution, batch norm, relu. With stride 2 there is no padding; with stride 1 the size stays the same by
    default."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    valid: bool = False


# A tuple holds layers that follow one another; a list holds branches with the same input, whose results are
# concatenated.
Node = Conv | Callable[[jax.Array], jax.Array] | tuple | list


def _reduce(x: jax.Array) -> jax.Array:
    return max_pool(x, 3, 2)


def _largest(x: jax.Array) -> jax.Array:
    return max_pool(x, 3, 1, 1)


def _average(x: jax.Array) -> jax.Array:
    """The mean over windows of 3 x 3 positions. At the border, only positions inside the image count, as in TF-2015 and
    unlike torchvision."""

    def add(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return add(x) / add(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def _mixed_a(at: str, pooled: int) -> list[Node]:
    return [
        Conv(f"{at}.branch1x1", 64),
        (Conv(f"{at}.branch5x5_1", 48), Conv(f"{at}.branch5x5_2", 64, (5, 5))),
        (
            Conv(f"{at}.branch3x3dbl_1", 64),
            Conv(f"{at}.branch3x3dbl_2", 96, (3, 3)),
            Conv(f"{at}.branch3x3dbl_3", 96, (3, 3)),
        ),
        (_average, Conv(f"{at}.branch_pool", pooled)),
    ]


def _mixed_b(at: str) -> list[Node]:
    return [
        Conv(f"{at}.branch3x3", 384, (3, 3), 2),
        (
            Conv(f"{at}.branch3x3dbl_1", 64),
            Conv(f"{at}.branch3x3dbl_2", 96, (3, 3)),
            Conv(f"{at}.branch3x3dbl_3", 96, (3, 3), 2),
        ),
        _reduce,
    ]


def _mixed_c(at: str, width: int) -> list[Node]:
    return [
        Conv(f"{at}.branch1x1", 192),
        (
            Conv(f"{at}.branch7x7_1", width),
            Conv(f"{at}.branch7x7_2", width, (1, 7)),
            Conv(f"{at}.branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv(f"{at}.branch7x7dbl_1", width),
            Conv(f"{at}.branch7x7dbl_2", width, (7, 1)),
            Conv(f"{at}.branch7x7dbl_3", width, (1, 7)),
            Conv(f"{at}.branch7x7dbl_4", width, (7, 1)),
            Conv(f"{at}.branch7x7dbl_5", 192, (1, 7)),
        ),
        (_average, Conv(f"{at}.branch_pool", 192)),
    ]


def _mixed_d(at: str) -> list[Node]:
    return [
        (Conv(f"{at}.branch3x3_1", 192), Conv(f"{at}.branch3x3_2", 320, (3, 3), 2)),
        (
            Conv(f"{at}.branch7x7x3_1", 192),
            Conv(f"{at}.branch7x7x3_2", 192, (1, 7)),
            Conv(f"{at}.branch7x7x3_3", 192, (7, 1)),
            Conv(f"{at}.branch7x7x3_4", 192, (3, 3), 2),
        ),
        _reduce,
    ]


def _mixed_e(at: str, pool: Callable[[jax.Array], jax.Array]) -> list[Node]:
    return [
        Conv(f"{at}.branch1x1", 320),
        (
            Conv(f"{at}.branch3x3_1", 384),
            [Conv(f"{at}.branch3x3_2a", 384, (1, 3)), Conv(f"{at}.branch3x3_2b", 384, (3, 1))],
        ),
        (
            Conv(f"{at}.branch3x3dbl_1", 448),
            Conv(f"{at}.branch3x3dbl_2", 384, (3, 3)),
            [Conv(f"{at}.branch3x3dbl_3a", 384, (1, 3)), Conv(f"{at}.branch3x3dbl_3b", 384, (3, 1))],
        ),
        (pool, Conv(f"{at}.branch_pool", 192)),
    ]


NETWORK: Node = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2),
    Conv("Conv2d_2a_3x3", 32, (3, 3), valid=True),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    _reduce,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), valid=True),
    _reduce,
    _mixed_a("Mixed_5b", 32),
    _mixed_a("Mixed_5c", 64),
    _mixed_a("Mixed_5d", 64),
    _mixed_b("Mixed_6a"),
    _mixed_c("Mixed_6b", 128),
    _mixed_c("Mixed_6c", 160),
    _mixed_c("Mixed_6d", 160),
    _mixed_c("Mixed_6e", 192),
    _mixed_d("Mixed_7a"),
    _mixed_e("Mixed_7b", _average),
    _mixed_e("Mixed_7c", _largest),  # a maximum instead of a mean: a mistake of TF-2015 that is now part of FID
)


def _shapes(node: Node, fan_in: int) -> tuple[Shapes, int]:
    """The names of a node's convolutions in a file, and the number of features in the node's result."""
    if isinstance(node, Conv):
        at = node.name
        return conv_shapes(f"{at}.conv", fan_in, node.features, node.kernel, f"{at}.bn"), node.features
    if isinstance(node, list):
        parts = [_shapes(part, fan_in) for part in node]
        return {name: shape for shapes, _ in parts for name, shape in shapes.items()}, sum(out for _, out in parts)
    shapes: Shapes = {}
    for part in node if isinstance(node, tuple) else ():
        found, fan_in = _shapes(part, fan_in)
        shapes |= found
    return shapes, fan_in


SHAPES = _shapes(NETWORK, 3)[0]  # the arrays of pytorch-fid's file, without the classifier


def arrange(arrays: Mapping[str, np.ndarray]) -> Params:
    """Converts the arrays of SHAPES, as `read_weights` returns them, to the parameters of `pool3`."""
    names = [name.removesuffix(".conv.weight") for name in SHAPES if name.endswith(".conv.weight")]
    return {name: conv_params(arrays, f"{name}.conv", f"{name}.bn", _EPSILON) for name in names}


def pool3(params: Params, pixels: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] -> the features of FID, float32 [B, 2048].

    Images are resized to 299 x 299 pixels as in pytorch-fid: bilinear, half-pixel centres, no antialiasing, no
    rounding.

    Raises:
      ValueError: the images are not uint8. Other people could not reproduce the FID of images that are not rounded to
        8 bits.
    """
    if pixels.dtype != jnp.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"FID needs images uint8 [B, H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    x = pixels.astype(jnp.float32) / 255
    size = (len(x), SIDE, SIDE, 3)
    x = jax.image.resize(x, size, "bilinear", antialias=False, precision=jax.lax.Precision.HIGHEST)
    return _apply(params, NETWORK, 2 * x - 1).mean((1, 2))


def _apply(params: Params, node: Node, x: jax.Array) -> jax.Array:
    if isinstance(node, Conv):
        valid = node.valid or node.stride > 1
        return jax.nn.relu(conv(params[node.name], x, node.stride, "VALID" if valid else "SAME"))
    if isinstance(node, list):
        return jnp.concatenate([_apply(params, part, x) for part in node], axis=-1)
    if isinstance(node, tuple):
        for part in node:
            x = _apply(params, part, x)
        return x
    return node(x)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|mean1 - mean2|^2 + trace(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of two Gaussians, in float64.

    With r = cov1^(1/2), the trace of (cov1 cov2)^(1/2) equals the trace of (r cov2 r)^(1/2). This matrix is symmetric,
    so its eigenvalues are real, even with fewer images than features. No small number is added to the diagonals.

    Args:
      mean1, mean2: [F].
      cov1, cov2: [F, F], symmetric.

    Raises:
      ValueError: the shapes do not fit together, or a number is not finite.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2))
    f = mean1.size
    if mean1.shape != (f,) or mean2.shape != (f,) or cov1.shape != (f, f) or cov2.shape != (f, f):
        shapes = [list(x.shape) for x in (mean1, cov1, mean2, cov2)]
        raise ValueError(f"expected two means [F] and two covariances [F, F] with the same F, got {shapes}")
    if not all(np.isfinite(x).all() for x in (mean1, cov1, mean2, cov2)):
        raise ValueError("a mean or a covariance is not finite: features overflowed, or there was a single image")
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    both = np.linalg.eigvalsh(root @ cov2 @ root)
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(both.clip(0)).sum())
