"""config.image_tokenizer.model: an imported image tokenizer is used instead of training one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ar_tokenizers.image.autoencoder import init
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.published import settings_of, to_published
from ar_tokenizers.image.tokenizer import ImageTokenizer
from safetensors.numpy import save_file

import ar_unified
from ar_unified.cli.main import main
from ar_unified.cli.plan import run_of
from ar_unified.experiment import config as configs
from tests import tokenizer_files as files
from tests.bundles import fresh
from tests.cli.conftest import ROOT, SMALL, refused

TINY = AutoencoderConfig(
    backbone="vqgan", factor=8, patch=1, width=32, multipliers=(1, 1, 1, 1), blocks=(1, 1, 1, 1), attention="middle",
    z_channels=8, quantizer="vq", codes=48, code_dim=8, space="euclidean",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that an import wrote."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = ImageTokenizer(TINY, fresh(init, TINY, 0))
    save_file(to_published(tokenizer, "taming"), folder / "vqgan.safetensors")
    (folder / "vqgan.json").write_text(json.dumps(settings_of(TINY, "taming")))
    assert main(["import", "--from", str(folder), "--as", "chameleon_vq", "--output", str(folder / "made")]) == 0
    return folder / "made"


def command(verb: str, folder: Path, workdir: Path, made: Path, *changes: str) -> list[str]:
    """The arguments of `conftest`, except that the folder `made` decides the image tokenizer."""
    settings = {key: value for key, value in SMALL.items() if not key.startswith("image_tokenizer.")}
    settings |= {"image_tokenizer.model": made, "training.steps": 4, "training.warmup_steps": 1}
    settings |= dict(change.split("=", 1) for change in changes)
    config = f"{ROOT / 'experiments' / 'folder.py'}:path={folder}"
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return [verb, "--config", config, "--workdir", str(workdir), *overrides]


@pytest.mark.slow
def test_an_experiment_takes_it_as_it_is_trains_and_samples(folder: Path, made: Path, tmp_path: Path, capsys) -> None:
    workdir = tmp_path / "w"
    assert main(command("run", folder, workdir, made)) == 0, capsys.readouterr()
    there = ImageTokenizer.load(workdir / "image_tokenizer")
    assert there.hash == ImageTokenizer.load(made).hash and there.config == TINY
    data = json.loads((workdir / "data" / "done.json").read_text())["fingerprint"]
    assert data["image_hash"] == there.hash
    rows = [json.loads(line) for line in (workdir / "samples" / "samples.jsonl").read_text().splitlines()]
    assert rows and not [row for row in rows if row.get("error")]
    assert list((workdir / "samples").rglob("*.png"))
    numbers = json.loads((workdir / "tokenizer_evaluation" / "evaluation.json").read_text())["tokenizer"]
    assert numbers["validation"]["codebook_size"] == 48
    capsys.readouterr()
    moved = shutil.copytree(made, tmp_path / "elsewhere")  # the folder's path does not matter
    assert main(command("run", folder, workdir, moved)) == 0
    assert capsys.readouterr().out.count("done already") == 7
    assert main(["export", "--workdir", str(workdir), "--output", str(tmp_path / "bundle")]) == 0
    assert ar_unified.load(tmp_path / "bundle").image_tokenizer.hash == there.hash
    image = str(tmp_path / "bundle" / "image_tokenizer")
    assert main(["export", "--from", image, "--to", "taming", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_another_one_in_the_same_workdir_is_refused(folder: Path, made: Path, tmp_path: Path) -> None:
    assert main([*command("tokenizer", folder, tmp_path / "w", made), "--only", "image"]) == 0
    other = ImageTokenizer(TINY, fresh(init, TINY, 1))
    other.save(tmp_path / "other")
    refused([*command("tokenizer", folder, tmp_path / "w", tmp_path / "other"), "--only", "image"], "brought")


def test_plan_and_validate_know_it(folder: Path, made: Path, tmp_path: Path, capsys) -> None:
    argv = command("validate", folder, tmp_path / "v", made)
    run = run_of(configs.load(argv[2], argv[5:]))
    assert run.vocabulary.codebook_size == 48 and (run.layout.height, run.layout.width) == (8, 8)
    (tmp_path / "text.json").write_bytes(files.byte_level())
    named = ["text_tokenizer.model=" + str(shutil.move(tmp_path / "text.json", tmp_path / "tokenizer.json"))]
    assert main(command("validate", folder, tmp_path / "v", made, *named)) == 0
    assert "<image code " in capsys.readouterr().out


def test_what_does_not_go_with_it_is_told_by_its_key(folder: Path, made: Path, tmp_path: Path) -> None:
    def wrong(words: str, *changes: str, of: Path = made) -> None:
        refused(command("run", folder, tmp_path / "w", of, *changes), words)

    wrong(
        "config.image_tokenizer.width: expected 32, as the tokenizer in .*model has; found 8", "image_tokenizer.width=8"
    )
    wrong("config.image_tokenizer.steps: expected 0, .*found 9", "image_tokenizer.steps=9")
    wrong("config.data.image_size: .*30 x 32 pixels does not divide", "data.image_size=(30,32)")
    wrong("config.image_tokenizer.model: .*expected the folder of an image tokenizer; it is empty", of=tmp_path)
    broken = shutil.copytree(made, tmp_path / "broken")
    (broken / "weights.safetensors").write_bytes((made / "weights.safetensors").read_bytes()[:-4])
    wrong("config.image_tokenizer.model: .*weights.safetensors", of=broken)
    params = {name: part for name, part in ImageTokenizer.load(made).params.items() if name != "decoder"}
    ImageTokenizer(TINY, params).save(tmp_path / "reads")
    wrong("config.image_tokenizer.model: this image tokenizer can read images but not draw them", of=tmp_path / "reads")
    (broken / "config.json").write_text(json.dumps({"format": 2, "config": {"levels": 3}}))
    wrong("config.image_tokenizer.model: .*expected the settings of an image tokenizer", of=broken)
    assert not (tmp_path / "w").exists()
