"""Every verb with typical mistakes of people: it prints one sentence, ends with the right status, and leaves no
files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified import workdir as workdirs
from ar_unified.checkpoint import Checkpoints
from ar_unified.cli.main import main
from tests.cli.conftest import ROOT, command, refused

FEW = dict(image_tokenizer__steps=2, training__steps=2, training__warmup_steps=1, training__validate_every=0)


@dataclass
class Place:
    """The folders of a mistake: `folder` is a good dataset, `work` a fresh or a trained workdir, `tmp` is empty."""

    folder: Path
    work: Path
    tmp: Path
    undo: pytest.MonkeyPatch = field(repr=False)

    def verb(self, verb: str, *more: str, folder: Path | None = None, **changes: Any) -> list[str]:
        return [*command(verb, folder or self.folder, self.work, **FEW | changes), *more]

    def config(self, text: str) -> str:
        path = self.tmp / "own.py"
        path.write_text(text)
        return str(path)

    def rows(self, *rows: dict[str, Any] | bytes, name: str = "captions.jsonl") -> Path:
        root = self.tmp / "data"
        root.mkdir(exist_ok=True)
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (root / name).write_bytes(b"\n".join(lines) + b"\n")
        return root

    def file(self, name: str, data: bytes) -> str:
        (self.tmp / name).write_bytes(data)
        return str(self.tmp / name)


def own(place: Place, text: str, *more: str) -> list[str]:
    return ["run", "--config", place.config(text), "--workdir", str(place.work), *more]


def full_disk(place: Place, name: str) -> None:
    """Writing the file of this name fails because the disk is full."""
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    place.undo.setattr(os, "replace", fail)


def read_only(place: Place) -> None:
    """Root may write anywhere, so functions that open a file for writing in the workdir are made to fail."""
    write = workdirs.write_bytes

    def fail(path: Any, data: bytes) -> None:
        if Path(path).is_relative_to(place.work):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        write(path, data)

    place.undo.setattr(workdirs, "write_bytes", fail)


# ---- in a fresh workdir, in which nothing was made -------------------------------------------------------------------


def unreadable(p: Place) -> list[str]:
    (p.tmp / "gone").symlink_to(p.tmp / "nowhere")
    return p.verb("run", folder=p.tmp / "gone")


def images_missing(p: Place) -> list[str]:
    root = p.rows(*[{"image": f"{i}.png", "text": "a circle"} for i in range(8)])
    return p.verb("run", folder=root)


def text_too_long(p: Place) -> list[str]:
    shutil.copy(p.folder / "0.png", p.tmp / "0.png")
    shutil.copytree(p.folder, p.tmp / "data")
    p.rows(*[{"image": f"{i}.png", "text": f"{i} circle " * 200} for i in range(16)])
    for name in ("vqa.jsonl", "docs.jsonl"):
        (p.tmp / "data" / name).unlink()
    return p.verb("run", folder=p.tmp / "data")


def workdir_is_a_file(p: Place) -> list[str]:
    shutil.rmtree(p.work, ignore_errors=True)
    p.work.write_text("notes")
    return p.verb("tokenizer")


def workdir_below_a_file(p: Place) -> list[str]:
    """The embedded data are drawn into the workdir, before any stage."""
    p.work.mkdir(parents=True, exist_ok=True)
    (p.work / "notes").write_text("a list")
    return ["tokenizer", "--config", "shapes", "--workdir", str(p.work / "notes" / "run")]


def two_processes_without_a_coordinator(p: Place) -> list[str]:
    return p.verb("train", "--processes", "2")


def request_file(data: bytes, name: str = "prompts.jsonl") -> Callable[[Place], list[str]]:
    return lambda p: p.verb("sample", "--requests", p.file(name, data), "--output", str(p.tmp / "out"))


def output_is_a_file(p: Place) -> list[str]:
    requests = p.file("prompts.txt", b"a circle\n")
    return p.verb("sample", "--requests", requests, "--output", p.file("out", b"notes"))


def spec(text: str) -> str:
    return (
        "from ar_unified.experiment.config import defaults, model\n"
        "def get_config(arg=None):\n"
        "    c = defaults(); c.model = model('debug')\n"
        f"    c.data.train = ({text},)\n"
        "    return c\n"
    )


FRESH: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "no such config": (lambda p: own(p, "", "--config", "experiments/shape.py"), "experiments/shape.py"),
    "a config that is no Python": (lambda p: own(p, "def get_config(:\n"), r"own.py.*line 1"),
    "a config without get_config": (lambda p: own(p, "x = 1\n"), "own.py.*get_config"),
    "a config that fails": (lambda p: own(p, "def get_config(arg=None):\n    return 1 / 0\n"), "own.py.*division"),
    "an argument that the config does not know": (
        lambda p: ["run", "--config", f"{ROOT}/experiments/folder.py:pth=x", "--workdir", str(p.work)],
        "expected path.*found pth",
    ),
    "an unknown key": (lambda p: p.verb("run", "--config.training.stepz=3"), "stepz"),
    "a word for a number": (lambda p: p.verb("run", training__steps="many"), "many"),
    "an unknown choice": (lambda p: p.verb("run", training__optimizer="adamv"), "training.optimizer.*adamw.*muon"),
    "an unknown protocol": (lambda p: p.verb("run", evaluation__protocol="exactly"), "evaluation.protocol.*exact"),
    "an unknown context": (lambda p: p.verb("run", sampling__context="none"), "sampling.context"),
    "a layout in capitals": (lambda p: p.verb("run", data__layout="Rows"), "data.layout.*grid.*rows"),
    "warm-up longer than the training": (lambda p: p.verb("run", training__warmup_steps=99), "warmup_steps"),
    "rows shorter than documents": (lambda p: p.verb("run", training__sequence_length=32), "sequence_length"),
    "rows that devices cannot share": (lambda p: p.verb("run", training__batch_size=6), "batch_size"),
    "a size no multiple of the factor": (lambda p: p.verb("run", data__image_size="(33,33)"), "image_size"),
    "no such data": (lambda p: p.verb("run", folder=p.tmp / "none"), "none.*(no such|expected a folder)"),
    "a link that leads nowhere": (unreadable, "gone"),
    "an empty folder": (lambda p: p.verb("run", folder=p.tmp), "captions.jsonl"),
    "a file for a folder": (lambda p: p.verb("run", folder=Path(p.file("data", b"x"))), "data"),
    "rows that are no JSON": (lambda p: p.verb("run", folder=p.rows(b"image,text", b"0.png,circle")), "bad_json"),
    "images that are not there": (images_missing, "missing_image"),
    "texts that are too long": (text_too_long, "too_long"),
    "an unknown kind of source": (lambda p: own(p, spec("dict(kind='floppy', path='x')")), "floppy.*"),
    "an unknown key of a source": (lambda p: own(p, spec("dict(kind='text', path='.', lines=3)")), "lines"),
    "a dataset that TFDS does not know": (lambda p: own(p, spec("dict(kind='tfds', name='shaps/x')")), "shaps"),
    "no such text model": (lambda p: p.verb("tokenizer", text_tokenizer__model=p.tmp / "x.model"), "x.model"),
    "a text model that is none": (
        lambda p: p.verb("tokenizer", text_tokenizer__model=p.file("x.model", b"\x00\x01")),
        "text_tokenizer.model",
    ),
    "no such network": (
        lambda p: p.verb("tokenizer", image_tokenizer__perceptual="lpips", image_tokenizer__perceptual_file="x.st"),
        "x.st",
    ),
    "a workdir that is a file": (workdir_is_a_file, "--workdir .*expected a folder; found the file"),
    "a workdir below a file": (workdir_below_a_file, "--workdir .*expected a folder; found the file .*notes"),
    "prepare before the tokenizers": (lambda p: p.verb("prepare"), "run `ar-unified tokenizer`"),
    "train before prepare": (lambda p: p.verb("train"), "run `ar-unified"),
    "sample before train": (lambda p: p.verb("sample", "--requests", p.file("a.txt", b"a\n")), "run `ar-unified"),
    "evaluate before train": (lambda p: p.verb("evaluate"), "run `ar-unified"),
    "flags that need another": (lambda p: p.verb("evaluate", "--crop", "32"), "--images"),
    "a process without the others": (two_processes_without_a_coordinator, "--coordinator"),
    "validate nothing": (lambda p: ["validate"], "a folder or --config"),
    "validate what is not there": (lambda p: ["validate", str(p.tmp / "none")], "none: no such"),
    "plan for an unknown chip": (
        lambda p: ["plan", "--config", f"{ROOT}/experiments/pretrain.py:model=debug", "--target", "v9:2x2"],
        "v9",
    ),
    "plan for a shape that is none": (
        lambda p: ["plan", "--config", f"{ROOT}/experiments/pretrain.py:model=debug", "--target", "v5p:4xfour"],
        "4xfour",
    ),
}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file except logs and locks, which every attempt writes."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if "logs" not in path.parts}


@pytest.mark.parametrize("mistake", FRESH)
def test_a_mistake_at_the_start(mistake, folder, tmp_path, monkeypatch):
    make, words = FRESH[mistake]
    place = Place(folder, tmp_path / "work", tmp_path, monkeypatch)
    argv, before = make(place), tree(folder)
    refused(argv, words)
    left = tree(place.work) if place.work.is_dir() else {}
    half = [name for name in left if name.endswith("~") or name.endswith("-tmp")]
    assert not half and tree(folder) == before


# ---- in a workdir where everything was trained -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("trained") / "work"
    for verb in ("tokenizer", "prepare", "train"):
        assert main(command(verb, folder, work, **FEW)) == 0
    return work


def cut(name: str) -> Callable[[Place], None]:
    """Removes the second half of a file."""

    def damage(place: Place) -> None:
        path = place.work / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def removed(name: str) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        path = place.work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def foreign_checkpoint(place: Place) -> None:
    """Puts another tokenizer's vocabulary under the name of ours."""
    folder = place.work / "model" / "checkpoints"
    manifest = Checkpoints(folder, readonly=True).metadata()["manifest"]
    shutil.rmtree(folder)
    checkpoints = Checkpoints(folder)
    other = manifest | {"text_hash": "another"}
    checkpoints.save(2, params={"x": np.zeros(2)}, optimizer={"y": np.zeros(2)}, metadata={"manifest": other})
    checkpoints.close()


