from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_unified.data import packing
from ar_unified.data.batch import PackedBatch
from ar_unified.data.items import BadItem
from ar_unified.data.loader import ImageBatches, PackedBatches
from ar_unified.data.packing import blocks
from ar_unified.data.phases import Phase
from ar_unified.data.prepare import prepare
from ar_unified.data.shards import Shards
from ar_unified.data.sources import open_source
from ar_unified.errors import UserError
from ar_unified.language.document import TASKS, Document, ImagePart
from ar_unified.language.encoded import Encoded
from ar_unified.language.grammar import Grammar
from ar_unified.language.reading import GrammarError
from ar_unified.manifests import ManifestMismatch

T = 160


@pytest.fixture
def prepared(folder: Path, grammar: Grammar, tokenizer: Any, tmp_path: Path) -> Path:
    sources = [
        open_source(dict(kind="folder", path=folder, files=(name,), label=name)) for name in ("captions", "vqa", "docs")
    ]
    prepare(sources, grammar, tokenizer, tmp_path / "data", max_tokens=T, shard_items=8, show_progress=False)
    return tmp_path / "data"


def batches(prepared: Path, grammar: Grammar, *later: Phase, **options: Any) -> PackedBatches:
    """Batches. Their first phase has the `options` that are fields of Phase; the phases in `later` follow."""
    first = Phase(**{name: options.pop(name) for name in Phase.__dataclass_fields__ if name in options})
    return PackedBatches(
        prepared, grammar, phases=[first, *later], **(dict(batch_size=4, sequence_length=T, seed=3) | options)
    )


def rows(batch: PackedBatch) -> list[dict[str, np.ndarray]]:
    """The fields of a batch for each of its documents, and where the document starts in its row."""
    found = []
    for b in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[b].max() + 1):
            here = batch.segment_ids[b] == segment
            found.append({name: array[b][here] for name, array in vars(batch).items()} | {"start": np.argmax(here)})
    return found


def same(a: PackedBatch, b: PackedBatch) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


