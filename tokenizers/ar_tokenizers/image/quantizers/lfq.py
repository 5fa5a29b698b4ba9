"""LFQ and BSQ: a code consists of the signs of the latent. Axes: N positions, C code dim = bits, K = 2**C codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_tokenizers.image.quantizers.base import Quantizer, unit
from ar_tokenizers.image.quantizers.codebook import commitment, entropy


class LFQ(Quantizer):
    """Lookup-free quantisation: each of C numbers becomes its sign, and the signs are the binary digits of the code.

    Yu et al. 2023, arXiv:2310.05737 (MAGVIT-v2). The entropy penalty keeps the codes in use. Under softmax(-|z -
    code|^2) over all K codes, the digits are independent, and digit i is 1 with probability sigmoid(4 z_i). So the
    entropy of a position is a sum over its digits, and the mean probabilities of all K codes are one product of two [N,
    sqrt(K)] matrices. Both are exact for any K and need no [N, K] array.

    Raises:
      ValueError: K is not a power of two, or is less than 4.
    """

    def __init__(self, codes: int, *, beta: float = 0.25, entropy: float = 0.1) -> None:
        if codes < 4 or codes & (codes - 1):
            raise ValueError(
                f"{type(self).__name__} needs a number of codes that is a power of two and at least 4; got {codes}"
            )
        self.dim, self.codebook_size, self.beta, self.entropy = codes.bit_length() - 1, codes, beta, entropy
        self.length = 1.0  # absolute value of each component of a code vector

    def bound(self, z: jax.Array) -> jax.Array:
        """The unchanged latents, in float32."""
        return z.astype(jnp.float32)

    def nearest(self, bounded: jax.Array) -> jax.Array:
        """The signs of a latent as the bits of a number."""
        digits = (bounded > 0).astype(jnp.int32)
        return jnp.sum(digits << jnp.arange(self.dim, dtype=jnp.int32), axis=-1, dtype=jnp.int32)

    def vectors(self, codes: jax.Array) -> jax.Array:
        """The bits of codes as plus or minus `length`."""
        digits = codes[..., None] >> jnp.arange(self.dim, dtype=jnp.int32) & 1
        return jnp.where(digits == 1, jnp.float32(self.length), jnp.float32(-self.length))

    def loss(self, bounded: jax.Array, vectors: jax.Array) -> jax.Array:
        """The commitment loss and the entropy penalty, which is small if each latent is sure of its code and all codes
        are used equally.
        """
        loss = self.beta * commitment(bounded, vectors)
        if self.entropy:
            logits = 4 * bounded.reshape(-1, self.dim) / self.length
            each = jnp.mean(jnp.sum(_binary_entropy(logits), axis=-1))
            low, high = (_probabilities(half) for half in jnp.split(logits, [self.dim // 2], axis=1))
            mean = jnp.einsum("nl,nh->lh", low, high, precision="highest") / len(logits)
            loss += self.entropy * (each - entropy(mean))
        return loss


class BSQ(LFQ):
    """Binary spherical quantisation: LFQ with latents and codes on the unit sphere, so both are bounded.

    Zhao et al. 2024, arXiv:2406.07548. For the entropy penalty, latents are divided by the size of a code's components,
    1 / sqrt(C). So the probabilities of the digits are like those in LFQ, for any C.
    """

    def __init__(self, codes: int, *, beta: float = 0.25, entropy: float = 0.1) -> None:
        super().__init__(codes, beta=beta, entropy=entropy)
        self.length = self.dim**-0.5

    def bound(self, z: jax.Array) -> jax.Array:
        """Latents on the unit sphere."""
        return unit(z.astype(jnp.float32))


def _binary_entropy(logits: jax.Array) -> jax.Array:
    # This is computed from the logits, because log(1 - p) is wrong if p rounds to 1.
    return jax.nn.softplus(logits) - logits * jax.nn.sigmoid(logits)


def _probabilities(logits: jax.Array) -> jax.Array:
    """[N, c] logits of independent digits -> [N, 2**c] probabilities of the numbers with these digits."""
    p = jnp.ones((len(logits), 1))
    for digit in range(logits.shape[1]):
        each = logits[:, digit : digit + 1]
        p = jnp.concatenate([p * jax.nn.sigmoid(-each), p * jax.nn.sigmoid(each)], axis=1)
    return p
