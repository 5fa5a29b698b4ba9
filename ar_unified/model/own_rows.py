"""Table rows that belong to one adapter of a sampler, such as rows for ids that the language model lacked.

params["rows"]: {"embedding": {"at": i32 [V], the number of the own row of an id, or -1; "own": [A, n, D]},
                 "head": {part: {"at": i32 [n], ascending ids; "own": [A, n, D]}}}, parts as in PARTS.

Adapter 0 means no adapter: its own rows are copies of the model's rows.

A adapters, n own rows, B rows of a batch, T positions, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

TABLES = ("embedding", "head")  # tables with one row per id
PARTS = ("text", "image", "rest")  # parts of the head: ids before image codes, image codes, ids after them


def looked_up(x: jax.Array, tokens: jax.Array, rows: Mapping[str, jax.Array], adapter: jax.Array) -> jax.Array:
    """Embeddings x [B, T, D] of tokens int32 [B, T]. In batch row b, tokens with own rows get rows of adapter[b]."""
    which = rows["at"][tokens]
    own = rows["own"][adapter[:, None], jnp.maximum(which, 0)]
    return jnp.where((which >= 0)[..., None], own.astype(x.dtype), x)


def with_own(
    logits: jax.Array, hidden: jax.Array, rows: Mapping[str, jax.Array], adapter: jax.Array, first: int = 0
) -> jax.Array:
    """The logits f32 [B, ..., ids from `first`] of hidden states [B, ..., D]. In batch row b, ids with own rows get
    logits from the rows of adapter[b].

    Computes one product per adapter, so that a row's values do not depend on the number of adapters.
    """
    mine = adapter.reshape(-1, *[1] * (hidden.ndim - 1))

    def one(found: jax.Array, each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        number, table = each
        own = jnp.einsum("...D,nD->...n", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return jnp.where(mine == number, own, found), None

    A, n, _ = rows["own"].shape
    found, _ = jax.lax.scan(one, jnp.zeros((*hidden.shape[:-1], n), jnp.float32), (jnp.arange(A), rows["own"]))
    return logits.at[..., rows["at"] - first].set(found)


def logical_axes(rows: Any) -> Any:
    """A tree like params["rows"] with the logical axis names of each leaf. No axis is split."""
    return jax.tree.map(lambda leaf: (None,) * leaf.ndim, rows)
