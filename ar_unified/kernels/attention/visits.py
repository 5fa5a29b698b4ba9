"""The work of a kernel as a list of steps. Each step is a pair of a block of queries and a block of keys.

Each entry is one visit of an outer block (of queries in forward and dQ, of keys in dK/dV) to one block of the other
kind. Visits of one outer block follow each other, so a kernel keeps its sums in fast memory from FIRST to LAST. The
list is as long as the work, so the grid has no empty steps. The only exception is an outer block without any partner
(padding): it gets one visit that computes nothing, because its zeros must be written.

If there are two cores, the list is cut between two outer blocks into two parts of about the same length.

B batch, I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.kernels.attention.bounds import BlockRanges

FIRST, LAST = 1, 2  # the sums of the outer block begin with this visit; they end with this visit
MASKED, CLEAN = 4, 8  # some queries see some keys; all queries see all keys; no flag: nothing to compute
_OTHER, _ROW = 4, 16  # bits by which the other block and the row are shifted, to make room for the rest of a word


class Visits(NamedTuple):
    """int32 arrays. An entry has only two words, because a TPU's scalar memory is small."""

    outer: jax.Array  # row of the batch << 16 | outer block
    inner: jax.Array  # other block << 4 | FIRST | LAST | MASKED | CLEAN
    cuts: jax.Array  # [cores + 1]; core c has the entries cuts[c] to cuts[c + 1] - 1; entries after the last are empty

    @property
    def steps(self) -> jax.Array:
        """The number of visits of the busiest core, []."""
        return jnp.diff(self.cuts).max()


def row(outer):
    """The row of the batch to which a visit belongs."""
    return outer >> _ROW


def outer_block(outer):
    """The block that a visit computes for."""
    return outer & ((1 << _ROW) - 1)


def inner_block(inner):
    """The block that a visit reads."""
    return inner >> _OTHER


def most(queries: int, keys: int, block_q: int, block_k: int, shift: int | None) -> int:
    """The largest number of visits that one row can need, whether queries or keys are the outer blocks. A causal row
    that is a single document needs the most."""
    query_blocks, key_blocks = -(-queries // block_q), -(-keys // block_k)
    last = np.arange(1, query_blocks + 1) * block_q - 1 + (keys if shift is None else shift)
    met = np.clip(last // block_k + 1, 0, key_blocks)
    return int(met.sum()) + query_blocks + key_blocks  # a block without a partner has a visit, too


def visits(outer: BlockRanges, by_query: BlockRanges, limit: int, *, outer_is_keys: bool, cores: int = 1) -> Visits:
    """The visits of all rows, in arrays of `limit` entries.

    Args:
      outer: the blocks that each outer block visits: `by_query` itself, or its `query_ranges`. If padding lies between
        documents, a range may contain blocks without work; `by_query` decides whether a visit computes something and
        needs a mask.
      by_query: the blocks of keys for each block of queries, from `key_ranges`.
      cores: how many cores share the visits; at most the number of outer blocks.
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