def busy(place: Place) -> None:
    """Makes another process seem to hold the lock."""
    (place.work / "model" / "done.json").unlink()
    workdirs.own(place.work / "model")
    held = workdirs._held.copy()
    place.undo.setattr(workdirs, "_held", {})
    place.undo.setattr(place, "held", held, raising=False)


ASK = {"prompt": "a red circle"}


def sample(place: Place, **changes: Any) -> list[str]:
    requests = place.file("prompts.jsonl", json.dumps(ASK).encode())
    return place.verb("sample", "--requests", requests, "--output", str(place.tmp / "out"), **changes)


def mended_data(place: Place) -> list[str]:
    """Removes one row from the folder."""
    root = place.tmp / place.folder.name
    shutil.copytree(place.folder, root)
    (root / "captions.jsonl").write_text("".join((root / "captions.jsonl").read_text().splitlines(True)[1:]))
    return place.verb("run", folder=root)


TRAINED: dict[str, tuple[Callable[[Place], None], Callable[[Place], list[str]], str, int]] = {
    "a changed codebook": (
        lambda p: None,
        lambda p: p.verb("run", image_tokenizer__width=16),
        "width.*delete.*repeat --config.image_tokenizer.width=8",
        2,
    ),
    "data that have changed": (
        lambda p: None,
        mended_data,
        "the data have changed since .*delete text_tokenizer, image_tokenizer, data, model in this one",
        2,
    ),
    "a changed loss": (lambda p: None, lambda p: p.verb("train", loss__prompt=0.5), "loss.prompt.*delete", 2),
    "a text model cut short": (cut("text_tokenizer/text.model"), sample, "text.model", 2),
    "an image tokenizer cut short": (cut("image_tokenizer/weights.safetensors"), sample, "weights.safetensors", 2),
    "a record that is no JSON": (cut("model/done.json"), lambda p: p.verb("train"), "done.json", 2),
    "no checkpoint": (removed("model/checkpoints"), sample, "no checkpoint", 2),
    "a checkpoint of another vocabulary": (foreign_checkpoint, sample, "text_hash", 2),
    "shards that are gone": (
        lambda p: (removed("model")(p), removed("data/train")(p)) and None,
        lambda p: p.verb("train"),
        "data/train",
        2,
    ),
    "somebody else's stage": (busy, lambda p: p.verb("train"), "being made by process", 2),
    "a full disk": (
        lambda p: (removed("data")(p), full_disk(p, "manifest.json")) and None,
        lambda p: p.verb("prepare"),
        "No space left.*Finished work is kept",
        3,
    ),
    "a workdir that cannot be written": (
        lambda p: (removed("model")(p), read_only(p)) and None,
        lambda p: p.verb("train"),
        "Read-only",
        2,
    ),
    "no such requests": (
        lambda p: None,
        lambda p: p.verb("sample", "--requests", str(p.tmp / "none.jsonl")),
        "none.jsonl",
        2,
    ),
    "requests that are no text": (lambda p: None, request_file(b"\x89PNG\r\n\x1a\n\x00\x00", "a.png"), "a.png", 2),
    "an empty file of requests": (lambda p: None, request_file(b""), "prompts.jsonl", 2),
    "an output that is a file": (lambda p: None, output_is_a_file, "out", 2),
    "a size that the devices cannot share": (
        lambda p: None,
        lambda p: sample(p, sampling__batch_size=3),
        "batch_size",
        2,
    ),
    "a layout of nothing": (
        lambda p: None,
        lambda p: p.verb("sample", "--layout", "geneval", "--output", str(p.tmp / "none")),
        "none",
        2,
    ),
    "images that are not there": (
        lambda p: None,
        lambda p: p.verb("evaluate", "--only", "tokenizer", "--images", str(p.tmp / "none")),
        "--images",
        2,
    ),
}


