"""IBQ: every choice moves every code. Axes: N positions, C code dim, K codebook size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.quantizers.base import Quantized, Quantizer
from ar_tokenizers.image.quantizers.codebook import check_sizes, entropy_penalty, nearest, pull_together, soft_lookup

TEMPERATURE = 0.1  # of the entropy penalty's softmax; the authors' 0.01 reaches only latents between two codes


class IBQ(Quantizer):
    """Index backpropagation: the code with the largest dot product, whose gradient is that of a softmax over all.

    Shi et al. 2024, arXiv:2412.02692. The straight-through step is on the one-hot choice and not on the vector: the
    latent gets gradients through the scores of all K codes, and so does every code. Needs its entropy penalty. The
    softmax walks over blocks of codes (codebook.py), so that the [N, K] scores never exist, forward or backward.

    A code has 32 numbers, because with the authors' 256 the codebook collapses on other data
    (TencentARC/SEED-Voken#59).
    """

    def __init__(self, codes: int, dim: int, *, beta: float = 0.25, entropy: float = 0.1, rngs: nnx.Rngs) -> None:
        check_sizes("IBQ", codes, dim)
        self.dim, self.codebook_size, self.beta, self.entropy = dim, codes, beta, entropy
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (codes, dim), jnp.float32))  # as latents

    def bound(self, z: jax.Array) -> jax.Array:
        """The unchanged latents, in float32."""
        return z.astype(jnp.float32)

    def nearest(self, bounded: jax.Array) -> jax.Array:
        """The code with the largest inner product."""
        return nearest(bounded, self.codebook[...])

    def vectors(self, codes: jax.Array) -> jax.Array:
        """The codes' rows of the codebook."""
        return self.codebook[...][codes]

    def __call__(self, z: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """The training pass: a hard choice forward, and the softmax over all codes backward."""
        bounded, codebook = self.bound(z), self.codebook[...]
        codes = self.nearest(bounded)
        vectors, soft = self.vectors(codes), soft_lookup(bounded, codebook)
        through = vectors + (soft - jax.lax.stop_gradient(soft))
        loss = jnp.mean(jnp.square(through - bounded)) + pull_together(bounded, vectors, self.beta)
        if self.entropy:
            loss += self.entropy * entropy_penalty(bounded / TEMPERATURE, codebook)
        return Quantized(through, codes, loss, {})
