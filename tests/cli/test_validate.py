"""`ar-unified validate`: what may be validated, where the page is written, and what the exit status means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ar_unified.cli.main import main
from tests import bundles

CONFIG = """
from ml_collections import ConfigDict
from ar_unified.experiment.config import defaults
def get_config():
    config = defaults()
    config.name = "three sets"
    spec = lambda name: (ConfigDict(dict(kind="jsonl", path={root!r} + "/" + name)),)
    config.data.train, config.data.validation = spec("train.jsonl"), spec("validation.jsonl")
    config.data.tests.other = spec("test.jsonl")
    return config
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (3, 3, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    for name, images in {"train": (0, 1), "validation": (1,), "test": (2, 9)}.items():
        rows = [json.dumps(dict(image=f"{i}.png", text=f"{name} {i}")) for i in images]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "config.py").write_text(CONFIG.format(root=str(tmp_path)))
    return tmp_path


def test_all_sets_of_a_config_are_looked_at(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--config", "config.py", "--output", "out/page.html"]) == 1
    said = capsys.readouterr().out
    for line in ("train: train: 2 items", "validation: validation: 1 items", "other: test: 2 items", "missing_image"):
        assert line in said
    assert (
        "1 of 2 training documents share an image or their text with a held-out one" in said
        and "page: out/page.html" in said
    )
    html = (root / "out/page.html").read_text()
    assert "<h1>three sets</h1>" in html and "other: test" in html and html.count("data:image/png") >= 5


def test_two_sources_of_one_name_are_refused_before_they_are_read(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = 'spec("train.jsonl") + spec("train.jsonl"), spec("validation.jsonl")'
    config = (root / "config.py").read_text().replace('spec("train.jsonl"), spec("validation.jsonl")', both)
    (root / "config.py").write_text(config)
    assert main(["validate", "--config", "config.py"]) == 2
    said = capsys.readouterr().err
    same = "config.data.train[1]: its name 'train' means the same folder as the name of config.data.train[0]: "
    assert f"{same}give one of the two sources a `label`" in said
    assert not (root / ".cache/validate/three sets.html").exists()
    labelled = config.replace("    return config", '    config.data.train[1].label = "again"\n    return config')
    (root / "config.py").write_text(labelled)
    assert main(["validate", "--config", "config.py"]) == 1, "the missing image"
    assert "train: again: 2 items" in capsys.readouterr().out


def test_a_page_is_written_where_it_says(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "train.jsonl"]) == 0
    assert "page: .cache/validate/train.jsonl.html" in capsys.readouterr().out
    assert (root / ".cache/validate/train.jsonl.html").exists()


def test_sources_as_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs = [dict(kind="jsonl", path="train.jsonl", weight=2.0), dict(kind="jsonl", path="test.jsonl")]
    assert main(["validate", json.dumps(specs[0])]) == 0
    assert main(["validate", json.dumps(specs), "--first", "1"]) == 0, "the bad item is the second"
    said = capsys.readouterr().out
    assert "test: the first 1 of 2 items" in said and "page: .cache/validate/sources.html" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["[]"], "expected a source or a list of sources as JSON"),
        (['{"kind": '], "expected a source as JSON"),
        (['{"kind": "jsonl"}', "--links"], "--links does nothing with sources"),
        (["train.jsonl", "--first", "0"], "--first: expected at least 1"),
        (["train.jsonl", "--output", "config.py/page.html"], "--output config.py/page.html"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ",
)
def test_what_cannot_be_done_is_said(
    root: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", *argv]) == 2
    assert said in capsys.readouterr().err


def test_a_model_is_not_read_as_the_texts_beside_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundles.write(root / "bundle")
    assert main(["validate", "bundle"]) == 2
    assert "bundle: expected data, found a bundle" in capsys.readouterr().err
    (root / "run/text_tokenizer").mkdir(parents=True)
    (root / "run/config.json").write_text("{}")
    (root / "run/metrics.jsonl").write_text('{"text": "not for training"}')
    assert main(["validate", "run"]) == 2
    assert "run: expected data, found a workdir; `prepare` writes its data into run/data" in capsys.readouterr().err


def test_filters_of_the_config_leave_out_what_prepare_would(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (4, 4)).save(root / "small.png")
    with (root / "train.jsonl").open("a") as file:
        for image in ("small.png", "0.png"):
            file.write("\n" + json.dumps(dict(image=image, text="again")))
    (root / "test.jsonl").write_text(json.dumps(dict(image="2.png", text="test")))
    flags = ["--config", "config.py", "--output", "page.html"]
    assert main(["validate", *flags, "--config.lora.alpha=3.0"]) == 0
    said = capsys.readouterr().out
    assert "train: train: 4 items, 4 good (4 text_to_image), 0 bad\n" in said
    assert "note: config.lora.alpha does nothing here" in said and "config.data.max_tokens is not checked" in said
    filters = ["min_side=8", "held_out=True", "duplicates=images"]
    flags += [f"--config.data.filters.{each}" for each in filters]
    assert main(["validate", *flags]) == 0, "what a filter leaves out is not bad"
    said = capsys.readouterr().out
    assert "train: train: 4 items, 1 good (1 text_to_image), 0 bad, 3 filtered\n" in said
    assert "validation: validation: 1 items, 1 good" in said, "held-out sets are never filtered"
    assert "  left out by config.data.filters: " in said and "bad items" not in said
    for kind in ("1 filtered_size", "1 filtered_held_out", "1 filtered_duplicate"):
        assert kind in said
    assert "small.png" not in said and f"{root}/train.jsonl:3: filtered_size: expected sides of 8 pixels" in said
    page = (root / "page.html").read_text()
    assert "<h3>Left out by config.data.filters</h3>" in page and "0 bad, 3 filtered" in page
    assert not (root / ".cache/validate/three sets").exists(), "no verdicts are kept"
    assert main(["validate", *flags, "--first", "3"]) == 0
    said = capsys.readouterr().out
    assert "train: the first 3 of 4 items, 2 good (2 text_to_image), 0 bad, 1 filtered\n" in said
    assert "config.data.filters: duplicates, max_repeats and held_out are not applied" in said
