"""SimVQ: a frozen codebook, mapped by one linear layer. Axes: C code dim, K codebook size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.quantizers.base import GRADIENTS, Quantizer
from ar_tokenizers.image.quantizers.codebook import check_gradient, check_sizes, nearest, nearness, pull_together


class SimVQ(Quantizer):
    """Vector quantisation with codes that move together: K fixed random vectors, and one trained linear layer.

    Every choice moves all codes through the layer, which keeps them in use. Zhu et al. 2024, arXiv:2411.02038. The
    lookup of vectors applies the layer too; the authors' code forgets this in `get_codebook_entry`. The codebook can
    collapse with the rotation gradient (lucidrains/vector-quantize-pytorch#177). It can also collapse with many
    dimensions, because few random codes lie near the encoder's first outputs: with 32 dimensions, only 10 of 1,024
    codes stayed in use (experiments/benchmarks/quantizers.py). So the default is 8 dimensions, as for vq.
    """

    def __init__(
        self, codes: int, dim: int, *, gradient: str = "straight_through", beta: float = 0.25, rngs: nnx.Rngs
    ) -> None:
        check_sizes("SimVQ", codes, dim)
        check_gradient(gradient)
        self.dim, self.codebook_size, self.beta, self.gradient = dim, codes, beta, gradient
        # normally distributed, like latents
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (codes, dim), jnp.float32))
        self.layer = nnx.Linear(dim, dim, param_dtype=jnp.float32, precision="highest", rngs=rngs)

    def table(self) -> jax.Array:
        """float32 [K, C]: the code vectors, which the linear layer makes from the fixed codebook."""
        return self.layer(jax.lax.stop_gradient(self.codebook[...]))

    def bound(self, z: jax.Array) -> jax.Array:
        """The unchanged latents, in float32."""
        return z.astype(jnp.float32)

    def nearest(self, bounded: jax.Array) -> jax.Array:
        """The nearest code by Euclidean distance."""
        table = self.table()
        return nearest(bounded, table, nearness(table))

    def vectors(self, codes: jax.Array) -> jax.Array:
        """The codes' rows of `table`."""
        return self.table()[codes]

    def through(self, bounded: jax.Array, vectors: jax.Array) -> jax.Array:
        """The codes' vectors. The setting `gradient` decides how gradients reach the latents."""
        return GRADIENTS[self.gradient](bounded, vectors)

    def loss(self, bounded: jax.Array, vectors: jax.Array) -> jax.Array:
        """The loss that pulls latents and codes together."""
        return pull_together(bounded, vectors, self.beta)