@pytest.fixture(params=("one block", "many blocks"))
def blocked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs twice: with all data in one block, as small data are, and with many blocks, as large data have."""
    if request.param == "many blocks":
        monkeypatch.setattr(blocks, "RUN", 2)
        monkeypatch.setattr(blocks, "BLOCK", 4)
        monkeypatch.setattr(packing, "WINDOW", 2)


def test_a_batch_depends_on_step_and_seed_only(blocked: None, prepared: Path, grammar: Grammar) -> None:
    reference = batches(prepared, grammar, batch_size=8)
    expected = [reference.batch(step) for step in range(30)]
    for processes in (1, 2, 4, 8):
        for step in (17, 3, 29):  # in any order, by another reader
            fresh = batches(prepared, grammar, batch_size=8)
            parts = [fresh.batch(step, i, processes) for i in range(processes)]
            whole = jax.tree.map(lambda *parts: np.concatenate(parts), *parts)
            assert same(whole, expected[step])
    with ThreadPoolExecutor(4) as pool:  # several at once by one reader
        restarted = pool.map(batches(prepared, grammar, batch_size=8).batch, range(11, 30))
        assert all(same(a, b) for a, b in zip(restarted, expected[11:], strict=True))
    assert not any(same(batches(prepared, grammar, batch_size=8, seed=4).batch(s), expected[s]) for s in range(5))
    assert len({batch.tokens.tobytes() for batch in expected}) == 30


def test_every_document_once_an_epoch(blocked: None, prepared: Path, grammar: Grammar) -> None:
    loader = batches(
        prepared, grammar, batch_size=1, flip_pairs=0.0, condition_dropout=0.0, weights=dict(vqa=1, captions=3)
    )
    stored = {name: Shards(prepared / name, n) for name, n in (("vqa", 2), ("captions", 3))}
    whole = {
        name: Counter(d.tokens.tobytes() for d in shards.read(range(len(shards)))) for name, shards in stored.items()
    }
    seen = {name: Counter[bytes]() for name in whole}
    epochs = 2
    for step in range(4 * epochs * max(loader.rows_per_epoch.values())):
        found = [document["tokens"].tobytes() for document in rows(loader.batch(step))]
        name = next(name for name in whole if found[0] in whole[name])
        assert set(found) <= set(whole[name])
        if seen[name].total() < epochs * whole[name].total():
            seen[name].update(found)
    for name in whole:
        assert seen[name] == Counter({tokens: count * epochs for tokens, count in whole[name].items()})


def test_rows_say_of_every_token_what_the_model_needs(prepared: Path, grammar: Grammar) -> None:
    loader = batches(prepared, grammar, batch_size=8, condition_dropout=0.3)
    v = grammar.vocabulary
    tasks = Counter[str]()
    for step in range(6):
        batch = loader.batch(step)
        padding = batch.segment_ids == 0
        assert (batch.tokens[padding] == v.pad).all() and (batch.targets[padding] == v.pad).all()
        assert (batch.doc_start[padding] == T).all() and not batch.prompt[padding].any()
        assert {k: (a.shape, a.dtype.name) for k, a in vars(batch).items()} == {
            **{k: ((8, T), "int32") for k in ("tokens", "targets", "positions", "doc_start", "segment_ids")},
            "tasks": ((8, T), "int8"),
            "roles": ((8, T), "int8"),
            "prompt": ((8, T), "bool"),
        }
        for d in rows(batch):
            n = len(d["tokens"])
            document = grammar.parse(d["tokens"])
            assert (d["positions"] == np.arange(n)).all() and (d["doc_start"] == d["start"]).all()
            assert d["targets"].tolist() == [*d["tokens"][1:], v.pad]
            assert d["roles"].tolist() == [*grammar.encode(document).roles[1:], 0]  # the roles of the targets
            task = TASKS[d["tasks"][0]]
            tasks[task] += 1
            assert len(set(d["tasks"])) == 1 and task in (document.task, "interleaved")
            border = np.flatnonzero(d["tokens"] == v.control("eot"))
            assert d["prompt"].tolist() == [k < (border[0] if border.size else 0) for k in range(n)]
    assert all(tasks[task] for task in ("text_to_image", "image_to_text", "interleaved"))


def test_flipping_is_drawn_anew_every_epoch_and_only_for_pairs(prepared: Path, grammar: Grammar) -> None:
    loader = batches(prepared, grammar, batch_size=1, weights=dict(captions=1), condition_dropout=0.0)
    per_epoch = loader.rows_per_epoch["captions"]
    flipped = []
    for epoch in range(20):
        read = [grammar.parse(d["tokens"]) for r in range(per_epoch) for d in rows(loader.batch(epoch * per_epoch + r))]
        assert len(read) == 20
        flipped.append(frozenset(d.parts[1].text for d in read if d.task == "image_to_text"))
    assert 0.4 < sum(map(len, flipped)) / 400 < 0.6 and len(set(flipped)) == 20
    asked = batches(prepared, grammar, weights=dict(vqa=1), flip_pairs=1.0).batch(0)
    assert {TASKS[d["tasks"][0]] for d in rows(asked)} == {"image_to_text"}


def test_condition_dropout_leaves_exactly_the_unconditional_prefix(prepared: Path, grammar: Grammar) -> None:
    boi = grammar.vocabulary.control("boi")

    def prefixes(**options: Any) -> Counter[bool]:
        loader = batches(prepared, grammar, flip_pairs=0.0, **options)
        found = Counter[bool]()
        for step in range(20):
            for d in rows(loader.batch(step)):
                image = int(np.argmax(d["tokens"] == boi))
                found[np.array_equal(d["tokens"][:image], grammar.unconditional.tokens)] += 1
        return found

    for source in ("captions", "docs"):
        assert set(prefixes(weights={source: 1}, condition_dropout=1.0)) == {True}
        assert set(prefixes(weights={source: 1}, condition_dropout=0.0)) == {False}
    some = prefixes(weights=dict(captions=1), condition_dropout=0.25)
    assert 0.15 < some[True] / some.total() < 0.35
    assert set(prefixes(weights=dict(vqa=1), condition_dropout=1.0)) == {False}, "an answer in words keeps its question"


def test_one_definition_of_unconditional(prepared: Path, grammar: Grammar, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and sampler must use the same grammar, so a change of it changes the loader's batches."""
    v = grammar.vocabulary
    other = np.array([v.bos, v.control("eol"), v.control("eot")], np.int32)
    monkeypatch.setattr(Grammar, "unconditional", property(lambda self: Encoded(other, np.full(3, 2, np.uint8))))
    for document in rows(
        batches(prepared, grammar, weights=dict(captions=1), flip_pairs=0.0, condition_dropout=1.0).batch(0)
    ):
        assert document["tokens"][:4].tolist() == [*other, grammar.vocabulary.control("boi")]
        with pytest.raises(GrammarError):
            grammar.parse(document["tokens"])


