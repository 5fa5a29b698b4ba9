"""Rows and batches whose size changes from phase to phase."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_unified.data.loader import PackedBatches
from ar_unified.data.packing import Packing, blocks
from ar_unified.data.packing.blocks import store
from ar_unified.data.phases import Phase
from ar_unified.data.prepare import load_report, plan_rows, prepare
from ar_unified.data.sources import open_source
from ar_unified.errors import UserError
from ar_unified.language.grammar import Grammar
from tests.data.test_packing import T, small_blocks

LONG, SHORT = 160, 48
PLAIN: dict[str, Any] = dict(flip_pairs=0.0, condition_dropout=0.0)


@pytest.fixture
def prepared(folder: Path, grammar: Grammar, tokenizer: Any, tmp_path: Path) -> Path:
    sources = [
        open_source(dict(kind="folder", path=folder, files=(name,), label=name)) for name in ("captions", "vqa", "docs")
    ]
    prepare(sources, grammar, tokenizer, tmp_path / "data", max_tokens=LONG, shard_items=8, show_progress=False)
    return tmp_path / "data"


def loader(prepared: Path, grammar: Grammar, *phases: Phase, rows: int = 8) -> PackedBatches:
    return PackedBatches(prepared, grammar, batch_size=rows, sequence_length=LONG, seed=3, phases=phases)


def documents(batch: Any) -> list[bytes]:
    found = []
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        found += [tokens[segments == n].tobytes() for n in range(1, segments.max() + 1)]
    return found


def test_each_phase_has_its_rows_and_is_the_same_whoever_asks(prepared: Path, grammar: Grammar) -> None:
    phases = (
        Phase(sequence_length=SHORT, weights=dict(captions=1, vqa=2), batch_size=16),
        Phase(4, sequence_length=SHORT, weights=dict(captions=1)),
        Phase(7, weights=dict(captions=1, docs=2)),
        Phase(9, sequence_length=SHORT, weights=dict(vqa=1)),
    )
    shapes = [(16, SHORT)] * 4 + [(8, SHORT)] * 3 + [(8, LONG)] * 2 + [(8, SHORT)] * 3
    whole = loader(prepared, grammar, *phases)
    batches = [whole.batch(step) for step in range(12)]
    assert [batch.tokens.shape for batch in batches] == shapes and whole.sequence_length == LONG
    for step, count in ((11, 2), (3, 4), (7, 8), (4, 1)):  # in any order, by another reader
        fresh = loader(prepared, grammar, *phases)
        parts = [fresh.batch(step, i, count) for i in range(count)]
        for name, values in vars(batches[step]).items():
            assert np.array_equal(np.concatenate([vars(part)[name] for part in parts]), values), (step, name)
    for batch in batches:
        length = batch.tokens.shape[1]
        padding = batch.segment_ids == 0
        assert (batch.doc_start[padding] == length).all() and (batch.tokens[:, 0] == grammar.vocabulary.bos).all()


def test_what_is_said_of_no_phase_is_as_it_always_was(prepared: Path, grammar: Grammar) -> None:
    plain = loader(prepared, grammar, Phase(**PLAIN), Phase(5, **PLAIN))
    said = loader(prepared, grammar, Phase(sequence_length=LONG, **PLAIN), Phase(5, batch_size=8, **PLAIN))
    for step in (0, 4, 5, 13):
        assert jax.tree.all(jax.tree.map(np.array_equal, plain.batch(step), said.batch(step)))
    assert "by_length" not in said.describe()["docs"]


def test_short_rows_leave_out_what_is_longer_and_say_so(prepared: Path, grammar: Grammar) -> None:
    index = loader(prepared, grammar, Phase(weights=dict(docs=1))).shards[0].index["length"]
    cut = int(np.median(index))
    long = int((index > cut).sum())
    assert 0 < long < len(index)
    short = loader(prepared, grammar, Phase(sequence_length=cut, **PLAIN), Phase(40, **PLAIN), rows=1)
    facts = short.describe()["docs"]["by_length"]
    assert (facts[cut]["left_out"], facts[LONG]["left_out"]) == (long, 0)
    assert 0.3 < facts[cut]["fill"] <= 1
    seen = [len(document) // 4 for step in range(40) for document in documents(short.batch(step))]
    assert max(seen) <= cut and set(index[index <= cut].tolist()) <= set(seen)
    later = {len(document) // 4 for step in range(40, 80) for document in documents(short.batch(step))}
    assert max(later) == index.max()


def test_a_phase_in_whose_rows_nothing_fits_is_refused(prepared: Path, grammar: Grammar) -> None:
    named = Phase(sequence_length=SHORT, weights=dict(docs=1, vqa=1))
    words = "'docs': no document fits into the rows of 48 tokens of the phase that begins at step 0"
    with pytest.raises(UserError, match=words):
        loader(prepared, grammar, named, Phase(5))
    found = loader(prepared, grammar, Phase(sequence_length=SHORT), Phase(5))  # without weights, docs has no share
    assert found.shares[0]["docs"] == 0 < found.shares[1]["docs"]
    with pytest.raises(UserError, match="make rows longer"):
        loader(prepared, grammar, Phase(sequence_length=SHORT))
    for name in ("sequence_length", "batch_size"):
        for size in (0, 1.5, True):
            with pytest.raises(UserError, match=f"{name}: expected a whole number, at least 1; found {size}"):
                Phase(**{name: size})


def test_rows_of_each_length_are_planned_beside_the_shards(
    prepared: Path, grammar: Grammar, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = int(np.median(loader(prepared, grammar, Phase(weights=dict(docs=1))).shards[0].index["length"]))
    phases = Phase(sequence_length=cut), Phase(5)
    expected = [loader(prepared, grammar, *phases).batch(step) for step in range(8)]
    with pytest.raises(UserError, match="make rows longer"):
        plan_rows(prepared, load_report(prepared), cut)
    plan_rows(prepared, load_report(prepared), cut, leave_out=True)
    monkeypatch.delattr(blocks, "rows_of")  # nothing is planned again
    found = loader(prepared, grammar, *phases)
    for step, batch in enumerate(expected):
        assert jax.tree.all(jax.tree.map(np.array_equal, found.batch(step), batch))
    with pytest.raises(UserError, match=rf"'docs': expected documents of 1 to {cut} tokens, found \d longer ones"):
        PackedBatches(prepared, grammar, batch_size=4, sequence_length=cut)


def test_a_source_goes_on_with_its_next_window_where_rows_get_longer() -> None:
    """No document is read twice in an epoch, and later phases read the documents that an earlier one did not reach."""
    lengths = np.random.default_rng(0).integers(1, T // 2, 400)
    with small_blocks():
        short, long = Packing(lengths, T // 2, seed=1), Packing(lengths, T, seed=1)
        starts = short._epochs(0)[2]
        read = int(starts[4]) + 1  # reads four windows and one more row
        taken = long.after(short, read)
        first = np.concatenate(short.documents(0, np.arange(read)))
        rest = np.concatenate(long.documents(0, np.arange(taken, long.rows)))
        assert not set(first.tolist()) & set(rest.tolist())
        window = np.concatenate(short.documents(0, np.arange(starts[4], starts[5])))
        assert set(range(400)) - set(first.tolist()) - set(rest.tolist()) < set(window.tolist())
        assert long.after(short, 0) == 0 and long.after(short, int(starts[4])) < taken
        assert long.after(short, 2 * short.rows) == 2 * long.rows
        assert long.after(short, 3 * short.rows - 1) == 3 * long.rows, "the last window of an epoch ends it"
        assert long.after(long, taken) == taken
    whole = Packing(lengths, T, seed=1)  # one block is one window
    assert whole.after(Packing(lengths, T // 2, seed=1), 5) == whole.rows


def test_blocks_of_which_nothing_fits_have_no_rows(tmp_path: Path) -> None:
    lengths = np.where(np.arange(64) < 40, 60, np.arange(64) % 9 + 1)
    with small_blocks():
        dealt = blocks.Blocks(64)
        lengths[dealt.documents(2)] = 60
        with pytest.raises(UserError, match=r"expected documents of 1 to 16 tokens, found \d to 60"):
            Packing(lengths, 16, seed=0)
        store(lengths, 16, tmp_path, leave_out=True)
        for folder in (None, tmp_path):
            made = Packing(lengths, 16, seed=0, folder=folder, leave_out=True)
            for epoch in (0, 1):
                rows = made.documents(epoch, np.arange(made.rows))
                assert Counter(np.concatenate(rows).tolist()) == Counter(np.flatnonzero(lengths <= 16).tolist())
                assert max(lengths[row].sum() for row in rows) <= 16
            assert made.left_out == int((lengths > 16).sum())
        nothing = Packing(np.full(64, 60), 16, seed=0, leave_out=True)
        assert (nothing.rows, nothing.fill, nothing.left_out) == (0, 0.0, 64)
