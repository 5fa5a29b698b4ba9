"""What turns a vector into an index and back: FSQ and VQ behind one small interface.

Axes: C code dim, K codebook size. All arithmetic is float32 and int32 whatever the networks compute in: with bfloat16
indices FSQ loses half its codebook (lucidrains/vector-quantize-pytorch#114).

A quantiser says three things: `bound` brings a latent into the space of the codes, `nearest` finds the code, `vectors`
looks it up. The training pass is built from the same three, so that what the decoder learns from is bit for bit what
it gets from indices later. No quantiser has state outside its parameters.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Quantized(NamedTuple):
    vectors: jax.Array  # float32 [..., C]: exactly `vectors(codes)`, with the gradient of the latent
    codes: jax.Array  # int32 [...] in [0, K)
    loss: jax.Array  # float32 []: what the quantiser itself asks for


class Quantizer(nnx.Module):
    """The interface. `dim` is C, `codebook_size` is K."""

    dim: int
    codebook_size: int

    @abstractmethod
    def bound(self, z: jax.Array) -> jax.Array:
        """Latents [..., C] of any size -> float32 [..., C] in the space the codes live in; differentiable."""

    @abstractmethod
    def nearest(self, bounded: jax.Array) -> jax.Array:
        """Bounded latents [..., C] -> the codes int32 [...]."""

    @abstractmethod
    def vectors(self, codes: jax.Array) -> jax.Array:
        """Codes int32 [...] in [0, K) -> float32 [..., C]."""

    def loss(self, bounded: jax.Array, vectors: jax.Array) -> jax.Array:
        """What to add to the loss of the autoencoder."""
        return jnp.zeros((), jnp.float32)

    def encode(self, z: jax.Array) -> jax.Array:
        return self.nearest(self.bound(z))

    def __call__(self, z: jax.Array) -> Quantized:
        bounded = self.bound(z)
        codes = self.nearest(bounded)
        vectors = self.vectors(codes)
        # Straight-through (Bengio et al. 2013). The bracket is exactly zero, so the value is exactly the code's; the
        # usual `z + stop_gradient(vectors - z)` is off by a rounding error.
        through = jax.lax.stop_gradient(vectors) + (bounded - jax.lax.stop_gradient(bounded))
        return Quantized(through, codes, self.loss(bounded, vectors))


class FSQ(Quantizer):
    """Finite scalar quantisation: each of C numbers is rounded to one of levels[C] values, and K = prod(levels).

    No codebook, no loss, nothing that can collapse. Mentzer et al. 2023, arXiv:2309.15505. The shift that puts a zero
    latent on the middle level is atanh, the inverse of the bound (the paper's code has tan, which misses it slightly).

    Raises:
      ValueError: a level below 3 (its shift is infinite), or more than 2**31 - 1 codes.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        if not levels or min(levels) < 3:
            raise ValueError(f"FSQ needs levels of at least 3 (5 is advised), got {levels}")
        if math.prod(levels) > 2**31 - 1:
            raise ValueError(f"FSQ levels {levels} make {math.prod(levels)} codes, more than int32 can count")
        self.levels = tuple(levels)
        self.dim = len(levels)
        self.codebook_size = math.prod(levels)

    def bound(self, z: jax.Array) -> jax.Array:
        # An even number of levels has no middle: theirs sit at -L/2 ... L/2 - 1, half a step below a symmetric range.
        reach = [(level - 1) / 2 for level in self.levels]
        offset = [0.5 if level % 2 == 0 else 0.0 for level in self.levels]
        shift = [math.atanh(o / r) for o, r in zip(offset, reach, strict=True)]
        steps = jnp.tanh(z.astype(jnp.float32) + jnp.array(shift)) * jnp.array(reach) - jnp.array(offset)
        return steps / jnp.array(self._half, jnp.float32)

    def nearest(self, bounded: jax.Array) -> jax.Array:
        half = jnp.array(self._half, jnp.int32)
        digits = jnp.round(bounded * half.astype(jnp.float32)).astype(jnp.int32) + half
        return jnp.sum(digits * jnp.array(self._basis, jnp.int32), axis=-1, dtype=jnp.int32)

    def vectors(self, codes: jax.Array) -> jax.Array:
        levels, half = jnp.array(self.levels, jnp.int32), jnp.array(self._half, jnp.int32)
        digits = codes[..., None] // jnp.array(self._basis, jnp.int32) % levels
        return (digits - half).astype(jnp.float32) / half.astype(jnp.float32)

    @property
    def _half(self) -> list[int]:
        return [level // 2 for level in self.levels]

    @property
    def _basis(self) -> list[int]:
        return [math.prod(self.levels[:index]) for index in range(len(self.levels))]


class VQ(Quantizer):
    """Vector quantisation on the unit sphere: the code with the largest cosine.

    Low-dimensional and l2-normalised as in ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627) and LlamaGen's VQ-16
    (arXiv:2406.06525); codebook and commitment loss as in VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937), with
    beta on the commitment (taming-transformers' legacy code has it on the other).

    Args:
      pull: weight of drawing the codes that a batch does not use towards its latents, without which a code that
        nothing chooses never moves again. The restart of dead codes (Lee et al. 2022, arXiv:2203.01941) as a loss:
        it needs no counts kept between steps.
    """

    def __init__(self, codes: int, dim: int, *, beta: float, pull: float, rngs: nnx.Rngs) -> None:
        if codes < 2 or dim < 2:
            raise ValueError(f"VQ needs at least 2 codes of at least 2 dimensions, got {codes} of {dim}")
        self.dim, self.codebook_size, self.beta, self.pull = dim, codes, beta, pull
        self.codebook = nnx.Param(_unit(jax.random.normal(rngs.params(), (codes, dim), jnp.float32)))

    def bound(self, z: jax.Array) -> jax.Array:
        return _unit(z.astype(jnp.float32))

    def nearest(self, bounded: jax.Array) -> jax.Array:
        return jnp.argmax(self._cosines(bounded), axis=-1).astype(jnp.int32)

    def vectors(self, codes: jax.Array) -> jax.Array:
        return _unit(self.codebook[...])[codes]

    def loss(self, bounded: jax.Array, vectors: jax.Array) -> jax.Array:
        fixed = jax.lax.stop_gradient
        codebook = jnp.mean(jnp.square(fixed(bounded) - vectors))
        commitment = jnp.mean(jnp.square(bounded - fixed(vectors)))
        loss = codebook + self.beta * commitment
        if self.pull:
            latents, codes = fixed(bounded).reshape(-1, self.dim), self.nearest(bounded).ravel()
            used = jnp.zeros(self.codebook_size, bool).at[codes].set(True)
            goals = latents[jnp.arange(self.codebook_size) % len(latents)]  # another latent for each, as far as they go
            strays = jnp.mean(jnp.square(goals - _unit(self.codebook[...])), axis=-1)
            loss += self.pull * jnp.mean(jnp.where(used, 0.0, strays))
        return loss

    def _cosines(self, bounded: jax.Array) -> jax.Array:
        # HIGHEST: at an accelerator's default precision, neighbouring codes of a large codebook swap.
        return jnp.einsum("...c,kc->...k", bounded, _unit(self.codebook[...]), precision="highest")


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + 1e-12)
