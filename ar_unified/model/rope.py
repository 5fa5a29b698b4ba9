"""Angles of rotary positions (RoPE, arXiv 2104.09864), and two published ways to stretch them for longer texts.

B batch, T position, H head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ar_unified.kernels.qk_norm_rope import Rope
from ar_unified.model.config import TransformerConfig


def rope_angles(config: TransformerConfig, positions: jax.Array) -> Rope:
    """cos and sin of position * frequency for positions [B, T], float32 [B, T, 1, H], as `qk_norm_rope` takes them."""
    angles = positions.astype(jnp.float32)[..., None, None] / _wavelengths(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def rope_table(config: TransformerConfig, positions: jax.Array, length: int) -> Rope:
    """The same result as `rope_angles`, from a table of `length` positions; NaN for a position beyond the table.

    This is for XLA CPU, which would compute cos and sin of `rope_angles` again for each head of each layer.
    """

    def look_up(x: jax.Array) -> jax.Array:
        table = jnp.pad(x[0], [(0, 1), (0, 0), (0, 0)], constant_values=jnp.nan)
        return table.at[positions].get(mode="clip")

    cos, sin = rope_angles(config, jnp.arange(length)[None])
    return look_up(cos), look_up(sin)


def _wavelengths(config: TransformerConfig) -> jax.Array:
    """The wavelengths divided by 2 pi: theta^(2i/H), float32 [H/2], stretched as the config says.

    "linear" multiplies all wavelengths by `rope_factor`. "llama3" (Llama 3.1's model card and code) multiplies only the
    wavelengths that have fewer than `rope_low` turns in the original length. It does not change wavelengths with more
    than `rope_high` turns, and it blends the two in between.
    """
    H = config.head_dim
    wavelengths = config.rope_theta ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if config.rope_scaling == "linear":
        return wavelengths * config.rope_factor
    if config.rope_scaling == "llama3":
        turns = config.rope_original_length / (2 * math.pi * wavelengths)
        kept = jnp.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0.0, 1.0)
        return wavelengths / (kept + (1.0 - kept) / config.rope_factor)
    return wavelengths