def test_shares_follow_the_weights(prepared: Path, grammar: Grammar) -> None:
    loader = batches(prepared, grammar, batch_size=64, weights=dict(captions=2, docs=1, vqa=0))
    tasks = [TASKS[row[0]] for row in loader.batch(5).tasks]
    assert abs(tasks.count("interleaved") - 64 / 3) < 1.5 and "vqa" not in loader.shares[0]
    assert loader.describe()["docs"]["fill"] > 0.3
    with pytest.raises(ValueError, match=r"expected sources \['captions', 'docs', 'vqa'\], found 'book'"):
        batches(prepared, grammar, weights=dict(book=1))


def test_a_phase_mixes_otherwise_from_its_step_on_and_each_source_goes_on(prepared: Path, grammar: Grammar) -> None:
    first, second = dict(captions=1, vqa=3), dict(captions=3, vqa=1)
    loader = batches(
        prepared, grammar, Phase(7, second, flip_pairs=1.0), weights=first, flip_pairs=0.0, condition_dropout=0.0
    )
    tasks = [[TASKS[row[0]] for row in loader.batch(step).tasks] for step in range(16)]
    assert [row.count("text_to_image") for row in tasks] == [1] * 7 + [0] * 9, "captions: drawn first, then all read"
    assert loader.shares == [dict(captions=0.25, vqa=0.75), dict(captions=0.75, vqa=0.25)]

    whole = batches(prepared, grammar, Phase(7, second, 0.0, 0.0), weights=first, flip_pairs=0.0, condition_dropout=0.0)
    read = [row.tobytes() for step in range(64) for row in whole.batch(step).tokens]
    for name in first:
        alone = batches(prepared, grammar, batch_size=1, weights={name: 1}, flip_pairs=0.0, condition_dropout=0.0)
        stream = [alone.batch(step).tokens.tobytes() for step in range(len(read))]
        found = [row for row in read if row in set(stream)]
        assert 64 < len(found) < len(read) and found == stream[: len(found)], "from where it was"


def test_phases_out_of_order_are_refused(prepared: Path, grammar: Grammar) -> None:
    for later in ([Phase(0)], [Phase(5), Phase(5)], [Phase(5), Phase(3)]):
        with pytest.raises(ValueError, match="to begin after the one before it; found"):
            batches(prepared, grammar, *later)
    with pytest.raises(ValueError, match="the first phase to begin at step 0"):
        batches(prepared, grammar, from_step=2)
    with pytest.raises(ValueError, match="flip_pairs: expected a probability, found 1.5"):
        batches(prepared, grammar, Phase(3, flip_pairs=1.5))
    with pytest.raises(ValueError, match="found 'book'"):
        batches(prepared, grammar, Phase(3, dict(book=1)))


def test_other_vocabulary_and_short_rows_are_refused(prepared: Path, grammar: Grammar, kit: Any) -> None:
    with pytest.raises(ManifestMismatch, match="layout.width"):
        batches(prepared, kit.grammar(type(grammar.layout)("grid", 4, 5)))
    with pytest.raises(ValueError, match="make rows longer"):
        batches(prepared, grammar, sequence_length=24)
    with pytest.raises(ValueError, match="divides the batch size 4"):
        batches(prepared, grammar).batch(0, 0, 3)


