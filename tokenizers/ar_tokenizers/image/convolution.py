"""The 3 x 3 convolutions of all backbones: they keep, halve or double the size.

Axes: B batch, H W rows and columns, F features, F' features of the result; R = H/4 strips of four rows. Kernels are
float32; the arithmetic and the result have the dtype of x.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Winograd's minimal filtering of 4 results by 3 taps, F(4, 3), at the points 0, 1, -1, 2, -2 and infinity:
# correlate(d, g) = RESULT @ ((TAPS @ g) * (DATA @ d)), 6 products in place of 12. Lavin & Gray, arXiv:1509.09308.
_DATA = np.array(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
     [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]], np.float32,
)  # fmt: skip
_TAPS = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float32) / 24
_RESULT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32)


def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, F] * [3, 3, F, F'] -> [B, H, W, F'], padded with zeros on all sides.

    On a CPU, wide float32 convolutions use `winograd`, which needs half of the products. Its results differ by 1e-5
    from the plain sum.
    """
    wide = x.shape[1] % 4 == 0 and x.shape[3] >= 128
    if wide and x.dtype == jnp.float32 and jax.default_backend() == "cpu":
        return winograd(x, kernel)
    return _conv(x, kernel, [(1, 1), (1, 1)])


def halving_conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, F] * [3, 3, F, F'] -> [B, H/2, W/2, F']; H and W are even.

    Window i begins at pixel 2i, so zeros are added only below and to the right, as in taming-transformers.
    """
    return _conv(x, kernel, [(0, 1), (0, 1)], stride=2)


def doubling_conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """conv3x3 of x at double size (each position repeated 2 x 2 times): [B, H, W, F] * [3, 3, F, F'] -> [B, 2H, 2W,
    F'].

    Taps of the kernel that are multiplied by the same position of x are added first. So each of the four kinds of
    results (even and odd rows, even and odd columns) is a 2 x 2 convolution of x, and together they need 16 products
    instead of 36.
    """
    b, h, w, _ = x.shape
    rows = [
        [_conv(x, taps, [(1 - i, i), (1 - j, j)]) for j, taps in enumerate(_two_taps(half, axis=1))]
        for i, half in enumerate(_two_taps(kernel, axis=0))
    ]
    return jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2).reshape(b, 2 * h, 2 * w, -1)


def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, F] * [3, 3, F, F'] -> [B, H, W, F'], padded with zeros on all sides; H is a multiple of 4.

    Only the rows are transformed: whole rows are added in memory order, and an ordinary 1 x 3 convolution does the
    columns. If the columns were transformed too, the additions would cost more than the products, because XLA does them
    one by one.
    """
    b, h, w, f = x.shape
    strips = jnp.pad(x, ((0, 0), (1, 3), (0, 0), (0, 0))).reshape(b, h // 4 + 1, 4, w, f)
    data = [
        strips[:, :-1, i] if i < 4 else strips[:, 1:, i - 4] for i in range(6)
    ]  # six arrays [B, R, W, F]: array i has row i of every strip
    taps = jnp.einsum("ti,ijfg->tjfg", _TAPS, kernel, precision="highest")
    products = [_conv(_combine(row, data), tap[None], [(0, 0), (1, 1)]) for row, tap in zip(_DATA, taps, strict=True)]
    return jnp.stack([_combine(row, products) for row in _RESULT], axis=2).reshape(b, h, w, -1)


def _two_taps(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns the kernels for even and for odd results. Each has two taps instead of three, because taps at copies of
    the same position are added."""
    first, second, third = jnp.split(kernel, 3, axis)
    return jnp.concatenate([first, second + third], axis), jnp.concatenate([first + second, third], axis)


def _combine(weights: np.ndarray, arrays: list[jax.Array]) -> jax.Array:
    terms = [weight * array for weight, array in zip(weights.tolist(), arrays, strict=True) if weight]
    return sum(terms[1:], terms[0])


def _conv(x: jax.Array, kernel: jax.Array, padding: list[tuple[int, int]], stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
