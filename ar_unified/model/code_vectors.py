"""Initial values for the rows of image codes in the embedding and the head: codes with similar vectors get similar
rows.

The number of an image code has no meaning, but the image tokenizer has a vector for each code. A transformer with
random rows must learn from its data which codes are similar. The rows made here contain this similarity from the start,
and training may change them.

K codes, C length of a code's vector, V vocabulary, D model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.tensors import Params

CODE_EMBEDDING_INITS = ("random", "codebook", "mean")  # kinds of initial rows; "mean" only in `extended_tables`


def init_from_codebook(params: Params, vectors: jax.Array, offset: int, key: jax.Array) -> Params:
    """The parameters of `transformer.init` with new values in K rows, from row `offset` on. These rows are in
    "embedding" and, if untied, also in "head".

    Both tables get the same features, scaled as in `transformer.init`. Jittable.

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
    """The parameters of a language model with new rows in its tables. The new rows of a table start near the mean of
    its text rows.

    A new id is then as likely as an average text piece; with rows of zeros it would have a logit of 0 (Hewitt,
    "Initializing new word embeddings for pretrained language models", 2021). If new rows differ from the mean, they are
    about as far from it as the text rows are. Jittable.

    Args:
      params: f32, with "embedding" and, if untied, "head" [V_old, D].
      rows: int32 [V], for each row of the new tables the number of the old row that it copies; -1 for a new row.
      codes: the rows of image codes in the new tables.
      text_size: number of text rows in the old tables; they are the first rows.
      how: one of CODE_EMBEDDING_INITS, for image codes: "mean", "random" (mean plus noise), or "codebook" (mean plus
          features of `vectors`, f32 [K, C]). All other new rows are the mean.
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
    """f32 [K, C] -> f32 [K, width], with mean square 1. The dot product of two rows, divided by `width`, is about
    exp(-distance^2 / 2).

    Distances between vectors are in units of the codebook's radius (the root of the mean squared distance to their
    mean), so that two random codes are about sqrt(2) apart. Random Fourier features: Rahimi & Recht, "Random features
    for large-scale kernel machines", 2007.
    """
    centred = vectors - vectors.mean(axis=0)
    radius = jnp.sqrt(jnp.mean(jnp.sum(centred**2, axis=1)))
    directions, shifts = jax.random.split(key)
    angles = centred / jnp.maximum(radius, 1e-12) @ jax.random.normal(directions, (vectors.shape[1], width))
    return 2**0.5 * jnp.cos(angles + jax.random.uniform(shifts, (width,), maxval=2 * jnp.pi))
