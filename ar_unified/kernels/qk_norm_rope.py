"""QK-norm and RoPE of queries or keys, in one pass forward and one pass backward.

JAX's own derivative of these operations keeps several float32 copies of the input. The derivative here keeps only
the input and one reciprocal norm per head, and computes the rest again. Everything between the projection and the
product q k is elementwise, except for sums over H. XLA fuses it on every platform, so that only the input is read and
the output written. This is not a part of the attention kernel, because there keys would be normalised again for each
block of queries.

The rotation of pairs (i, i + H/2) is x * cos + (x with its halves swapped) * sin.

B batch, T position, N heads, H head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# float32 [B, T, 1, H] each: cos for both values of a pair; -sin for one value and sin for the other
Rope = tuple[jax.Array, jax.Array]


def qk_norm_rope(
    x: jax.Array, rope: Rope, scale: jax.Array | None = None, bias: jax.Array | None = None, *, eps: float = 1e-5
) -> jax.Array:
    """Rotated, normalised queries or keys.

    Args:
      x: [B, T, N, H].
      rope: cos and signed sin of each position's angles; pairs (i, i + H/2) are rotated, as in Hugging Face's GPT-NeoX
        and Llama. Not differentiated.
      scale, bias: float32 [H], shared by all heads, or [N, H]. Both: LayerNorm over H before the rotation (Chameleon,
        arXiv 2405.09818). Scale alone: RMSNorm. Neither: no norm.

    Returns:
      [B, T, N, H] in the dtype of x; computed in float32.
    """
    return _op(eps, x, rope, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(eps, x, rope, scale, bias):
    return _forward(eps, x, rope, scale, bias)[0]


def _forward(eps, x, rope, scale, bias):
    if scale is None:
        return _rotated(x, rope, _wide).astype(x.dtype), (None, rope, None, None, None)
    mean = _mean(x, bias)
    rnorm = jax.lax.rsqrt(jnp.mean(jnp.square(_centred(x, mean)), -1, keepdims=True) + eps)

    def normed(x, scale, bias=None):
        y = _centred(x, mean) * (rnorm * scale)
        return y if bias is None else y + bias

    weights = (scale,) if bias is None else (scale, bias)
    return _rotated(x, rope, normed, *weights).astype(x.dtype), (x, rope, scale, bias, rnorm)


def _backward(eps, residuals, out_bar):
    x, (cos, sin), scale, bias, rnorm = residuals
    normed_bar = _rotated(out_bar, (cos, -sin), _wide)  # the transpose of a rotation is its inverse
    if x is None:
        return normed_bar.astype(out_bar.dtype), None, None, None
    unit = _centred(x, _mean(x, bias)) * rnorm
    unit_bar = normed_bar * scale
    x_bar = unit_bar - unit * jnp.mean(unit_bar * unit, -1, keepdims=True)
    if bias is not None:
        x_bar -= jnp.mean(unit_bar, -1, keepdims=True)
    summed = tuple(range(4 - scale.ndim))  # the sums include heads if these share the weights
    scale_bar = jnp.sum(normed_bar * unit, summed).astype(scale.dtype)
    bias_bar = None if bias is None else jnp.sum(normed_bar, summed).astype(bias.dtype)
    return (x_bar * rnorm).astype(x.dtype), None, scale_bar, bias_bar


_op.defvjp(_forward, _backward)


def _mean(x: jax.Array, bias: jax.Array | None) -> jax.Array | None:
    """The mean over H for LayerNorm, float32 [B, T, N, 1]; None for RMSNorm, which has no mean."""
    return None if bias is None else x.astype(jnp.float32).mean(-1, keepdims=True)


def _centred(x: jax.Array, mean: jax.Array | None) -> jax.Array:
    x = x.astype(jnp.float32)
    return x if mean is None else x - mean


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _rotated(x: jax.Array, rope: Rope, seen: Callable[..., jax.Array], *weights: jax.Array) -> jax.Array:
    """Rotates the result of seen(x, *weights), which is float32. The function `seen` is elementwise.

    A TPU's vector has 128 lanes, and splitting it at lane 64 makes padded copies. So on a TPU the matrix unit swaps the
    halves of x, without rounding. On other devices a split costs nothing, and a product would double the work.
    """
    cos, sin = rope
    half = x.shape[-1] // 2

    def cut(x):
        a, b = jnp.split(seen(x, *weights), 2, -1)
        c, s = cos[..., half:], sin[..., half:]
        return jnp.concatenate([a * c - b * s, b * c + a * s], -1)

    def exchanged(x):
        order = jnp.asarray(np.roll(np.eye(2 * half), half, -1), x.dtype)
        exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        other = seen(jnp.einsum("BTNH,HI->BTNI", x, order, precision=exact), *(jnp.roll(w, half, -1) for w in weights))
        return seen(x, *weights) * cos + other * sin

    return jax.lax.platform_dependent(x, tpu=exchanged, default=cut)
