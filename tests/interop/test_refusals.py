"""Wrong downloads are refused in one sentence with exit status 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ar_unified.cli.main import main
from ar_unified.errors import UserError
from ar_unified.interop import emu3
from ar_unified.interop.files import Files
from ar_unified.interop.keys import HF, Keys
from ar_unified.interop.published import check_tensors
from ar_unified.language.border import Border
from ar_unified.model.config import config_from
from tests.interop import formats

Change = Callable[[Path], None]


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Change:
    def changed(folder: Path) -> None:
        found = dict(load_file(folder / "model.safetensors"))
        change(found)
        save_file(found, folder / "model.safetensors")

    return changed


def names(change: Callable[[dict[str, int]], None]) -> Change:
    def changed(folder: Path) -> None:
        path = folder / "tokenizer" / "text_tokenizer.json"
        spec = json.loads(path.read_text())
        vocabulary = spec["model"]["vocab"]
        change(vocabulary)
        for token in spec["added_tokens"]:
            token["id"] = vocabulary.get(token["content"], token["id"])
        path.write_text(json.dumps(spec))

    return changed


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def outside(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(folder.parent / "model.safetensors"), "../model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def swapped(vocabulary: dict[str, int]) -> None:
    vocabulary["IMGIMGFZ"], vocabulary["IMGIMGGZ"] = vocabulary["IMGIMGGZ"], vocabulary["IMGIMGFZ"]


NORM = "model.layers.1.self_attn.q_norm.weight"
PROJECTION = "model.layers.0.self_attn.o_proj"


def renamed(found: dict[str, np.ndarray]) -> None:
    found["model.layers.0.self_attn.outproj.weight"] = found.pop(f"{PROJECTION}.weight")


CASES: dict[str, tuple[Change, str]] = {
    "missing": (tensors(lambda found: found.pop(NORM)), f"missing {NORM}"),
    "left over": (tensors(lambda found: found.update(extra=np.zeros(3, np.float32))), "has no place for extra"),
    "misnamed": (tensors(renamed), "found but not expected: model.layers.0.self_attn.outproj.weight"),
    "a bias": (
        tensors(lambda found: found.update({f"{PROJECTION}.bias": np.zeros(64, np.float32)})),
        f"has no place for {PROJECTION}.bias",
    ),
    "another shape": (
        tensors(lambda found: found.update({NORM: found[NORM][:, :-1].copy()})),
        f"{NORM}: expected shape",
    ),
    "fp8": (tensors(lambda found: found.update({NORM: found[NORM].astype(ml_dtypes.float8_e4m3fn)})), "F8_E4M3"),
    "cut short": (cut, "model.safetensors"),
    "outside": (outside, "../model.safetensors"),
    "odd head_dim": (config(head_dim=15), "head_dim: expected an even number"),
    "biases asked for": (config(attention_bias=True), "attention_bias: expected False"),
    "a bias in the MLP": (config(mlp_bias=True), "mlp_bias: expected False"),
    "yarn": (
        config(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "rope_type: expected default, linear or llama3",
    ),
    "another eps": (config(rms_norm_eps=1e-6), "rms_norm_eps: expected 1e-05"),
    "a wrong vocabulary map": (names(swapped), "image code 5: expected id"),
    "a name that is missing": (names(lambda vocabulary: vocabulary.pop("IMGIMGHZ") and None), "code 7"),
}


def run(folder: Path, out: Path, *more: str, system: str = "lumina_mgpt") -> int:
    beside = ["--text", str(folder / "tokenizer"), "--image", str(folder / "tokenizer" / "vqgan.safetensors")]
    return main(["import", "--from", str(folder), "--as", system, "--output", str(out), *beside, *more])


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said_and_nothing_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    change, said = CASES[name]
    folder = formats.lumina_1(tmp_path / "download", tokenizer=True)
    if name == "a name that is missing":
        path = folder / "tokenizer" / "text_tokenizer.json"
        spec = json.loads(path.read_text())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "IMGIMGHZ"]
        path.write_text(json.dumps(spec))
    change(folder)
    assert run(folder, tmp_path / "bundle") == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and err.count("\n") == 1, err
    assert not (tmp_path / "bundle").exists() and not list(tmp_path.glob(".bundle*"))


def test_another_systems_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = formats.lumina_1(tmp_path / "download", tokenizer=True)
    assert run(folder, tmp_path / "bundle", system="emu3") == 2
    assert run(folder, tmp_path / "bundle", system="llama") == 2
    assert "model_type 'chameleon': give --as chameleon or anole or lumina_mgpt, not llama" in capsys.readouterr().err
    assert main(["import", "--from", str(folder), "--as", "lumina_mgpt", "--output", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "bundle").exists() and not (tmp_path / "b").exists()


def test_settings_of_an_image_tokenizer_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = formats.lumina_1(tmp_path / "download", tokenizer=True)
    (folder / "tokenizer" / "vqgan.yaml").write_text("model:\n  params:\n    ddconfig: [1, 2]\n")
    assert run(folder, tmp_path / "bundle") == 2
    assert "image tokenizer: expected the settings that were published" in capsys.readouterr().err


def test_a_shard_of_meta_without_its_head(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = formats.meta(tmp_path / "download")
    for path in (folder / "models" / "30b").glob("*.safetensors"):
        save_file({name: x for name, x in load_file(path).items() if name != "output.weight"}, path)
    beside = ["--text", str(folder / "tokenizer"), "--image", str(folder / "tokenizer" / "vqgan.safetensors")]
    weights = ["import", "--from", str(folder / "models" / "30b"), "--as", "chameleon"]
    assert main([*weights, "--output", str(tmp_path / "b"), *beside]) == 2
    assert "missing output.weight" in capsys.readouterr().err
    assert main([*weights, "--output", str(tmp_path / "b"), *beside, "--shard-mib", "0"]) == 2
    assert "--shard-mib: expected at least 1" in capsys.readouterr().err


def test_names_of_image_codes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = formats.emu3_5(tmp_path / "download")
    with pytest.raises(UserError, match="emu3_vision_tokens.txt"):
        (folder / "emu3_vision_tokens.txt").write_bytes(b"\xff\xfe")
        emu3.names_of(Files(folder))


class InMemory:
    """A source of arrays."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.read = tensors.__getitem__
        self.names = lambda: set(tensors)
        self.shape = lambda name: tensors[name].shape
        self.dtype = lambda name: "F32"


def test_a_head_beside_the_table_it_is_tied_to_must_be_that_table() -> None:
    config = config_from("debug", vocab_size=128, tie_embeddings=True)
    border = Border(((0, 0, 128),))
    slots = Keys(HF, config, border).slots()
    tensors = {slot.names[0]: np.ones(slot.shapes[0], np.float32) for slot in slots}
    table = tensors["model.embed_tokens.weight"]
    check_tensors(InMemory(tensors | {"lm_head.weight": table.copy()}), "here", [HF], config, border)
    with pytest.raises(UserError, match="lm_head.weight: expected the same numbers as in model.embed_tokens.weight"):
        check_tensors(InMemory(tensors | {"lm_head.weight": table * 2}), "here", [HF], config, border)


def test_the_same_download_unchanged_is_taken(tmp_path: Path) -> None:
    assert run(formats.lumina_1(tmp_path / "download", tokenizer=True), tmp_path / "bundle") == 0
    assert (tmp_path / "bundle" / "bundle.json").exists()
