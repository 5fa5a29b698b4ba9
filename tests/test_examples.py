"""The scripts of examples/ do what they say, on a tiny bundle."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ar_unified.bundle import Bundle
from ar_unified.cli import train
from tests.bundles import SENTENCES, grey, parts, write

ROOT = Path(__file__).resolve().parents[1]


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("bundle") / "tiny", loss={"softmax": "by_side"}).folder)


def test_load_and_sample(bundle, tmp_path, capsys):
    example("load_and_sample")([bundle, "A red star.", "--n", "2", "--output", str(tmp_path), "--question", "Where?"])
    assert [Image.open(tmp_path / f"{i}.png").size for i in range(2)] == [(16, 16)] * 2
    out = capsys.readouterr().out
    assert f"2 images in {tmp_path}\nWhere? " in out


def test_score(bundle, tmp_path, capsys):
    Image.fromarray(grey()).save(tmp_path / "grey.png")
    example("score")([bundle, str(tmp_path / "grey.png"), *SENTENCES[:3]])
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert sorted(line[10:] for line in lines) == sorted(SENTENCES[:3])
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3 and max(scores) < 0


def test_train_on_your_folder(bundle, tmp_path, capsys, monkeypatch):
    tasks, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda task, *args, **more: tasks.append(task) or fit(task, *args, **more))
    folder = tmp_path / "mine"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": SENTENCES[i % 4]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = dict(steps=2, warmup_steps=0, sequence_length=64, batch_size=8, attention_share=False, learning_rate=0.001)
    changes = [f"--config.training.{key}={value}" for key, value in few.items()]
    new = tmp_path / "new"
    assert example("train_on_your_folder")([bundle, str(folder), str(tmp_path / "work"), str(new), *changes]) == 0
    assert f"{new}: a model of 300 text pieces and 24 image codes" in capsys.readouterr().out
    begun, ended = Bundle(bundle), Bundle(new)
    assert ended.language == begun.language and ended.hash != begun.hash
    (task,) = tasks
    assert task.split == ended.grammar.vocabulary.image_offset and ended.sections["loss"] == {"softmax": "by_side"}
    before, after = parts()["params"], ended.params()
    moved = np.abs(np.asarray(after["norm"]) - before["norm"])
    assert 0 < moved.max() < 0.01, "two steps away from the bundle's weights, and not from fresh ones"
    far = np.abs(np.asarray(after["embedding"]) - before["embedding"]).max()
    assert 0 < far < 0.01
