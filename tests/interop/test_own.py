"""Our own model is exported. transformers computes the same logits, and its tokenizer gives the same ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from ar_tokenizers.image.tokenizer import ImageTokenizer

import ar_unified
import tokenizers
from ar_unified.cli.main import main
from tests import bundles


def exported(tmp_path: Path, layout: str = "grid") -> tuple[Path, Path]:
    params = bundles.parts(layout)["params"]  # matrices are six times as large as usual
    bundles.write(tmp_path / "bundle", layout, params=jax.tree.map(lambda p: p / 6 if p.ndim > 1 else p, params))
    assert main(["export", "--from", str(tmp_path / "bundle"), "--to", "hf", "--output", str(tmp_path / "out")]) == 0
    return tmp_path / "bundle", tmp_path / "out"


@pytest.mark.parametrize("layout", ["grid", "rows", "none"])
def test_the_tokenizer_and_the_card_say_what_the_ids_are(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, out = exported(tmp_path, layout)
    model = ar_unified.load(bundle)
    vocabulary, theirs = model.vocabulary, tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in bundles.SENTENCES:
        assert theirs.encode(text, add_special_tokens=False).ids == model.grammar.text_codec.encode(text)
    assert theirs.token_to_id("<bos>") == vocabulary.bos
    card = (out / "README.md").read_text()
    if layout != "none":
        assert theirs.token_to_id("<image_7>") == vocabulary.image_offset + 7
        assert f"Code c is id {vocabulary.image_offset} + c" in card
        assert ImageTokenizer.load(out / "image_tokenizer").hash == model.image_tokenizer.hash
        monkeypatch.chdir(out)
        names = bundles.run_card(card)
        black = model.detokenize_image(np.zeros((model.grammar.layout.height, model.grammar.layout.width), np.int32))
        np.testing.assert_array_equal(names["pixels"], black[None])
    assert ("<size_h>" in card) == (layout == "rows") and ("## Images" in card) == (layout != "none")


def test_what_the_form_cannot_say_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundles.write(tmp_path / "b", config=dataclasses.replace(bundles.parts()["config"], norm_placement="swin"))
    command = ["export", "--from", str(tmp_path / "b"), "--output", str(tmp_path / "out"), "--to"]
    assert (
        main([*command, "hf"]) == 2
        and "model.norm_placement: expected 'pre', as in Qwen3ForCausalLM of transformers" in capsys.readouterr().err
    )
    assert main([*command, "meta"]) == 2 and "expected hf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_model_comes_back(tmp_path: Path) -> None:
    bundle, out = exported(tmp_path, "none")
    assert main(["import", "--from", str(out), "--as", "qwen", "--output", str(tmp_path / "again")]) == 0
    ours, again = ar_unified.load(bundle), ar_unified.load(tmp_path / "again")
    assert again.vocabulary.controls == ours.vocabulary.controls and again.grammar.layout == ours.grammar.layout
    ids = np.random.default_rng(0).integers(0, ours.vocabulary.used, (2, 24))
    np.testing.assert_array_equal(again.logits(ids), ours.logits(ids))
    for text in (*bundles.SENTENCES, "<boi> é <eos>"):
        assert again.grammar.text_codec.encode(text) == ours.grammar.text_codec.encode(text)
    assert main(["export", "--from", str(tmp_path / "again"), "--to", "hf", "--output", str(tmp_path / "out2")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out2" / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.parametrize("named_in", ["tokenizer.json", "added_tokens.json"])
def test_a_model_with_images_does_not_come_back_as_text(
    named_in: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = exported(tmp_path, "grid" if named_in == "tokenizer.json" else "none")
    if named_in == "added_tokens.json":
        (out / named_in).write_text('{"<image_0>": 310}')
    assert main(["import", "--from", str(out), "--as", "qwen", "--output", str(tmp_path / "again")]) == 2
    assert "found one with images that ar_unified exported" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.interop
def test_transformers_computes_the_same(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    bundle, out = exported(tmp_path)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = ar_unified.load(bundle, dtype="float32")
    ids = np.random.default_rng(0).integers(0, model.vocabulary.used, (2, 24))
    with torch.inference_mode():
        want = theirs(torch.from_numpy(ids)).logits.numpy()[..., : model.vocabulary.used]
    np.testing.assert_allclose(model.logits(ids), want, atol=5e-5)
    read = transformers.AutoTokenizer.from_pretrained(out)
    text = bundles.SENTENCES[0]
    assert read(text, add_special_tokens=False)["input_ids"] == model.grammar.text_codec.encode(text)
