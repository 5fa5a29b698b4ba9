"""Where the rows of image codes begin, in the embedding and in the head: alike for codes that mean alike.

The number of a code says nothing, but its image tokenizer has a vector for it. A transformer that starts from random
rows has to find out from its data which codes are neighbours; here it is told, and is free to change it.

K codes, C numbers in a code's vector, V vocabulary, D model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]
CODE_EMBEDDING_INITS = ("random", "codebook")  # how they may begin


def init_from_codebook(params: Params, vectors: jax.Array, offset: int, key: jax.Array) -> Params:
    """`transformer.init`'s parameters with other rows offset ... offset + K - 1 in "embedding" and, untied, in "head".

    Both get the same features, as large as init would have made them. Jittable.

    Args:
      vectors: f32 [K, C], as `ImageTokenizer.vectors()` returns them.
    """
    features = random_features(vectors, params["embedding"].shape[1], key)
    rows = slice(offset, offset + len(vectors))
    small = features * features.shape[1] ** -0.5
    if "head" not in params:
        return params | {"embedding": params["embedding"].at[rows].set(small)}
    return params | {
        "embedding": params["embedding"].at[rows].set(features),
        "head": params["head"].at[rows].set(small),
    }


def random_features(vectors: jax.Array, width: int, key: jax.Array) -> jax.Array:
    """f32 [K, C] -> f32 [K, width], of mean square 1: two rows' product / width is about exp(-distance^2 / 2).

    Distances are those of the vectors in units of the codebook's radius, the root of their mean squared length about
    their mean, so that two codes at random are about sqrt(2) apart. Random Fourier features: Rahimi & Recht, "Random
    features for large-scale kernel machines", 2007.
    """
    centred = vectors - vectors.mean(axis=0)
    radius = jnp.sqrt(jnp.mean(jnp.sum(centred**2, axis=1)))
    directions, shifts = jax.random.split(key)
    angles = centred / jnp.maximum(radius, 1e-12) @ jax.random.normal(directions, (vectors.shape[1], width))
    return 2**0.5 * jnp.cos(angles + jax.random.uniform(shifts, (width,), maxval=2 * jnp.pi))
