"""The work depends on the documents: exactly the blocks that some query sees are visited."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.kernels.attention.bounds import key_ranges, make_bounds, pad_queries, query_ranges
from tests.kernels.cases import CASES, Case

BLOCKS = [(32, 32), (64, 16), (16, 64)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def ranges(case: Case, T: int, block_q: int, block_k: int):
    bounds = pad_queries(make_bounds(jnp.asarray(case.doc_start), case.T, window=case.window), T, case.T)
    by_query = key_ranges(bounds, case.T, block_q, block_k)
    return by_query, query_ranges(by_query, -(-case.T // block_k))


@pytest.mark.parametrize("block_q, block_k", BLOCKS)
@pytest.mark.parametrize("name", CASES)
def test_visited_blocks_are_exactly_those_that_meet(name, block_q, block_k):
    case = CASES[name]
    T = -(-case.T // block_q) * block_q
    by_query, by_key = ranges(case, T, block_q, block_k)
    q, s = np.arange(T)[:, None], np.arange(-(-case.T // block_k) * block_k)
    for row, doc_start in enumerate(case.doc_start):
        start = np.pad(doc_start, (0, T - case.T), constant_values=case.T)[:, None]
        seen = (start <= s) & (s <= q) & (q - s < (case.window or T)) & (s < case.T)  # as the definition says
        tiles = seen.reshape(T // block_q, block_q, -1, block_k)
        some, whole = tiles.any((1, 3)), tiles.all((1, 3))
        for found, visited, clean in ((by_query, some, whole), (by_key, some.T, whole.T)):
            begin, end, clean_begin, clean_end = (np.asarray(x[row])[:, None] for x in found)
            other = np.arange(visited.shape[1])
            np.testing.assert_array_equal((begin <= other) & (other < end), visited)
            np.testing.assert_array_equal((clean_begin <= other) & (other < clean_end), clean)


def test_what_counts_as_clean_is_clean_even_where_documents_go_back():
    """The result does not depend on whether doc_start is non-decreasing; only the amount of skipped work does."""
    T, block = 256, 16
    doc_start = np.zeros((1, T), np.int32)
    doc_start[:, 96:160] = 64  # these queries see fewer keys than their neighbours
    bounds = make_bounds(jnp.asarray(doc_start), T)
    by_query = key_ranges(bounds, T, block, block)
    s = np.arange(T)
    seen = (np.asarray(bounds.first)[0, :, None] <= s) & (s <= np.asarray(bounds.last)[0, :, None])
    tiles = seen.reshape(T // block, block, -1, block)
    whole, some = tiles.all((1, 3)), tiles.any((1, 3))
    for ranges, clean, visited in ((by_query, whole, some), (query_ranges(by_query, T // block), whole.T, some.T)):
        begin, end, clean_begin, clean_end = (np.asarray(x)[0][:, None] for x in ranges)
        other = np.arange(T // block)
        assert not ((clean_begin <= other) & (other < clean_end) & ~clean).any()
        assert ((begin <= other) & (other < end) | ~visited).all()