def test_image_batches_are_pure_and_visit_everything(folder: Path, kit: Any) -> None:
    (folder / "images/3.png").write_bytes(b"")
    sources = [
        open_source(dict(kind="folder", path=folder, files=(name,), label=name)) for name in ("captions", "docs")
    ]

    def made(**options: Any) -> ImageBatches:
        return ImageBatches(sources, **(dict(size=(16, 16), batch_size=5, seed=1) | options))

    expected = [made().batch(step)["pixels"] for step in range(40)]
    assert expected[0].shape == (5, 16, 16, 3) and expected[0].dtype == np.uint8
    for options in (dict(), dict(memory=0), dict(memory=3 * 16 * 16 * 3)):
        loader = made(**options)
        assert all(np.array_equal(loader.batch(step)["pixels"], expected[step]) for step in (31, 2, 31))
    halves = [made(batch_size=4).batch(6, i, 2)["pixels"] for i in (0, 1)]
    assert np.array_equal(np.concatenate(halves), made(batch_size=4).batch(6)["pixels"])
    with ThreadPoolExecutor(3) as pool:
        ahead = pool.map(made().batch, range(8, 12))
        assert all(np.array_equal(a["pixels"], b) for a, b in zip(ahead, expected[8:12], strict=True))
    seen = Counter(image.tobytes() for batch in expected for image in batch)
    assert set(seen) == {kit.image(i).tobytes() for i in range(20) if i != 3}
    varied = made(mirror=True, short_side=20, batch_size=8)
    assert varied.batch(0)["pixels"].shape == (8, 16, 16, 3)
    assert np.array_equal(varied.batch(9)["pixels"], made(mirror=True, short_side=20, batch_size=8).batch(9)["pixels"])


def test_a_share_of_the_images_is_recoloured(folder: Path, kit: Any) -> None:
    sources = [open_source(dict(kind="folder", path=folder, files=("captions",), label="captions"))]

    def batch(step: int, share: float, process: int = 0, of: int = 1) -> np.ndarray:
        loader = ImageBatches(sources, size=(16, 16), batch_size=20, recolour=share)
        return loader.batch(step, process, of)["pixels"]

    plain = np.concatenate([batch(step, 0.0) for step in range(10)])
    some = np.concatenate([batch(step, 0.5) for step in range(10)])
    other = (plain != some).any(axis=(1, 2, 3))
    assert 0.35 < other.mean() < 0.65 and np.array_equal(plain[~other], some[~other])
    halves = np.concatenate([batch(3, 0.5, i, 2) for i in (0, 1)])
    assert np.array_equal(halves, some[60:80])
    with pytest.raises(UserError, match="recolour: expected a share from 0 to 1, found 2"):
        batch(0, 2.0)


def test_a_full_row_whose_document_begins_with_a_image_has_no_room_for_dropout(
    kit: Any, grammar: Grammar, tokenizer: Any, tmp_path: Path
) -> None:
    root = kit.folder(tmp_path / "folder")
    segments = [dict(type="image", image="images/0.png"), dict(type="text", text="what it shows")]
    kit.write(root / "docs.jsonl", [dict(segments=segments)])
    source = open_source(dict(kind="folder", path=root, files=("docs",), label="docs"))
    prepare([source], grammar, tokenizer, tmp_path / "data", max_tokens=T, show_progress=False)
    (length,) = Shards(tmp_path / "data" / "docs", 1).index["length"].tolist()
    full = batches(tmp_path / "data", grammar, batch_size=1, sequence_length=length, condition_dropout=1.0).batch(0)
    assert (full.segment_ids == 1).all()
    assert full.tokens[0, 1] == grammar.vocabulary.control("boi")


def test_a_bad_item_of_an_image_tokenizer_s_training_is_reported_once():
    class Broken:
        name, fingerprint, reversible = "broken", {}, False
        read = 0

        def __len__(self):
            return 4

        def __getitem__(self, i):
            if i:
                self.read += 1
                raise BadItem("empty_file", f"{i}.png", "the file has no bytes")
            return Document.of((ImagePart(np.zeros((16, 16, 3), np.uint8)),))

    source, bad = Broken(), []
    batches = ImageBatches(
        [source], size=(16, 16), batch_size=8, memory=0, left_out=lambda error: bad.append(error.origin)
    )
    for step in range(3):
        batches.batch(step)
    assert sorted(bad) == ["1.png", "2.png", "3.png"] and source.read > 3
