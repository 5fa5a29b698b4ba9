"""QK-norm and RoPE of queries or keys, in one pass each way.

Differentiated by JAX, the chain keeps several float32 copies of its input. This one keeps its input as it came and one
reciprocal norm a head, and makes the rest again: between two matrix products everything is elementwise but for one sum
over H, which XLA fuses into a single read and write on every platform. A kernel of its own would save nothing more in
training; inside the attention kernel the keys would be normalised once per block of queries.

B batch, T position, N heads, H head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Rope = tuple[jax.Array, jax.Array]  # cos and sin, float32 [B, T, 1, H/2]


def qk_norm_rope(
    x: jax.Array, rope: Rope, scale: jax.Array | None = None, bias: jax.Array | None = None, *, eps: float = 1e-5
) -> jax.Array:
    """Rotated, normalised queries or keys.

    Args:
      x: [B, T, N, H].
      rope: cos and sin of each position's angles; the pairs that turn are (i, i + H/2), as in GPT-NeoX and Llama of
        Hugging Face. Not differentiated.
      scale, bias: float32 [H], shared by all heads, or [N, H]. Both: LayerNorm over H before the rotation (Chameleon, arXiv
        2405.09818). Scale alone: RMSNorm. Neither: no norm.

    Returns:
      [B, T, N, H] in the dtype of x; computed in float32.
    """
    return _op(eps, x, rope, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(eps, x, rope, scale, bias):
    return _forward(eps, x, rope, scale, bias)[0]


def _forward(eps, x, rope, scale, bias):
    if scale is None:
        return _rotate(x.astype(jnp.float32), rope).astype(x.dtype), (None, rope, None, None, None)
    centred = _centred(x, bias)
    rnorm = jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)
    normed = centred * (rnorm * scale)
    normed = normed if bias is None else normed + bias
    return _rotate(normed, rope).astype(x.dtype), (x, rope, scale, bias, rnorm)


def _backward(eps, residuals, out_bar):
    x, (cos, sin), scale, bias, rnorm = residuals
    normed_bar = _rotate(out_bar.astype(jnp.float32), (cos, -sin))  # a rotation's transpose turns back
    if x is None:
        return normed_bar.astype(out_bar.dtype), None, None, None
    unit = _centred(x, bias) * rnorm
    unit_bar = normed_bar * scale
    x_bar = unit_bar - unit * jnp.mean(unit_bar * unit, -1, keepdims=True)
    if bias is not None:
        x_bar -= jnp.mean(unit_bar, -1, keepdims=True)
    summed = tuple(range(4 - scale.ndim))  # over heads too, where they share the weights
    scale_bar = jnp.sum(normed_bar * unit, summed).astype(scale.dtype)
    bias_bar = None if bias is None else jnp.sum(normed_bar, summed).astype(bias.dtype)
    return (x_bar * rnorm).astype(x.dtype), None, scale_bar, bias_bar


_op.defvjp(_forward, _backward)


def _centred(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x in float32, for LayerNorm less its mean."""
    x = x.astype(jnp.float32)
    return x if bias is None else x - x.mean(-1, keepdims=True)


def _rotate(x: jax.Array, rope: Rope) -> jax.Array:
    cos, sin = rope
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
