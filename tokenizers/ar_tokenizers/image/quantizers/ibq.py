"""IBQ: every choice updates every code. Axes: N positions, C code dim, K codebook size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.quantizers.base import Quantized, Quantizer
from ar_tokenizers.image.quantizers.codebook import check_sizes, entropy_penalty, nearest, pull_together, soft_lookup

TEMPERATURE = 0.1  # of the entropy penalty's softmax; the authors' 0.01 affects only latents between two codes


class IBQ(Quantizer):
    """Index backpropagation: it chooses the code with the largest dot product. The gradient is that of a softmax over
    all codes.

    Shi et al. 2024, arXiv:2412.02692. The straight-through estimator is applied to the one-hot choice, not to the
    vector, so the latent and every code get gradients through the scores of all K codes. IBQ needs its entropy penalty.
    The softmax works on one block of codes after another (codebook.py). So the full [N, K] array of scores never
    exists, neither in the forward nor in the backward pass.

    A code has 32 dimensions by default, because with the authors' 256 the codebook collapses on other data
    (TencentARC/SEED-Voken#59).
    """

    def __init__(self, codes: int, dim: int, *, beta: float = 0.25, entropy: float = 0.1, rngs: nnx.Rngs) -> None:
        check_sizes("IBQ", codes, dim)
        self.dim, self.codebook_size, self.beta, self.entropy = dim, codes, beta, entropy
        # normally distributed, like latents
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (codes, dim), jnp.float32))

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
        """The training pass: a hard choice in the forward pass, the softmax over all codes in the backward pass."""
        bounded, codebook = self.bound(z), self.codebook[...]
        codes = self.nearest(bounded)
        vectors, soft = self.vectors(codes), soft_lookup(bounded, codebook)
        through = vectors + (soft - jax.lax.stop_gradient(soft))
        loss = jnp.mean(jnp.square(through - bounded)) + pull_together(bounded, vectors, self.beta)
        if self.entropy:
            loss += self.entropy * entropy_penalty(bounded / TEMPERATURE, codebook)
        return Quantized(through, codes, loss, {})
