"""A bundle with a published text tokenizer and the ids of a published table, and their conversion to published ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ar_unified
from ar_unified import bundle as bundles
from ar_unified.bundle import Bundle, BundleError
from ar_unified.language.document import CodesPart, Document, TextPart
from ar_unified.language.vocabulary import Role
from tests import bundles as ours
from tests import tokenizer_files as files
from tests.published_bundles import TABLES, border_of, parts
from tests.test_bundle import json_of, reseal, same


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for kind in TABLES:
        bundles.write(folder / kind, **parts(kind))
    return folder


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_written_comes_back(made, kind):
    written, found = parts(kind), Bundle(made / kind)
    text: Any = found.text_tokenizer
    file, data = TABLES[kind][:2]
    assert (made / kind / "text_tokenizer" / file).read_bytes() == data(), "as it was published"
    assert found.border == border_of(kind) == text.border
    assert found.grammar.manifest() == written["grammar"].manifest() == found.language
    assert found.text_tokenizer.hash == written["text_tokenizer"].hash
    assert found.published == written["published"]
    same(found.kept(), written["kept"])
    same(found.params(), written["params"])
    for text in [*files.TEXTS, *files.strings(100)]:
        ids = found.text_tokenizer.encode(text)
        assert all(0 <= id < found.text_tokenizer.size for id in ids)
        if kind != "llama":
            assert found.text_tokenizer.decode(ids) == text
            assert found.text_tokenizer.piece_bytes[ids].sum() == len(text.encode())
    told = found.record.get("text_losses", [])
    assert told == [str(loss) for loss in found.text_tokenizer.losses] and bool(told) == (kind == "llama")


def test_one_of_ours_has_no_border_and_nothing_published(tmp_path):
    found = ours.write(tmp_path / "b")
    assert found.border is None and found.published is None and found.kept() == {}
    assert found.record == found.language


def test_what_export_gives_back_may_be_of_any_dtype(tmp_path):
    kept = {"a": np.asarray(jnp.arange(4, dtype=jnp.bfloat16)), "b": np.arange(3)}
    same(bundles.write(tmp_path / "b", **parts("llama") | {"kept": kept}).kept(), kept)


def test_a_text_that_names_special_tokens_is_text_in_a_document(made):
    grammar, (_, _, text_ids, _, code, _) = Bundle(made / "chameleon").grammar, TABLES["chameleon"]
    names = " ".join((*files.SPECIAL, files.PLAIN))
    document = Document.of((CodesPart(np.array([[0, 1], [2, 23]], np.int32)), TextPart(names)))
    encoded = grammar.encode(document)
    assert grammar.parse(encoded.tokens) == document
    theirs = border_of("chameleon").theirs[encoded.tokens]
    assert theirs[:7].tolist() == [0, 28, code, code + 1, code + 2, code + 23, 27]
    assert np.all(encoded.roles[7:-1] == Role.TEXT) and set(theirs[7:-1]) <= set(text_ids) and theirs[-1] == 2


def test_logits_are_the_published_model_s_in_its_own_order(made):
    """A published table, reordered by the border, gives the published logits for the published tokens."""
    border, model = border_of("emu3"), ar_unified.load(made / "emu3", batch_size=1)
    V, rng = border.size, np.random.default_rng(0)
    tokens = rng.integers(0, V, (2, 5))
    found = model.logits(model.ids.ours(tokens))[..., model.ids.ours(range(V))]
    np.testing.assert_array_equal(found, model.logits(border.ours[tokens])[..., border.ours])
    assert found.shape == (2, 5, V) == (2, 5, model.vocabulary.used)
    np.testing.assert_array_equal(model.ids.theirs(model.ids.ours(tokens)), tokens)
    assert not np.array_equal(border.ours, np.arange(V)), "the orders differ"
    with pytest.raises(ValueError, match="published ids: expected 0..634, found 0..635"):
        model.ids.ours([0, V])


@pytest.mark.slow
def test_it_says_and_stops(made):
    model = ar_unified.load(made / "chameleon", batch_size=1)
    warm = dict(seed=1, max_tokens=12, text={"temperature": 1.0})
    said = model.ask("<s> IMGIMGAZ", **warm)
    assert len(said) > 2
    assert model.ask("<s> IMGIMGAZ", **warm, stop=[said[1]]) == said[: said.index(said[1])]


# ---- folders that somebody sent -------------------------------------------------------------------------------------


def replaced(data: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "text_tokenizer" / "tokenizer.json").write_bytes(data)
        reseal(folder)

    return damage


def edited(folder: Path) -> None:
    path = folder / "text_tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"IMGIMGAZ"', b'"IMGIMGAA"'))


def also(folder: Path) -> None:
    (folder / "text_tokenizer" / "text.model").write_bytes(b"x")
    reseal(folder, **{"text_tokenizer/text.model": {"bytes": 1, "sha256": "0" * 64}})


def without(folder: Path) -> None:
    (folder / "text_tokenizer" / "tokenizer.json").unlink()
    reseal(folder, **{"text_tokenizer/tokenizer.json": None})


def other_ids(spec: dict[str, Any]) -> None:
    spec["border"] = [[0, 0, 363]]


def beyond(spec: dict[str, Any]) -> None:
    spec["border"] = [[0, 333, 30], [30, 0, 332], [362, 332, 1]]
    spec["text_size"] = 333


def shorter() -> bytes:
    spec = json.loads(files.byte_level())
    spec["model"]["vocab"] = {name: id for name, id in spec["model"]["vocab"].items() if id < 330}
    spec["model"]["merges"] = []
    spec["added_tokens"].pop()
    return json.dumps(spec).encode()


TOKENIZER = "text_tokenizer/tokenizer.json"
HOSTILE = {
    "edited": (edited, f"{TOKENIZER}: expected sha256 .* the file was changed"),
    "no JSON": (replaced(b"\x80\x04."), f"{TOKENIZER}: expected a tokenizer.json, found a file that is not JSON"),
    "another kind": (replaced(b'{"model": {"type": "WordPiece"}}'), f"{TOKENIZER}: model.type: expected BPE"),
    "fewer pieces than the border has": (
        replaced(shorter()),
        f"{TOKENIZER}: border: expected ids of text pieces below 330",
    ),
    "another tokenizer": (replaced(files.byte_level("NFC")), "language.json: .* text tokenizer with hash"),
    "two tokenizers": (also, "bundle.json: files: expected exactly one text tokenizer in text_tokenizer.*; found text"),
    "no tokenizer": (without, "bundle.json: files: expected exactly one text tokenizer in text_tokenizer, .*none"),
    "no border": (json_of("language.json", lambda x: x.pop("border") and None), "tokenizer with hash"),
    "a border of texts": (json_of("language.json", lambda x: x.update(border="all")), "border: expected runs of three"),
    "a huge border": (
        json_of("language.json", lambda x: x.update(border=[[0, 0, 1 << 60]])),
        f"{TOKENIZER}: border: expected at most 16777216 ids",
    ),
    "a border of fewer ids": (
        json_of("language.json", lambda x: x.update(border=[[0, 0, 9]])),
        f"{TOKENIZER}: border: expected 363 ids, as `used` says; found 9",
    ),
    "a border twice": (json_of("language.json", lambda x: x["border"].append([0, 0, 1])), "expected published ids"),
    "another border": (json_of("language.json", other_ids), "language.json: .* text tokenizer with hash"),
    "special tokens as text": (json_of("language.json", beyond), "language.json: manifests differ at 'controls.pad'"),
    "no number of pieces": (json_of("language.json", lambda x: x.update(text_size="1")), "text_size: expected a whole"),
    "published as a list": (
        lambda folder: ((folder / "published.json").write_text("[]"), reseal(folder))[1],
        r"published.json: expected keys and values, found \[\]",
    ),
    "kept pickles": (
        lambda folder: ((folder / "published.safetensors").write_bytes(b"\x80\x04."), reseal(folder))[1],
        "published.safetensors: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_damaged_is_refused_by_name(made, tmp_path, name):
    damage, words = HOSTILE[name]
    shutil.copytree(made / "chameleon", folder := tmp_path / "b")
    damage(folder)
    with pytest.raises(BundleError, match="(?s)" + words):
        found = Bundle(folder)
        for read in (lambda: found.grammar, lambda: found.published, found.kept):
            read()
