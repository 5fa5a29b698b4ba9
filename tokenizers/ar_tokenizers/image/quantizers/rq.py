"""RQ: D codes per position. Each code approximates what the previous codes left over. Axes: C code dim, K codebook
size, D depth.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.quantizers.base import Quantized
from ar_tokenizers.image.quantizers.codebook import CodebookQuantizer, commitment, nearest, nearness


class RQ(CodebookQuantizer):
    """Residual quantisation: the nearest code, then the nearest code to the remainder, and so on, D times from one
    shared codebook.

    Lee et al. 2022, arXiv:2203.01941. The commitment loss is applied to every partial sum, so the first d codes of each
    position alone already give a coarser image.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        depth: int,
        codebook_update: str = "ema",
        gradient: str = "straight_through",
        beta: float = 0.25,
        restart: float = 0.1,
        rngs: nnx.Rngs,
    ) -> None:
        if depth < 1:
            raise ValueError(f"RQ needs a depth of at least 1, got {depth}")
        super().__init__(
            codes, dim, codebook_update=codebook_update, gradient=gradient, beta=beta, restart=restart, rngs=rngs
        )
        self.depth = depth

    def bound(self, z: jax.Array) -> jax.Array:
        """The unchanged latents, in float32."""
        return z.astype(jnp.float32)

    def nearest(self, bounded: jax.Array) -> jax.Array:
        """[..., C] -> int32 [..., D], or [...] at depth 1."""
        return self._without_depth(self._descend(bounded)[0])

    def vectors(self, codes: jax.Array) -> jax.Array:
        """int32 [..., D], or [...] at depth 1, -> [..., C]: the sum over depth, in order."""
        codes = codes[..., None] if self.depth == 1 else codes
        table, total = self.table(), jnp.zeros((*codes.shape[:-1], self.dim))
        for depth in range(self.depth):
            total = total + table[codes[..., depth]]
        return total

    def alone(self) -> jax.Array:
        """float32 [K, C]: what each code adds to the vector of its position."""
        return self.table()

    def __call__(self, z: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """The training pass. Each depth encodes what the previous depths left over."""
        bounded = self.bound(z)
        codes, rests = self._descend(jax.lax.stop_gradient(bounded))
        sums = {} if keys is None else self.sums(rests, codes, keys)
        chosen = self.table()[codes]
        loss = self.beta * commitment(bounded[..., None, :], jnp.cumsum(chosen, axis=-2))
        if self.codebook_update == "gradient":
            loss += jnp.mean(jnp.square(rests - chosen))
        codes = self._without_depth(codes)
        return Quantized(self.through(bounded, self.vectors(codes)), codes, loss, sums)

    def _without_depth(self, codes: jax.Array) -> jax.Array:
        """Removes the depth axis if the depth is 1, so that codes have the same shape as in the other quantizers."""
        return codes[..., 0] if self.depth == 1 else codes

    def _descend(self, bounded: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., C] -> codes int32 [..., D], and the remainder [..., D, C] that each of them approximates."""
        table, rest, codes, rests = jax.lax.stop_gradient(self.table()), bounded, [], []
        bias = nearness(table)
        for _ in range(self.depth):
            rests.append(rest)
            codes.append(nearest(rest, table, bias))
            rest = rest - table[codes[-1]]
        return jnp.stack(codes, -1), jnp.stack(rests, -2)
