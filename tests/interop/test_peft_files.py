"""PEFT's form without PEFT: writing and reading, transformers' names, and refusals by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ar_unified
from ar_unified.bundle import Bundle
from ar_unified.errors import UserError
from ar_unified.interop import peft
from ar_unified.interop.token_rows import TokenRows
from ar_unified.model.lora import LoraConfig
from tests import adapters, bundles

LORA = LoraConfig(rank=2, alpha=3.0, targets=("attention.query", "mlp.down"), rslora=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return bundles.write(tmp_path_factory.mktemp("b") / "bundle")


@pytest.fixture
def folder(bundle, tmp_path) -> Path:
    adapters.write(tmp_path / "adapter", bundle, LORA)
    return tmp_path / "adapter"


def change(folder: Path, **settings) -> None:
    path = folder / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_what_is_written_is_read_and_lies_as_peft_has_it(bundle, tmp_path) -> None:
    made = adapters.write(tmp_path / "a", bundle, LORA)
    found = peft.read(tmp_path / "a", bundle.config, bundle.hash)
    assert found.matrices.keys() == {"attention.query", "mlp.down"} and set(found.scales["mlp.down"]) == {3.0 / 2**0.5}
    for path, (a, b) in found.matrices.items():
        group, name = path.split(".")
        np.testing.assert_array_equal(a, made[group][name]["a"])
        np.testing.assert_array_equal(b, made[group][name]["b"])
    tensors = load_file(tmp_path / "a" / peft.WEIGHTS)
    assert tensors.keys() == {
        f"base_model.model.model.layers.0.{module}.lora_{side}.weight"
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for side in "AB"
    }
    up = tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
    np.testing.assert_array_equal(up, made["mlp"]["down"]["a"][0].T)
    config = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 3.0, True)
    assert config["target_modules"] == ["q_proj", "down_proj"] and config["peft_type"] == "LORA"
    with pytest.raises(UserError, match="something is there already.*name another folder"):
        adapters.write(tmp_path / "a", bundle, LORA)


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(peft_type="IA3"), "peft_type: expected LORA, found 'IA3'"),
        (dict(use_dora=True), "use_dora: expected False, because only plain LoRA is read, found True"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save: expected None, .*lm_head"),
        (dict(rank_pattern={"q_proj": 8}), r"expected \[8, \d+\], as this model's attention.query and r need"),
        (dict(rank_pattern={"q_proj": 0}), "rank_pattern: expected ranks of at least 1 by names of modules, found"),
        (dict(alpha_pattern=[2]), "alpha_pattern: expected numbers above 0 by names of modules, found"),
        (dict(alpha_pattern={"(a+)+$": 2}), r"alpha_pattern: expected names of modules, found '\(a\+\)\+\$'"),
        (dict(rank_pattern={".*.*.*.*.*q": 2}), "rank_pattern: expected names of modules"),
        (dict(rank_pattern={"q_proj(": 2}), "rank_pattern: expected names of modules"),
        (dict(r=0), "r: expected a rank of at least 1, found 0"),
        (dict(lora_alpha="16"), "lora_alpha: expected a number above 0, found '16'"),
        (dict(r=4), r"expected \[\d+, 4\]|expected \[4, \d+\], as this model's .* and r need; found"),
    ],
)
def test_what_is_no_plain_adapter_is_refused_by_its_key(bundle, folder, settings, said) -> None:
    change(folder, **settings)
    with pytest.raises(UserError, match=said):
        peft.read(folder, bundle.config)


ROWS = {
    "embedding": TokenRows(np.array([3, 7]), np.arange(64, dtype=np.float32).reshape(2, 32)),
    "head": TokenRows(np.array([9]), np.ones((1, 32), np.float32)),
}


def test_rows_of_ids_are_written_as_peft_has_them_and_read(bundle, tmp_path) -> None:
    made = adapters.drawn(bundle.config, LORA)
    peft.write(tmp_path / "a", bundle, LORA, made, ROWS, "its language")
    tensors = load_file(tmp_path / "a" / peft.WEIGHTS)
    embedding = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    np.testing.assert_array_equal(tensors[embedding], ROWS["embedding"].values)
    assert "base_model.model.lm_head.token_adapter.trainable_tokens_delta" in tensors
    config = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    assert config["trainable_token_indices"] == {"embed_tokens": [3, 7], "lm_head": [9]}
    found = peft.read(tmp_path / "a", bundle.config, bundle.hash)
    assert found.vocabulary == "its language" and found.matrices.keys() == set(LORA.matrices)
    assert {name: rows.ids.tolist() for name, rows in found.rows.items()} == {"embedding": [3, 7], "head": [9]}
    np.testing.assert_array_equal(found.rows["embedding"].values, ROWS["embedding"].values)
    change(tmp_path / "a", trainable_token_indices={"embed_tokens": [7, 3], "lm_head": [9]})  # in any order, like PEFT
    turned = peft.read(tmp_path / "a", bundle.config).rows["embedding"]
    np.testing.assert_array_equal(turned.values, ROWS["embedding"].values[::-1])
    tied = dataclasses.replace(bundle.config, tie_embeddings=True)
    with pytest.raises(UserError, match="expected no lm_head, because this model's head is its embedding"):
        peft.read(tmp_path / "a", tied)
    for settings, said in (
        (
            [3, 7],
            r"expected rows for the modules embed_tokens, found rows for embed_tokens, lm_head|found rows for lm_head",
        ),
        ("x", "expected a list of ids for each module, found 'x'"),
        ({"embed_tokens": [3, -1], "lm_head": [9]}, "embed_tokens: expected a list of ids, found"),
        ({"embed_tokens": [3, 3], "lm_head": [9]}, r"expected \[1, 32\], a row for each different id; found \[2, 32\]"),
        ({"embed_tokens": [3], "lm_head": [9]}, r"expected \[1, 32\], a row for each different id; found \[2, 32\]"),
    ):
        change(tmp_path / "a", trainable_token_indices=settings)
        with pytest.raises(UserError, match=said):
            peft.read(tmp_path / "a", bundle.config)
    change(tmp_path / "a", trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [9]})
    save_file(tensors | {embedding: np.full((2, 32), np.inf, np.float32)}, tmp_path / "a" / peft.WEIGHTS)
    with pytest.raises(UserError, match="expected finite numbers"):
        peft.read(tmp_path / "a", bundle.config)


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / peft.WEIGHTS)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / peft.WEIGHTS)


def test_an_adapter_of_another_model_is_refused(bundle, folder, tmp_path) -> None:
    wider = dataclasses.replace(bundle.config, d_model=48)
    with pytest.raises(UserError, match=r"layers.0.mlp.down_proj.lora_B.weight: expected \[48, 2\].*another model"):
        peft.read(folder, wider)
    other = bundles.write(tmp_path / "other", layout="rows")
    with pytest.raises(
        UserError, match=rf"trained on bundle {bundle.hash[:12]}.* not on this model, {other.hash[:12]}"
    ):
        peft.read(folder, bundle.config, other.hash)
    with pytest.raises(UserError, match=r"adapter 'b': .*adapter: the adapter was trained on bundle"):
        ar_unified.load(other.folder, adapters={"b": folder})
    rename(folder, "layers.0", "layers.7")
    with pytest.raises(UserError, match="expected one of 1 layers; found layer 7: the adapter is for another model"):
        peft.read(folder, bundle.config)


def test_a_broken_folder_says_what_is_wrong_with_it(bundle, folder) -> None:
    weights = (folder / peft.WEIGHTS).read_bytes()
    for cut in (0, 4, 100, len(weights) - 5):
        (folder / peft.WEIGHTS).write_bytes(weights[:cut])
        with pytest.raises(UserError, match="adapter_model.safetensors: .*cut short"):
            peft.read(folder, bundle.config, bundle.hash)
    (folder / peft.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(
        UserError, match="expected a file adapter_model.safetensors, found none: `ar-unified convert-pickle`"
    ):
        peft.read(folder, bundle.config)
    (folder / peft.WEIGHTS).write_bytes(weights)
    (folder / peft.CONFIG).write_text("{")
    with pytest.raises(UserError, match="adapter_config.json: expected JSON"):
        peft.read(folder, bundle.config)
    (folder / peft.CONFIG).unlink()
    with pytest.raises(UserError, match="'adapter_config.json': no such file"):
        peft.read(folder, bundle.config)
    with pytest.raises(UserError, match="expected the folder of an adapter, found none"):
        peft.read(folder / "gone", bundle.config)


def test_tensors_that_fit_nothing_are_named(bundle, folder) -> None:
    tensors = load_file(folder / peft.WEIGHTS)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(changed, said: str) -> None:
        save_file(changed, folder / peft.WEIGHTS)
        with pytest.raises(UserError, match=said):
            peft.read(folder, bundle.config)

    refused({k: v for k, v in tensors.items() if k != first}, "layer 0: self_attn.q_proj: expected lora_A and lora_B")
    refused(tensors | {first: np.full_like(tensors[first], np.nan)}, "expected finite numbers")
    refused(
        {k.replace("q_proj", "q_prj"): v for k, v in tensors.items()},
        "belongs to no matrix of a layer.*'self_attn.q_proj'",
    )
    refused(
        tensors | {"base_model.model.lm_head.lora_A.weight": tensors[first]},
        "lm_head.* belongs to no matrix of a layer",
    )
    refused(
        tensors | {first.replace("model.layers", "vision.layers"): tensors[first]}, "belongs to no matrix of a layer"
    )
    refused({}, "expected tensors of an adapter, found none")
