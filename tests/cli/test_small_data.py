"""Folders with little or no usable data, as in a new user's first try."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from ar_tokenizers.image.objective import Objective
from ar_tokenizers.image.tokenizer import ImageTokenizer
from PIL import Image

from ar_unified.cli import tokenizer as verb
from ar_unified.cli.main import main
from ar_unified.cli.train import plan_rows
from ar_unified.data.packing import blocks
from ar_unified.data.sources import open_source
from ar_unified.errors import UNUSABLE
from ar_unified.experiment import config as configs
from ar_unified.experiment import experiment as experiments
from ar_unified.experiment.experiment import Experiment
from ar_unified.parallel.mesh import make_mesh
from ar_unified.workdir import Workdir
from tests.cli.conftest import ROOT, command

TINY = {"image_tokenizer__steps": 2, "training__steps": 4, "training__warmup_steps": 1, "evaluation__limit": 1}


def images(root: Path, count: int, text: str = "picture {}", *, files: bool = True) -> Path:
    root.mkdir(exist_ok=True)
    rows = [{"image": f"{i}.png", "text": text.format(i)} for i in range(count)]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(count if files else 0):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(root / f"{i}.png")
    return root


def documents(workdir: Path, split: str) -> int:
    found = json.loads((workdir / "data" / split / "manifest.json").read_text())["report"]
    return sum(source["documents"] for source in found.values())


def bring_tokenizers(root: Path, workdir: Path) -> None:
    """A text tokenizer of the folder, and an image tokenizer that was never trained."""
    argv = command("tokenizer", root, workdir)
    experiment = Experiment(configs.load(argv[2], argv[5:]), Workdir(workdir))
    untrained = Objective(experiment.autoencoder).init(jax.random.key(0))["autoencoder"]
    ImageTokenizer(experiment.autoencoder, untrained).save(experiment.workdir.image_tokenizer)
    assert main([*argv, "--only", "text"]) == 0


def prepared(root: Path, workdir: Path, **changes: object) -> int:
    return main(command("prepare", root, workdir, image_tokenizer__steps=0, **changes))


def test_of_two_images_one_is_held_out_and_one_alone_is_trained_on(tmp_path, capsys):
    for count, held_out in ((2, 1), (1, 0)):
        root, workdir = images(tmp_path / f"set{count}", count), tmp_path / f"w{count}"
        bring_tokenizers(root, workdir)
        assert prepared(root, workdir) == 0
        assert documents(workdir, "train") == 1
        assert (documents(workdir, "validation") if held_out else 0) == held_out
        assert (workdir / "data" / "validation").exists() == bool(held_out)
    said = (
        r"validation: .*set1: nothing is in split '\[95%:\]', because all rows share one image .* without this source"
    )
    assert re.search(said, capsys.readouterr().out)


def test_images_that_are_much_too_small_are_used_and_said(tmp_path, capsys):
    root, workdir = images(tmp_path / "tiny", 20), tmp_path / "w"
    bring_tokenizers(root, workdir)
    capsys.readouterr()
    assert prepared(root, workdir, lora__alpha=3.0) == 0
    said = capsys.readouterr().out
    assert "enlarged" not in said and "note: config.lora.alpha does nothing here, because config.lora.rank is 0" in said
    for file in sorted(root.glob("*.png"))[:15]:
        Image.open(file).resize((4, 4)).save(file)
    bring_tokenizers(root, workdir := tmp_path / "again")
    assert prepared(root, workdir) == 0 and documents(workdir, "train") == 19
    told = "WARNING: 15 of 20 images are enlarged to more than 2 times their sides (the worst: 4 x 4 to 32 x 32 pixels)"
    assert told in capsys.readouterr().out
    assert main([*command("tokenizer", root, tmp_path / "trained", **TINY), "--only", "image"]) == 0
    said = capsys.readouterr().out
    assert re.search("WARNING: of the images for validation, 1 of 1 images are enlarged", said)


def test_a_source_of_which_nothing_is_left_ends_prepare_and_says_why(tmp_path, capsys):
    root, workdir = images(tmp_path / "long", 6, "word " * 200 + "{}"), tmp_path / "w"
    bring_tokenizers(root, workdir)
    assert prepared(root, workdir) == UNUSABLE
    said = capsys.readouterr().err
    assert re.search(r"no document is left of source 'long': 5 too_long, first .*captions.jsonl:\d+: too_long: ", said)
    assert "Raise config.data.max_tokens" in said and not (workdir / "data").exists()
    assert prepared(root, workdir, data__max_tokens=2000) == 0, "nothing is to be deleted first"
    assert documents(workdir, "train") == 5


def test_rows_of_another_length_are_planned_once_where_that_can_be_written(tmp_path, capsys, monkeypatch):
    root, workdir = images(tmp_path / "set", 12), tmp_path / "w"
    bring_tokenizers(root, workdir)
    assert prepared(root, workdir) == 0
    argv = command("train", root, workdir, training__sequence_length=320)
    experiment = Experiment(configs.load(argv[2], argv[5:]), Workdir(workdir))
    plans = workdir / "data" / "train" / "set" / "rows-320.blocks.npy"
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "whole", lambda path: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only", path)))
        plan_rows(experiment)
    assert not plans.exists()
    assert "train: read-only: every process plans its rows again in memory" in capsys.readouterr().out
    plan_rows(experiment)
    made = plans.stat().st_mtime_ns
    plan_rows(experiment)
    assert plans.stat().st_mtime_ns == made and (workdir / "data/validation/set/rows-320.npy").exists()


def test_images_that_are_missing_are_said_where_the_image_tokenizer_needs_them(tmp_path, capsys):
    root, workdir = images(tmp_path / "bad", 6, files=False), tmp_path / "w"
    assert main(command("tokenizer", root, workdir, **TINY)) == UNUSABLE
    said = capsys.readouterr().err
    expected = r"source 'bad': no readable image in its 5 documents: 5 missing_image, first .*captions.jsonl:\d: "
    assert re.search(expected + "missing_image: .*png'?: no such file", said)
    assert not (workdir / "image_tokenizer").exists()


def test_data_that_is_not_there_is_one_sentence(tmp_path, capsys):
    config = f"{ROOT / 'experiments' / 'emoji.py'}:path={tmp_path / 'nowhere'}"
    assert main(["run", "--config", config, "--workdir", str(tmp_path / "w")]) == UNUSABLE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nowhere: no such file or folder" in said and "make_emoji.py" in said


@pytest.mark.slow
def test_a_held_out_image_that_cannot_be_read_does_not_stop_the_run(tmp_path, capsys):
    root, workdir = images(tmp_path / "set", 2), tmp_path / "w"
    held_out = open_source(dict(kind="folder", path=root, split="[95%:]")).texts(0)[0]
    (root / f"{held_out.split()[1]}.png").write_bytes(b"no image")
    assert main(command("run", root, workdir, **TINY)) == 0
    out = capsys.readouterr().out
    assert "validation: source 'set': no readable image in its 1 documents: 1 unreadable_image, first" in out
    assert re.search(r"left out: 1 unreadable_image, first .*\n  WARNING: most of set is left out", out)
    assert "training goes on without a validation loss" in out and (workdir / "report.html").exists()


def test_an_image_tokenizer_names_the_images_that_it_leaves_out_and_claims_nothing_of_held_out_ones(
    tmp_path, capsys, monkeypatch
):
    root, workdir = images(tmp_path / "photographs", 6), tmp_path / "w"
    (root / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((3, 400, 3), np.uint8)).save(root / "strip.png")
    config = f"{ROOT / 'experiments' / 'photos.py'}:path={root}"
    keys = {"data.image_size": "(32,32)", "image_tokenizer.crop": 32, "image_tokenizer.short_side": 32}
    keys |= {"image_tokenizer.batch_size": 8, "image_tokenizer.width": 8, "image_tokenizer.blocks": "(0,1)"}
    argv = ["tokenizer", "--only", "image", "--config", config, "--workdir", str(workdir)]
    argv += [f"--config.{key}={value}" for key, value in keys.items()]
    seen = []

    class Seen(ImageTokenizer):
        def __init__(self, *given, batch_size=64, **more):
            seen.append(batch_size)
            super().__init__(*given, batch_size=batch_size, **more)

    monkeypatch.setattr(verb, "ImageTokenizer", Seen)
    monkeypatch.setattr(experiments, "make_mesh", lambda *_: make_mesh({}, jax.devices()[:1]))
    assert main([*argv, "--config.image_tokenizer.steps=2", "--config.image_tokenizer.accumulation=4"]) == 0
    assert set(seen) == {2, 64}, "pictures need no more memory than a step of four microbatches; the last is saved"
    out = capsys.readouterr().out
    assert "1 empty_file, first" in out and "1 image_shape, first" in out and "strip.png: image_shape: expected" in out
    assert "no image is held out: training goes on without a validation loss" in out
    assert "step 2/2  loss" in out and "step 2/2  validation loss" not in out and "held-out images" not in out
    stage = workdir / "image_tokenizer"
    rows = [json.loads(row) for row in (stage / "skipped.jsonl").read_text().splitlines()]
    assert {(Path(row["origin"]).name, row["kind"]) for row in rows} == {
        ("empty.png", "empty_file"),
        ("strip.png", "image_shape"),
    }
    assert json.loads((stage / "done.json").read_text())["summary"]["left_out"]["image_shape"]["count"] == 1
    (root / "empty.png").touch()
    assert main([*argv, "--config.image_tokenizer.steps=4"]) == 0  # goes on with the list that is there
    assert len((stage / "skipped.jsonl").read_text().splitlines()) == 2
