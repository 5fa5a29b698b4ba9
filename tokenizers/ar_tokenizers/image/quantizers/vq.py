"""VQ on the unit sphere or in Euclidean space. Axes: C code dim, K codebook size."""

from __future__ import annotations

import jax
from flax import nnx

from ar_tokenizers.image.quantizers.base import unit
from ar_tokenizers.image.quantizers.codebook import (
    CodebookQuantizer,
    commitment,
    entropy_penalty,
    nearest,
    nearness,
    pull_together,
)

TEMPERATURE = 0.01  # of the entropy penalty's softmax over -distance^2 (LlamaGen, arXiv:2406.06525)

SPACES = ("sphere", "euclidean")


class VQ(CodebookQuantizer):
    """Vector quantisation on the unit sphere: the code with the largest cosine.

    Codes are low-dimensional and l2-normalised, as in ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627) and LlamaGen's VQ-16
    (arXiv:2406.06525). The codebook loss and the commitment loss are as in VQ-VAE (van den Oord et al. 2017,
    arXiv:1711.00937).

    Args:
      space: "sphere", or "euclidean": the code with the smallest distance, without normalisation, as in VQGAN
        (arXiv:2012.09841), Chameleon, LWM, MoVQGAN and Emu3.
      entropy: the weight of the entropy penalty; if 0, it is not computed.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        space: str = "sphere",
        codebook_update: str = "gradient",
        gradient: str = "straight_through",
        beta: float = 0.25,
        entropy: float = 0.0,
        restart: float = 0.1,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            codes, dim, codebook_update=codebook_update, gradient=gradient, beta=beta, restart=restart, rngs=rngs
        )
        if space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
        self.entropy, self.space = entropy, space

    def bound(self, z: jax.Array) -> jax.Array:
        """Latents in float32, normalised if the space is the sphere."""
        return self._placed(z.astype("float32"))

    def nearest(self, bounded: jax.Array) -> jax.Array:
        """The nearest code, by Euclidean distance or by angle."""
        table = self._placed(self.table())
        return nearest(bounded, table, nearness(table) if self.space == "euclidean" else 0.0)

    def vectors(self, codes: jax.Array) -> jax.Array:
        """The codes' rows of the codebook, normalised if the space is the sphere."""
        return self._placed(self.table())[codes]

    def loss(self, bounded: jax.Array, vectors: jax.Array) -> jax.Array:
        """The loss that pulls latents and codes together, and the entropy penalty if there is one."""
        if self.codebook_update == "ema":
            loss = self.beta * commitment(bounded, vectors)
        else:
            loss = pull_together(bounded, vectors, self.beta)
        if self.entropy:  # -|x - t|^2 is 2 x . t - |t|^2 plus a number that is the same for all codes
            table = self._placed(self.table())
            bias = 2 / TEMPERATURE * nearness(table) if self.space == "euclidean" else 0.0
            loss += self.entropy * entropy_penalty(bounded * (2 / TEMPERATURE), table, bias)
        return loss

    def _placed(self, vectors: jax.Array) -> jax.Array:
        return unit(vectors) if self.space == "sphere" else vectors
