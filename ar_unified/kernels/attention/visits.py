"""The work of a kernel as a list: which block of queries meets which block of keys, one step after the other.

Each entry is one visit of an outer block (of queries in forward and dQ, of keys in dK/dV) to one block of the other
kind. Visits of one outer block lie together, so a kernel adds up in fast memory between FIRST and LAST. The list is as
long as the work: a grid of that length has no empty steps. Only an outer block that meets nothing (padding) gets one
visit that computes nothing, because its zeros must be written.

Where two cores work, each takes a part of the list that begins with an outer block and is about as long as the other's.

B batch, I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.kernels.attention.bounds import BlockRanges

FIRST, LAST = 1, 2  # the outer block's sums begin with this visit; end with it
MASKED, CLEAN = 4, 8  # some query sees some key, or all see all; with neither there is nothing to compute
_OTHER, _ROW = 4, 16  # how far the block numbers are shifted to make room


class Visits(NamedTuple):
    """int32 each. Two words an entry, because a TPU's scalar memory is small."""

    outer: jax.Array  # row of the batch << 16 | outer block
    inner: jax.Array  # other block << 4 | FIRST | LAST | MASKED | CLEAN
    cuts: jax.Array  # [cores + 1], core c has the entries from cuts[c] to before cuts[c + 1]; those behind hold nothing

    @property
    def steps(self) -> jax.Array:
        """The number of visits of the core that has most, []."""
        return jnp.diff(self.cuts).max()


def row(outer):
    """The row of the batch that a visit is of."""
    return outer >> _ROW


def outer_block(outer):
    """The block that a visit computes for."""
    return outer & ((1 << _ROW) - 1)


def inner_block(inner):
    """The block that a visit reads."""
    return inner >> _OTHER


def most(queries: int, keys: int, block_q: int, block_k: int, shift: int | None) -> int:
    """How many visits one row can make at most, in either direction: a causal row that is one document."""
    query_blocks, key_blocks = -(-queries // block_q), -(-keys // block_k)
    last = np.arange(1, query_blocks + 1) * block_q - 1 + (keys if shift is None else shift)
    met = np.clip(last // block_k + 1, 0, key_blocks)
    return int(met.sum()) + query_blocks + key_blocks  # each block may be one that meets nothing


def visits(outer: BlockRanges, by_query: BlockRanges, limit: int, *, outer_is_keys: bool, cores: int = 1) -> Visits:
    """The visits of all rows, at most `limit`.

    Args:
      outer: what each outer block meets: `by_query` itself or its `query_ranges`. It may be wider than the work (where
        padding lies between documents): `by_query` decides whether a visit computes, and whether with a mask.
      by_query: what each block of queries meets, from `key_ranges`.
      cores: how many share the visits; no more than there are outer blocks.
    """
    blocks = outer.begin.shape[1]
    begin = outer.begin.reshape(-1)
    count = jnp.maximum(outer.end.reshape(-1) - begin, 1)
    stop = jnp.cumsum(count)
    block = jnp.repeat(jnp.arange(count.size, dtype=jnp.int32), count, total_repeat_length=limit)
    step = jnp.arange(limit, dtype=jnp.int32)
    since = step - (stop - count)[block]
    other = begin[block] + since
    b, own = block // blocks, block % blocks
    i, j = (other, own) if outer_is_keys else (own, other)
    met, meets_all = (
        (lower[b, i] <= j) & (j < upper[b, i])
        for lower, upper in ((by_query.begin, by_query.end), (by_query.clean_begin, by_query.clean_end))
    )
    flags = FIRST * (since == 0) + LAST * (step + 1 == stop[block]) + MASKED * (met & ~meets_all) + CLEAN * meets_all
    # Every core gets a block: a core without one would write a block that it never computed.
    whole = jnp.arange(1, cores)
    last = jnp.clip(jnp.searchsorted(stop, stop[-1] * whole // cores), whole - 1, count.size - 1 - whole[::-1])
    cuts = jnp.concatenate([jnp.zeros(1, jnp.int32), stop[last], stop[-1:]]).astype(jnp.int32)
    return Visits(b << _ROW | own, other << _OTHER | flags.astype(jnp.int32), cuts)
