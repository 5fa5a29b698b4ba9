"""Preference pairs from JSONL to batches: which pairs are left out and why, which answers share a row, and a batch's
arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_unified.data.batch import PreferenceBatch
from ar_unified.data.checks.validate import validate
from ar_unified.data.images import to_png
from ar_unified.data.loader import PackedBatches
from ar_unified.data.preferences import PreferenceBatches
from ar_unified.data.prepare import load_report, prepare
from ar_unified.data.shards import CHOSEN, REJECTED, Shards
from ar_unified.data.sources import open_source
from ar_unified.data.sources.splits import group
from ar_unified.errors import UserError
from ar_unified.language.document import CodesPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.vocabulary import Role
from tests.data.conftest import Kit

LONGEST, T = 80, 160


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """30 pairs of pictures, 20 pairs of texts with many lengths, and six bad pairs."""
    root = tmp_path / "preferences"
    (root / "images").mkdir(parents=True)
    rows: list[dict[str, Any] | bytes] = []
    for i in range(60):
        (root / f"images/{i}.png").write_bytes(to_png(Kit.image(i)))
    (root / "images/bad.png").write_bytes(b"GIF89a")
    for i in range(30):
        right, wrong = ([dict(type="image", image=f"images/{n}.png")] for n in (2 * i, 2 * i + 1))
        rows.append(dict(prompt=f"draw {i}", chosen=right, rejected=wrong))
    rows += [dict(prompt=f"say {i}", chosen="yes " * (1 + i % 7), rejected="no " * (1 + i % 5)) for i in range(20)]
    picture = [dict(type="image", image="images/0.png")]
    (root / "images/copy.png").write_bytes((root / "images/0.png").read_bytes())
    rows += [
        dict(prompt="x", chosen="a", rejected="a"),
        dict(prompt="x", chosen="a", rejected=""),
        dict(chosen="a", rejected="b"),
        dict(prompt="x", chosen=picture, rejected=[dict(type="image", image="images/bad.png")]),
        dict(prompt="x", chosen=picture, rejected=[dict(type="image", image="images/copy.png")]),
        dict(prompt="x", chosen="a", rejected="b" * 100),
    ]
    Kit.write(root / "pairs.jsonl", rows)
    return root / "pairs.jsonl"


BAD = ["same_answers", "empty_answer", "no_prompt", "unreadable_image", "same_answers", "too_long"]


@pytest.fixture
def prepared(pairs: Path, grammar: Grammar, tokenizer: Any, tmp_path: Path) -> Path:
    source = open_source(dict(kind="jsonl", path=pairs))
    options = dict(max_tokens=LONGEST, shard_items=9, batch_size=8, show_progress=False)
    prepare([source], grammar, tokenizer, tmp_path / "data", **options)
    return tmp_path / "data"


def batches(prepared: Path, grammar: Grammar, **options: Any) -> PreferenceBatches:
    return PreferenceBatches(prepared, grammar, **(dict(batch_size=4, sequence_length=T, seed=3) | options))


def test_every_bad_pair_is_counted_and_named(prepared: Path, pairs: Path) -> None:
    report = load_report(prepared)
    found = report.sources["pairs"]
    assert (found.items, found.documents, found.preferences) == (56, 100, 50)
    assert found.skipped == {kind: BAD.count(kind) for kind in sorted(set(BAD))}
    skipped = (prepared / "skipped.jsonl").read_text().splitlines()
    assert len(skipped) == len(BAD)
    for i, (line, kind) in enumerate(zip(skipped, BAD, strict=True)):
        assert f"pairs.jsonl:{51 + i}" in line and kind in line
    assert "50 of the items are preference pairs" in str(report) and "same_answers" in str(report)


def test_validate_finds_them_too(pairs: Path, grammar: Grammar, tokenizer: Any) -> None:
    found = validate(pairs, grammar, tokenizer, max_tokens=LONGEST, show_progress=False)
    assert [(bad.kind, bad.origin.split(":")[-1]) for bad in found.sources[0].bad] == [
        (kind, str(51 + i)) for i, kind in enumerate(BAD)
    ]
    assert len(found.sources[0].tokens) == 100 and "rejected" in found.sources[0].first[0]


def test_both_answers_stand_side_by_side_after_the_same_prompt(prepared: Path, grammar: Grammar) -> None:
    shards = Shards(prepared / "pairs", load_report(prepared).sources["pairs"].shards)
    assert shards.index["part"].tolist() == [CHOSEN, REJECTED] * 50
    for i, found in enumerate(shards.read(range(0, 60))):
        document = grammar.parse(found.tokens)
        expected = Kit.Tokenizer().encode(Kit.image(i)[None])[0]
        assert document.answer == (CodesPart(expected),) and document.asked[0].parts[0].text == f"draw {i // 2}"


def lengths(prepared: Path) -> np.ndarray:
    return Shards(prepared / "pairs", load_report(prepared).sources["pairs"].shards).index["length"]


def test_a_batch_holds_whole_pairs_with_what_the_reference_says(prepared: Path, grammar: Grammar) -> None:
    read = batches(prepared, grammar)
    said = np.random.default_rng(0).normal(size=(50, 2, len(Role))).astype(np.float32)
    read.reference = {"pairs": said}
    seen: list[int] = []
    tokens, marks = {}, lengths(prepared)
    for step in range(-(-read.rows_per_epoch["pairs"] // 4)):
        batch = read.batch(step)
        assert batch.reference.shape == (4, read.pairs, 2, len(Role))
        for row in range(4):
            count = int(batch.documents.segment_ids[row].max())
            assert count % 2 == 0
            for pair in range(count // 2):
                which = np.flatnonzero((said == batch.reference[row, pair]).all((1, 2)))
                assert len(which) == 1, "what belongs to this pair"
                for answer in (0, 1):
                    here = batch.documents.segment_ids[row] == 2 * pair + answer + 1
                    assert here.sum() == marks[2 * which[0] + answer]
                    tokens[int(which[0]), answer] = batch.documents.tokens[row][here]
                seen.append(int(which[0]))
            assert not batch.reference[row, count // 2 :].any()
    assert sorted(set(seen)) == list(range(50))
    shards = Shards(prepared / "pairs", load_report(prepared).sources["pairs"].shards)
    for i, found in enumerate(shards.read(range(100))):
        assert np.array_equal(tokens[i // 2, i % 2], found.tokens)


def test_a_batch_depends_on_step_and_seed_only(prepared: Path, grammar: Grammar) -> None:
    said = {"pairs": np.random.default_rng(0).normal(size=(50, 2, len(Role))).astype(np.float32)}

    def fresh() -> PreferenceBatches:
        read = batches(prepared, grammar, batch_size=8)
        read.reference = said
        return read

    for step in (13, 2):
        whole, parts = fresh().batch(step), [fresh().batch(step, i, 4) for i in range(4)]
        joined = jax.tree.map(lambda *each: np.concatenate(each), *parts)
        jax.tree.map(np.testing.assert_array_equal, joined, whole)
    assert not np.array_equal(fresh().batch(1).documents.tokens, fresh().batch(2).documents.tokens)
    shapes = PreferenceBatch.shapes(8, T, fresh().pairs)
    found = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), fresh().batch(0))
    assert jax.tree.leaves(shapes) == jax.tree.leaves(found)


def test_every_pair_comes_once_for_the_reference(prepared: Path, grammar: Grammar) -> None:
    seen = []
    sizes = lengths(prepared).reshape(-1, 2).sum(1)
    for name, rows, which in batches(prepared, grammar).every():
        assert name == "pairs" and rows.tokens.shape == (4, T)
        for row, pairs in zip(rows.segment_ids, which, strict=True):
            there = pairs[pairs >= 0]
            assert row.max() == 2 * len(there) and (row > 0).sum() == sizes[there].sum()
            seen += there.tolist()
    assert sorted(seen) == list(range(50))


def test_pairs_and_documents_are_not_taken_for_each_other(
    prepared: Path, folder: Path, grammar: Grammar, tokenizer: Any, tmp_path: Path
) -> None:
    options = dict(batch_size=4, sequence_length=T)
    with pytest.raises(UserError, match="expected documents, found preference pairs: .*objective = 'preference'"):
        PackedBatches(prepared, grammar, **options)
    source = open_source(dict(kind="folder", path=folder))
    prepare([source], grammar, tokenizer, tmp_path / "others", max_tokens=LONGEST, show_progress=False)
    with pytest.raises(UserError, match="expected preference pairs, found documents: .*objective = 'likelihood'"):
        PreferenceBatches(tmp_path / "others", grammar, **options)


def test_a_source_is_of_pairs_alone_or_of_none(tmp_path: Path, grammar: Grammar, tokenizer: Any) -> None:
    Kit.write(
        tmp_path / "mixed.jsonl",
        [dict(prompt="a", chosen="b", rejected="c"), dict(segments=[dict(type="text", text="t")])],
    )
    source = open_source(dict(kind="jsonl", path=tmp_path / "mixed.jsonl"))
    with pytest.raises(UserError, match="'mixed': expected only preference pairs or none, found 1 and 1 other"):
        prepare([source], grammar, tokenizer, tmp_path / "out", max_tokens=LONGEST, show_progress=False)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_pairs_of_one_prompt_are_on_one_side_of_a_border() -> None:
    one, other = dict(prompt="p", chosen="a", rejected="b"), dict(prompt="p", chosen="c", rejected="d")
    assert group(one, b"1") == group(other, b"2") != group(one | dict(prompt="q"), b"1")
