from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_unified.data.packing import PERIOD, Mixture, Packing


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=400), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_every_epoch_has_every_document_once_in_rows_that_fit(lengths: list[int], seed: int) -> None:
    sizes = np.array(lengths)
    packing = Packing(sizes, 64, seed=seed)
    for epoch in (0, 5):
        rows = packing.documents(epoch, np.arange(packing.rows))
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(sizes)))
        assert max(sizes[row].sum() for row in rows) <= 64
        alone = [packing.documents(epoch, np.array([r]))[0] for r in range(packing.rows)]
        assert all(np.array_equal(a, b) for a, b in zip(rows, alone, strict=True))


def test_rows_are_well_filled_and_differ_between_epochs() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 2000)
    packing = Packing(lengths, 512, seed=0)
    assert packing.fill > 0.99
    rows = np.arange(packing.rows)
    companions = [{frozenset(row.tolist()) for row in packing.documents(epoch, rows)} for epoch in (0, 1)]
    assert len(companions[0] & companions[1]) < 0.05 * packing.rows


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'recipes'.*1 to 8 tokens, found 3 to 9"):
        Packing(np.array([3, 9]), 8, seed=0, name="recipes")


def test_mixture_keeps_weights_in_every_stretch_and_epochs_of_each_source_apart() -> None:
    mixture = Mixture([10, 1000, 3], [0.25, 0.75, 0.0])
    picks = mixture.picks(0, 3 * PERIOD)
    for start in range(0, 3 * PERIOD, 64):
        assert (picks.source[start : start + 64] == 0).sum() == 16
    first = [(e, i) for s, e, i in zip(picks.source, picks.epoch, picks.item, strict=True) if s == 0]
    assert first == [(k // 10, k % 10) for k in range(len(first))]
    assert not (picks.source == 2).any()


def test_a_mixture_goes_on_where_another_stopped() -> None:
    sizes, stop = [7, 40], PERIOD + 37
    before = Mixture(sizes, [0.5, 0.5]).picks(0, stop)
    taken = Mixture(sizes, [0.5, 0.5]).taken(stop)
    assert taken == [(before.source == s).sum() for s in (0, 1)]
    after = Mixture(sizes, [0.1, 0.9], taken)
    picks = after.picks(0, 500)
    for s, size in enumerate(sizes):
        here = picks.source == s
        rows = picks.epoch[here] * size + picks.item[here]
        np.testing.assert_array_equal(rows, taken[s] + np.arange(here.sum()))
    assert after.taken(500) == [taken[s] + (picks.source == s).sum() for s in (0, 1)]


def test_a_tiny_weight_still_gets_a_turn() -> None:
    assert min(Mixture([5, 5], [1.0, 1e-9]).shares) > 0
