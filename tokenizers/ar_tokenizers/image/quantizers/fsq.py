"""FSQ: a grid instead of a codebook. Axes: C code dim, K codebook size."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ar_tokenizers.image.quantizers.base import Quantizer

ACTIVATIONS = {"tanh": 1.0, "ifsq": 0.8}  # the slope of the tanh: 2 * sigmoid(1.6 z) - 1 is tanh(0.8 z)


class FSQ(Quantizer):
    """Finite scalar quantisation: number i of the C numbers is rounded to one of levels[i] values, and K =
    prod(levels).

    It has no codebook that could collapse, and no loss. Mentzer et al. 2023, arXiv:2309.15505. The shift that maps a
    zero latent to the middle level is computed with atanh, the inverse of the tanh in `bound` (the paper's code uses
    tan, which is slightly wrong).

    Args:
      activation: "tanh" as in the paper, or "ifsq", 2 * sigmoid(1.6 z) - 1, which spreads normally distributed latents
        almost evenly over the range (iFSQ, arXiv:2601.17124).

    Raises:
      ValueError: the activation is unknown, a number of levels is below 3 (the shift would be infinite), or there are
        more than 2**31 - 1 codes.
    """

    def __init__(self, levels: tuple[int, ...], activation: str = "tanh") -> None:
        if not levels or min(levels) < 3:
            raise ValueError(f"FSQ needs levels of at least 3 (5 is advised), got {levels}")
        if math.prod(levels) > 2**31 - 1:
            raise ValueError(f"FSQ levels {levels} make {math.prod(levels)} codes, more than int32 can count")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.levels = tuple(levels)
        self.slope = ACTIVATIONS[activation]
        self.dim = len(levels)
        self.codebook_size = math.prod(levels)

    def bound(self, z: jax.Array) -> jax.Array:
        """Maps latents smoothly into the range of each axis's levels; -1 and 1 are the outermost levels."""
        # An even number L of levels has no middle one: the levels are -L/2 ... L/2 - 1, half a step below a symmetric
        # range.
        reach = [(level - 1) / 2 for level in self.levels]
        offset = [0.5 if level % 2 == 0 else 0.0 for level in self.levels]
        shift = [math.atanh(o / r) for o, r in zip(offset, reach, strict=True)]
        steps = jnp.tanh(self.slope * z.astype(jnp.float32) + jnp.array(shift)) * jnp.array(reach) - jnp.array(offset)
        return steps / jnp.array(self._half, jnp.float32)

    def nearest(self, bounded: jax.Array) -> jax.Array:
        """Rounds each number to its nearest level. These levels are the digits of the code, in a mixed base."""
        half = jnp.array(self._half, jnp.int32)
        digits = jnp.round(bounded * half.astype(jnp.float32)).astype(jnp.int32) + half
        return jnp.sum(digits * jnp.array(self._basis, jnp.int32), axis=-1, dtype=jnp.int32)

    def vectors(self, codes: jax.Array) -> jax.Array:
        """The levels of codes, in [-1, 1]."""
        levels, half = jnp.array(self.levels, jnp.int32), jnp.array(self._half, jnp.int32)
        digits = codes[..., None] // jnp.array(self._basis, jnp.int32) % levels
        return (digits - half).astype(jnp.float32) / half.astype(jnp.float32)

    @property
    def _half(self) -> list[int]:
        return [level // 2 for level in self.levels]

    @property
    def _basis(self) -> list[int]:
        return [math.prod(self.levels[:index]) for index in range(len(self.levels))]
