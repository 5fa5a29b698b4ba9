"""The interface of a quantizer: latents to codes, codes to vectors, and its losses.

Axes: B batch, C code dim, K codebook size.

A quantizer has three functions: `bound` maps a latent into the space of the codes, `nearest` finds the code, `vectors`
looks up its vector. The training pass uses the same three functions. So in training, the decoder gets the same vectors
that it later gets from codes, bit for bit. All arithmetic is float32 and int32, whatever the dtype of the networks is.
With bfloat16 indices, FSQ would lose half of its codebook (lucidrains/vector-quantize-pytorch#114).

Some quantizers also have a state besides their parameters, for example how often each code was used. Three functions
handle it: `init_state` makes it, every training pass returns `sums` over its positions, and `update_state` updates it
once per step. So the state is the same on any mesh, and is saved and restored with the rest of the training.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ar_tokenizers.image.layers import Params

State = dict[str, jax.Array]


class Quantized(NamedTuple):
    """The result of a training pass of a quantizer."""

    vectors: jax.Array  # float32 [B, ..., C]: exactly `vectors(codes)`, with a gradient for the latents
    codes: jax.Array  # int32 [B, ...] in [0, K); [B, ..., D] if the depth D is above 1
    loss: jax.Array  # float32 []: the quantizer's own loss, a mean over positions
    sums: dict[str, jax.Array]  # sums over positions for `update_state`, to be added over the parts of a batch; or {}


class Quantizer(nnx.Module):
    """The interface. `dim` is C, `codebook_size` is K, `depth` the number of codes that describe a position."""

    dim: int
    codebook_size: int
    depth: int = 1

    @abstractmethod
    def bound(self, z: jax.Array) -> jax.Array:
        """Any latents [..., C] -> float32 [..., C] in the space of the codes; differentiable."""

    @abstractmethod
    def nearest(self, bounded: jax.Array) -> jax.Array:
        """Bounded latents [..., C] -> the codes int32 [...]."""

    @abstractmethod
    def vectors(self, codes: jax.Array) -> jax.Array:
        """Codes int32 [...] in [0, K) -> float32 [..., C]."""

    def alone(self) -> jax.Array:
        """float32 [K, C]: the vector of each code. If the depth is above 1, this is what the code adds to the vector of
        its position."""
        return self.vectors(jnp.arange(self.codebook_size))

    def through(self, bounded: jax.Array, vectors: jax.Array) -> jax.Array:
        """The value of `vectors`, with a gradient that reaches the latents."""
        return straight_through(bounded, vectors)

    def loss(self, bounded: jax.Array, vectors: jax.Array) -> jax.Array:
        """The quantizer's own term in the loss of the autoencoder."""
        return jnp.zeros((), jnp.float32)

    def sums(self, bounded: jax.Array, codes: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        """The sums over a training batch that `update_state` needs."""
        return {}

    def encode(self, z: jax.Array) -> jax.Array:
        """Latents [..., C] -> codes int32 [...]."""
        return self.nearest(self.bound(z))

    def __call__(self, z: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """The training pass.

        Args:
          z: latents [B, ..., C] of any float dtype.
          keys: PRNG keys [B], one for each row; None: not training, so `sums` are {}.
        """
        bounded = self.bound(z)
        codes = self.nearest(bounded)
        vectors = self.vectors(codes)
        sums = {} if keys is None else self.sums(*jax.lax.stop_gradient((bounded, codes)), keys)
        return Quantized(self.through(bounded, vectors), codes, self.loss(bounded, vectors), sums)

    def init_state(self, params: Params) -> State:
        """The state before the first step.

        Args:
          params: the quantizer's own parameters, a dict of arrays.
        """
        return {}

    def update_state(self, params: Params, state: State, sums: dict[str, jax.Array]) -> tuple[Params, State]:
        """The parameters and the state after an optimiser step, from the sums over the step's whole batch."""
        return params, state


# ---- gradients --------------------------------------------------------------------------------------------------


def straight_through(latents: jax.Array, vectors: jax.Array) -> jax.Array:
    """[..., C] twice -> the value of the second with the gradient of the first (Bengio et al. 2013, arXiv:1308.3432).

    `latents` minus itself is exactly zero, so the value is exactly the code's. The usual `z + stop_gradient(vectors
    - z)` has a rounding error.
    """
    return jax.lax.stop_gradient(vectors) + (latents - jax.lax.stop_gradient(latents))


def rotation(latents: jax.Array, vectors: jax.Array) -> jax.Array:
    """Like `straight_through`, but the gradient is rotated and scaled by the map that turns the latent into its code.

    The rotation trick of Fifty et al. 2024, arXiv:2410.06424: two reflections, treated as constants.
    """
    latent, vector = jax.lax.stop_gradient((latents, vectors))
    here, there = unit(latent), unit(vector)
    middle = unit(here + there)
    along = lambda axis: axis * jnp.sum(axis * latents, axis=-1, keepdims=True)  # noqa: E731
    turned = latents - 2 * along(middle) + 2 * there * jnp.sum(here * latents, axis=-1, keepdims=True)
    turned = turned * norm(vector) / norm(latent)
    return vector + (turned - jax.lax.stop_gradient(turned))


GRADIENTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "straight_through": straight_through,
    "rotation": rotation,
}


def norm(vectors: jax.Array) -> jax.Array:
    """The norm, [..., C] -> [..., 1]. It is never zero, and its gradient at zero is finite."""
    return jnp.sqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + 1e-12)


def unit(vectors: jax.Array) -> jax.Array:
    """[..., C] -> unit vectors with the same directions; zero stays zero."""
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + 1e-12)
