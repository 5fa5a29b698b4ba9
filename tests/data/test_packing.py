from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_unified.data import packing
from ar_unified.data.packing import PERIOD, Mixture, Packing, blocks
from ar_unified.data.packing.blocks import Blocks, store
from ar_unified.errors import UserError

T = 64


@contextmanager
def small_blocks() -> Iterator[None]:
    """Runs of 4 documents, 4 runs to a block, 2 blocks to a window."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "RUN", 4)
        patch.setattr(blocks, "BLOCK", 16)
        patch.setattr(packing, "WINDOW", 2)
        yield


def lengths_of(documents: int) -> np.ndarray:
    return np.random.default_rng(documents).integers(1, T, documents)


@given(lengths=st.lists(st.integers(1, T), min_size=1, max_size=400), seed=st.integers(0, 9), blocked=st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_epoch_has_every_document_once_in_rows_that_fit(lengths: list[int], seed: int, blocked: bool) -> None:
    sizes = np.array(lengths)
    with small_blocks() if blocked else nullcontext():
        made = Packing(sizes, T, seed=seed)
        for epoch in (0, 5):
            rows = made.documents(epoch, np.arange(made.rows))
            assert sorted(np.concatenate(rows).tolist()) == list(range(len(sizes)))
            assert max(sizes[row].sum() for row in rows) <= T
            alone = [made.documents(epoch, np.array([r]))[0] for r in range(made.rows)]
            assert all(np.array_equal(a, b) for a, b in zip(rows, alone, strict=True))
            others = [Packing(sizes, T, seed=seed).documents(epoch, np.array([r]))[0] for r in range(made.rows)[::9]]
            assert all(np.array_equal(a, b) for a, b in zip(rows[::9], others, strict=True))
    assert made.fill == sizes.sum() / (made.rows * T)


def test_a_block_has_a_bit_of_everything_and_a_window_is_shuffled_as_one() -> None:
    documents = 400
    with small_blocks():
        made = Packing(lengths_of(documents), T, seed=0)
        assert made.windows == 13
        together = [made.documents(epoch, np.arange(made.rows)) for epoch in (0, 1)]
    dealt = Blocks(documents)
    assert dealt.count == 1 and dealt.documents(0).tolist() == list(range(documents)), "as small data always were"
    parts: list[dict[int, set[int]]] = []
    for rows in together:
        where = {document: at for at, row in enumerate(rows) for document in row.tolist()}
        parts.append({run: {where[4 * run + i] for i in range(4)} for run in range(documents // 4)})
        spans = [max(found) - min(found) for found in parts[-1].values()]
        assert max(spans) <= 2 * made.rows / 13 + 2, "the documents of a run are read within one window"
        neighbours = [abs(a // 4 - b // 4) for row in rows for a in row.tolist() for b in row.tolist() if a != b]
        assert np.mean(np.array(neighbours) > 10) > 0.6, "rows are of documents that stand far from each other"
    moved = [abs(min(parts[0][run]) - min(parts[1][run])) for run in parts[0]]
    assert np.mean(np.array(moved) > made.rows / 13) > 0.7, "blocks come in another order"


def test_the_order_of_large_data_never_changes() -> None:
    """If the order changed with an update, a resumed training would read some data twice and other data never."""
    with small_blocks():
        made = Packing(np.arange(50) * 7 % 60 + 1, T, seed=3, name="photos")
        found = [row.tolist() for row in made.documents(2, np.arange(made.rows))]
    assert found[:4] + found[-2:] == [[25, 18], [24, 19], [33, 35], [16, 27], [38, 46, 36, 0], [6]]


@pytest.mark.parametrize(
    "spread, documents, expected", [("wide", 330_000, "b34e52b9e914c390"), ("near", 70_000, "924a9b4ab98636c5")]
)
def test_the_order_of_blocks_of_full_size_never_changes(spread: str, documents: int, expected: str) -> None:
    """The test above for random rows of several windows, and for a window in which nearly all lengths are equal."""
    seed = {"wide": 1, "near": 2}[spread]
    draw = np.random.default_rng(seed)
    wide = draw.lognormal(5.5, 1.0, documents)
    lengths = wide if spread == "wide" else 277 + draw.integers(0, 16, documents)
    made = Packing(lengths.clip(8, 4096).astype(np.int32), 4096, seed=seed, name=spread)
    found = hashlib.sha256()
    for epoch in (0, 3):
        for row in made.documents(epoch, np.random.default_rng(1).integers(0, made.rows, 1500)):
            found.update(row.astype("<i8").tobytes() + b"|")
    assert found.hexdigest().startswith(expected)


def test_small_data_come_in_the_order_they_always_came_in_and_others_say_so() -> None:
    assert Packing(np.array([30, 30, 4]), T, seed=0).order == 1
    assert Packing(np.repeat([30, 29, 25, 24], 8), 108, seed=0).order == 2, "best-fit-decreasing has a row more"
    with small_blocks():
        assert Packing(np.full(17, 3), T, seed=0).order == 2


def test_rows_that_are_planned_beforehand_are_read_a_block_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = lengths_of(200)
    with small_blocks():
        made = Packing(lengths, T, seed=0)
        expected = made.documents(1, np.arange(made.rows))
        store(lengths, T, tmp_path)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        store(lengths, T, tmp_path)
        assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} and len(times) == 2
        monkeypatch.delattr(blocks, "rows_of")  # the stored plan is used, so this is not called
        stored = Packing(lengths, T, seed=0, folder=tmp_path)
        assert (stored.rows, stored.fill) == (made.rows, made.fill)
        found = stored.documents(1, np.arange(made.rows))
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        for other in (lengths[:-1], lengths[::-1]):
            with pytest.raises(UserError, match="rows of 64 tokens were planned for other documents .*delete rows-64"):
                packing = Packing(other, T, seed=0, folder=tmp_path)
                packing.documents(0, np.arange(packing.rows))


def test_rows_are_well_filled_and_differ_between_epochs() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 2000)
    made = Packing(lengths, 512, seed=0)
    assert made.fill > 0.99
    rows = np.arange(made.rows)
    companions = [{frozenset(row.tolist()) for row in made.documents(epoch, rows)} for epoch in (0, 1)]
    assert len(companions[0] & companions[1]) < 0.05 * made.rows


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
