"""Which lengths share a row. Any lengths fit, and little space stays empty."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_unified.data.packing.fitting import best_fit, paired_fit, rows_of

Fit = Callable[[np.ndarray, int], np.ndarray]


def falling(lengths: np.ndarray) -> np.ndarray:
    return np.sort(lengths)[::-1]


def fill(lengths: np.ndarray, rows: np.ndarray, length: int) -> float:
    return lengths.sum() / (rows.max() + 1) / length


def test_the_tightest_row_that_has_room_is_taken() -> None:
    assert best_fit(np.array([6, 5, 4, 3, 2]), 10).tolist() == [0, 1, 0, 1, 1]
    assert best_fit(np.array([7, 5, 5, 2, 2, 2]), 10).tolist() == [0, 1, 1, 0, 2, 2]


@pytest.mark.parametrize("fit", [best_fit, paired_fit, lambda *given: rows_of(*given)[0]])
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=200), least=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_every_document_has_a_row_that_is_not_too_full(fit: Fit, lengths: list[int], least: int) -> None:
    sizes = falling(np.maximum(lengths, least))
    rows = fit(sizes, 64)
    assert len(rows) == len(sizes) and np.bincount(rows, sizes).max() <= 64
    assert np.unique(rows).tolist() == list(range(rows.max() + 1))


def test_rows_are_full_whether_lengths_differ_or_are_nearly_one() -> None:
    draw = np.random.default_rng(0)
    texts = falling(draw.lognormal(5.5, 1.0, 3000).clip(8, 4096).astype(int))
    rows, decreasing = rows_of(texts, 4096)
    assert decreasing and np.array_equal(rows, best_fit(texts, 4096)) and fill(texts, rows, 4096) > 0.995
    captions = falling(draw.integers(273, 307, 3000))  # an image of 16 x 16 codes and some words
    rows, decreasing = rows_of(captions, 4096)
    assert not decreasing and fill(captions, rows, 4096) > 0.98 > 0.97 > fill(captions, best_fit(captions, 4096), 4096)


def test_the_plan_never_changes() -> None:
    """Plans are stored beside the shards, and a resumed training follows their order."""
    lengths = falling(np.arange(24) % 7 + 25)
    rows, decreasing = rows_of(lengths, 111)
    assert not decreasing and rows.tolist() == [0, 1, 2, 0, 3, 4, 1, 2, 5, 3, 4, 5, 3, 4, 5, 5, 1, 2, 3, 4, 0, 0, 1, 2]
