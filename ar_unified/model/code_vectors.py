"""The first values of the rows of image codes, in the embedding and in the head: similar for codes with similar
vectors.

The number of a code says nothing, but its image tokenizer has a vector for it. A transformer that starts from random
rows has to learn from its data which codes are neighbours. Here the rows say so from the start, and training may change
them.

K codes, C numbers in a code's vector, V vocabulary, D model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.tensors import Params

CODE_EMBEDDING_INITS = ("random", "codebook", "mean")  # how they may begin; the last in `extended_tables` alone


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


def extended_tables(
    params: Params, rows: np.ndarray, text_size: int, codes: range, how: str, vectors: jax.Array | None, key: jax.Array
) -> Params:
    """Parameters of a language model with new rows in its tables. The new rows begin around the mean of its text rows.

    A new id is then as likely as an average text piece, and not as likely as a logit of 0 makes it (Hewitt,
    "Initializing new word embeddings for pretrained language models", 2021). If the new rows are not all equal to the
    mean, they differ from it as much as the rows of text do. Jittable.

    Args:
      params: f32, with "embedding" and, untied, "head" [V_old, D].
      rows: int32 [V], for each row the number of the old row that it keeps, or -1.
      codes: the rows of image codes. text_size: of the old tables, the rows of text, which are the first.
      how: of CODE_EMBEDDING_INITS, for image codes: "mean", "random" about it, or "codebook": features of `vectors`,
        f32 [K, C], about it. Other new rows are the mean.
    """
    features_key, *keys = jax.random.split(key, 3)
    known = jnp.asarray(rows >= 0)[:, None]

    def one(table: jax.Array, key: jax.Array) -> jax.Array:
        text = table[:text_size]
        mean = text.mean(axis=0)
        spread = jnp.sqrt(jnp.mean((text - mean) ** 2))
        new = jnp.broadcast_to(mean, (len(rows), table.shape[1]))
        if how == "random":
            new = new.at[codes.start : codes.stop].add(spread * jax.random.normal(key, (len(codes), table.shape[1])))
        elif how == "codebook" and vectors is not None:
            features = random_features(vectors, table.shape[1], features_key)
            new = new.at[codes.start : codes.stop].add(spread * features)
        return jnp.where(known, table[jnp.asarray(np.maximum(rows, 0))], new)

    tables = [name for name in ("embedding", "head") if name in params]
    return params | {name: one(params[name], each) for name, each in zip(tables, keys, strict=False)}


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
