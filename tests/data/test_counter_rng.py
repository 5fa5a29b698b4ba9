"""Random numbers as functions of counters: always the same, element by element."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_unified.data.counter_rng import hash64, key, permute, uniform


def test_the_numbers_never_change() -> None:
    """If an update changed the order, a resumed training would read some data twice and other data never."""
    stream = key(7, "photos", 2, "documents")
    assert stream == 11972208863723014850
    assert hash64(stream, np.arange(3)).tolist() == [675687589498238800, 6156229895404958697, 8166708023345935845]
    assert uniform(stream, 5) == 0.6392323974678459
    assert permute(np.arange(10), 10, stream).tolist() == [5, 9, 6, 0, 4, 3, 1, 7, 8, 2]


@given(size=st.integers(1, 3000), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_permute_is_a_permutation_and_element_wise(size: int, seed: int) -> None:
    whole = permute(np.arange(size), size, key(seed))
    assert np.array_equal(np.sort(whole), np.arange(size))
    some = np.arange(0, size, 7)
    assert np.array_equal(permute(some, size, key(seed)), whole[some])


def test_many_permutations_in_one_call_are_those_of_many_calls() -> None:
    sizes, streams = np.array([1, 7, 64, 65, 900]), np.array([key("a", i) for i in range(5)])
    index = np.array([0, 6, 63, 64, 899])
    found = permute(np.tile(index, 3), np.tile(sizes, 3), np.tile(streams, 3)).reshape(3, 5)
    alone = [int(permute(*each)) for each in zip(index, sizes, streams, strict=True)]
    assert found.tolist() == [alone] * 3


def test_permute_depends_on_the_stream() -> None:
    orders = {tuple(permute(np.arange(6), 6, key("a", seed))) for seed in range(50)}
    assert len(orders) > 40
