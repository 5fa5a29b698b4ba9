"""Two numbers for each query say which keys it sees. They also give the blocks of keys that a block of queries needs.

In a packed row documents lie one after another, so a causal query sees one run of keys: from the first key of its
document (or of its window) to itself. The two ends of the run are the mask. Their minimum and maximum over a block of
queries say which blocks of keys must be read. The kernels use nothing else.

B batch, T query position, S key position, I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Bounds(NamedTuple):
    """Query t of a row sees the keys first[t] <= s <= last[t], where s counts from the first given key; if first > last
    it sees none. Both are int32 [B, T] and non-decreasing along a row, except at queries that see nothing.
    """

    first: jax.Array
    last: jax.Array


class BlockRanges(NamedTuple):
    """For each block of queries, the range begin <= j < end of the blocks of keys that it needs, int32 [B, blocks]; or
    the same with queries and keys exchanged.

    All queries of the block see all keys of the blocks clean_begin <= j < clean_end, so these need no mask. They lie
    between the left edge of a document and the diagonal.
    """

    begin: jax.Array
    end: jax.Array
    clean_begin: jax.Array
    clean_end: jax.Array


def make_bounds(
    doc_start: jax.Array,
    keys: int,
    *,
    window: int | None = None,
    q_offset: jax.Array | int = 0,
    kv_offset: jax.Array | int = 0,
) -> Bounds:
    """Bounds of queries at positions q_offset + t, for `keys` keys at positions kv_offset + s; see `attention`."""
    positions = jnp.arange(doc_start.shape[1], dtype=jnp.int32) + jnp.asarray(q_offset, jnp.int32).reshape(-1, 1)
    positions = jnp.broadcast_to(positions, doc_start.shape)
    first = doc_start if window is None else jnp.maximum(doc_start, positions - (window - 1))
    first, last = (x - jnp.asarray(kv_offset, jnp.int32).reshape(-1, 1) for x in (first, positions))
    first, last = jnp.maximum(first, 0), jnp.minimum(last, keys - 1)
    empty = first > last
    return Bounds(jnp.where(empty, keys, first), jnp.where(empty, -1, last))


def pad_queries(bounds: Bounds, length: int, keys: int) -> Bounds:
    """Pads the bounds to `length` queries. The added queries at the end see nothing."""
    pad = [(0, 0), (0, length - bounds.first.shape[1])]
    return Bounds(jnp.pad(bounds.first, pad, constant_values=keys), jnp.pad(bounds.last, pad, constant_values=-1))


def key_ranges(bounds: Bounds, keys: int, block_q: int, block_k: int) -> BlockRanges:
    """The blocks of keys that each block of queries needs, [B, I]. T is a multiple of block_q."""

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, block_q)

    first, last = blocks(bounds.first), blocks(bounds.last)
    begin, end = first.min(-1) // block_k, last.max(-1) // block_k + 1
    begin = jnp.where(last.max(-1) < 0, 0, begin)  # all of the block is padding, so the range is empty
    clean_begin = jnp.minimum(-(-first.max(-1) // block_k), end)
    clean_end = jnp.clip((last.min(-1) + 1) // block_k, clean_begin, end)
    return BlockRanges(begin, end, clean_begin, clean_end)


def query_ranges(by_query: BlockRanges, key_blocks: int) -> BlockRanges:
    """The blocks of queries that need each block of keys, [B, J], from `key_ranges`.

    The ranges are exact if bounds do not decrease along the row. If they do decrease, or if padding lies between
    documents, a range may be wider than needed. In these cases, clean blocks count as clean only if all blocks between
    the first and the last of them are clean.
    """

    def ends(begin: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        j = jnp.arange(key_blocks, dtype=jnp.int32)
        meets = (begin[..., None] <= j) & (j < end[..., None])  # [B, I, J]
        some = meets.any(1)
        first = jnp.where(some, jnp.argmax(meets, 1).astype(jnp.int32), 0)
        behind = jnp.where(some, meets.shape[1] - jnp.argmax(meets[:, ::-1], 1).astype(jnp.int32), 0)
        return first, behind, meets.sum(1) == behind - first

    begin, end, _ = ends(by_query.begin, by_query.end)
    clean_begin, clean_end, whole = ends(by_query.clean_begin, by_query.clean_end)
    return BlockRanges(begin, end, jnp.where(whole, clean_begin, 0), jnp.where(whole, clean_end, 0))
