"""`evaluate --only tokenizer` needs no model and no text tokenizer, and prints nothing about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ar_tokenizers.image.autoencoder import init
from ar_tokenizers.image.tokenizer import ImageTokenizer
from PIL import Image

from ar_unified.cli.main import main
from ar_unified.experiment import config as configs
from ar_unified.experiment.experiment import Experiment
from ar_unified.training import probe
from ar_unified.workdir import Workdir
from tests.bundles import fresh
from tests.cli.conftest import ROOT, command, refused
from tests.cli.test_text_alone import CONFIG as TEXT


@pytest.fixture
def workdir(folder: Path, tmp_path: Path) -> Path:
    """A workdir that has only an image tokenizer, which was not trained."""
    argv = command("evaluate", folder, tmp_path)
    config = Experiment(configs.load(argv[2], argv[5:]), Workdir(tmp_path)).autoencoder
    ImageTokenizer(config, fresh(init, config, 0)).save(tmp_path / "image_tokenizer")
    return tmp_path


def evaluate(folder: Path, workdir: Path, *more: str, **changes: object) -> int:
    return main([*command("evaluate", folder, workdir, **changes), "--only", "tokenizer", *more])


def test_only_the_tokenizer_is_scored_and_once(workdir, folder, capsys, monkeypatch):
    monkeypatch.setattr(probe, "SHAPE", dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_mlp=16))
    changes = dict(evaluation__tokenizer_probe_steps=2)
    assert evaluate(folder, workdir, **changes) == 0
    left = workdir / "tokenizer_evaluation"
    numbers = json.loads((left / "evaluation.json").read_text())["tokenizer"]["validation"]
    assert numbers["crop"] == [32, 32] and numbers["images"] == 2 and numbers["sources"] == [folder.name]
    assert numbers["probe"]["bits_per_id"] > 0 and numbers["probe"]["budget"]["steps"] == 2
    assert Image.open(left / "validation.png").size == (3 * 32, 2 * 32)
    page = (left / "report.html").read_text()
    assert f"{numbers['psnr']:.2f} dB" in page and "<dt>images</dt>" in page
    assert not [name for name in ("text", "training", "sampling") if f"<dt>{name}</dt>" in page], "nothing of these ran"
    assert not (workdir / "evaluation").exists() and not (workdir / "evaluation.json").exists()
    capsys.readouterr()
    assert evaluate(folder, workdir, **changes) == 0
    assert "tokenizer_evaluation: done already" in capsys.readouterr().out
    other = command("evaluate", folder, workdir, **changes | {"evaluation__limit": 3})
    refused([*other, "--only", "tokenizer"], "limit")


def test_a_folder_of_plain_images(workdir, folder, tmp_path_factory, capsys):
    images = tmp_path_factory.mktemp("images")
    disk = tmp_path_factory.mktemp("disk")
    for i, place in enumerate([images, images, images, disk]):
        noise = np.random.default_rng(i).integers(0, 256, (70, 90, 3), np.uint8)
        Image.fromarray(noise).save(place / f"{i}.png")
    (images / "broken.png").write_bytes(b"no")
    (images / "linked").symlink_to(disk)
    assert evaluate(folder, workdir, "--images", str(images), "--crop", "64", "--links", evaluation__limit=9) == 0
    left = workdir / "tokenizer_evaluation" / f"{images.name}-64x64"
    numbers = json.loads((left / "evaluation.json").read_text())["tokenizer"][images.name]
    assert numbers["images"] == 4 and numbers["skipped"] == {"unreadable_image": 1} and numbers["crop"] == [64, 64]
    assert (left / f"{images.name}.png").exists() and (left / "report.html").exists()
    assert not (workdir / "tokenizer_evaluation" / "started.json").exists()  # only for held-out sets
    only = [*command("evaluate", folder, workdir), "--only", "tokenizer"]
    refused([*only, "--images", str(images), "--crop", "40"], "--crop: .*multiples of 16")
    refused([*only, "--images", str(images / "nothing")], "--images: .*nothing: no such file or folder")


def test_nothing_to_score_is_refused_and_the_command_says_what_to_give(workdir, folder, tmp_path_factory):
    images = tmp_path_factory.mktemp("photographs")
    (images / "broken.png").write_bytes(b"no")
    photos = ["--config", f"{ROOT / 'experiments' / 'photos.py'}:path={folder}"]
    only = ["evaluate", "--only", "tokenizer", *photos, "--workdir", str(workdir)]
    refused(only, "nothing is held out. To hold images .*validation=DIR.*, or give --images DIR")
    refused(["evaluate", *photos, "--workdir", str(workdir)], "config.data.validation: .*nothing is held out. To hold")
    argv = [*command("evaluate", folder, workdir), "--only", "tokenizer"]
    refused([*argv, "--images", str(images)], "no readable image in photographs.*'unreadable_image': 1")
    assert not (workdir / "tokenizer_evaluation").exists()
    (images / "a.txt").write_text("".join(f"Square {i}.\n" for i in range(40)))
    (images / "config.py").write_text(TEXT)
    text = ["--config", f"{images / 'config.py'}:{images / 'a.txt'}", "--workdir", str(workdir / "text")]
    refused(["evaluate", "--only", "tokenizer", *text], "text alone")


def test_flags_that_need_another_are_refused(workdir, folder):
    refused([*command("evaluate", folder, workdir), "--images", "x"], "--only tokenizer")
    refused([*command("evaluate", folder, workdir / "empty"), "--only", "tokenizer"], "run `ar-unified tokenizer`")