@pytest.mark.parametrize("mistake", TRAINED)
def test_a_mistake_in_a_trained_workdir(mistake, trained, folder, tmp_path, monkeypatch):
    damage, make, words, status = TRAINED[mistake]
    place = Place(folder, tmp_path / "work", tmp_path, monkeypatch)
    shutil.copytree(trained, place.work)
    damage(place)
    before = tree(place.work)
    refused(make(place), words, status)
    monkeypatch.undo()
    after = tree(place.work)
    lost = {name for name in before if before[name] != after.get(name)} - {"config.json"}
    half = [name for name in after if name.endswith("~") or ".orbax-checkpoint-tmp" in name]
    assert not lost and not half


def test_there_are_forty_of_them_and_more():
    assert len(FRESH) + len(TRAINED) >= 40


def test_verbs_that_only_read_leave_a_finished_workdir_as_it_is(trained, folder, tmp_path, monkeypatch):
    place = Place(folder, tmp_path / "work", tmp_path, monkeypatch)
    shutil.copytree(trained, place.work)
    before = {path: path.stat().st_mtime_ns for path in place.work.rglob("*")}
    row = {"prompt": "a red circle", "mode": "text", "max_tokens": 2}
    requests = place.file("prompts.jsonl", json.dumps(row).encode())
    assert main(place.verb("sample", "--requests", requests, "--output", str(tmp_path / "out"))) == 0
    assert main(place.verb("train")) == main(place.verb("prepare")) == 0
    config = command("validate", folder, place.work)[1:3]
    assert main(["validate", *config, "--workdir", str(place.work), "--show", "1"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in place.work.rglob("*")}
