"""Rows of the tables of ids that each adapter of a sampler has of its own, as of ids that its language model had not.

params["rows"]: {"embedding": {"at": i32 [V], which of the own rows an id has, or -1; "own": [A, n, D]},
                 "head": {part: {"at": i32 [n], ids, ascending; "own": [A, n, D]}}}, parts as in PARTS.

Number 0 is no adapter: there the own rows are the model's.

A adapters, n own rows, B rows of a batch, T positions, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

TABLES = ("embedding", "head")  # of ids, one row each
PARTS = ("text", "image", "rest")  # of the head: ids before image codes, image codes, ids behind them


def looked_up(x: jax.Array, tokens: jax.Array, rows: Mapping[str, jax.Array], adapter: jax.Array) -> jax.Array:
    """Embeddings x [B, T, D] of tokens int32 [B, T], where row b has the own rows of adapter[b]."""
    which = rows["at"][tokens]
    own = rows["own"][adapter[:, None], jnp.maximum(which, 0)]
    return jnp.where((which >= 0)[..., None], own.astype(x.dtype), x)


def with_own(
    logits: jax.Array, hidden: jax.Array, rows: Mapping[str, jax.Array], adapter: jax.Array, first: int = 0
) -> jax.Array:
    """logits f32 [B, ..., ids from `first`] of hidden states [B, ..., D], where row b has the own rows of adapter[b].

    One product for each adapter, so that a row's numbers do not depend on how many there are.
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
    """A tree like params["rows"] of the logical names of each leaf's axes: nothing is split."""
    return jax.tree.map(lambda leaf: (None,) * leaf.ndim, rows)
