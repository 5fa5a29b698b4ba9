"""Five sets in their own formats, mixed by weight with experiments/mixture.py, are prepared, trained on and validated.

The test uses made-up sets with the names and files of the sets in that experiment's docstring. If the real sets are
next to this repository, it also uses their first rows.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ar_unified.cli.main import main
from experiments.mixture import SOURCES, weights

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
SHARES = {name.rpartition("/")[2]: share for name, share in weights(SOURCES).items()}
ROWS, LINES = 40, 8  # how much is taken of each JSONL file, and of each text file
TINY = {
    "image_tokenizer.steps": 2,
    "image_tokenizer.batch_size": 8,
    "image_tokenizer.width": 8,
    "image_tokenizer.blocks": "(0,0,1)",
    "model.d_model": 32,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "model.head_dim": 16,
    "model.d_mlp": 64,
    "training.steps": 8,
    "training.warmup_steps": 2,
    "training.batch_size": 8,
    "training.log_every": 1,
    "training.validate_every": 8,
    "training.checkpoint_every": 8,
}


def cut(folder: Path) -> int:
    """Copies the first rows of the real sets and their images; returns the size of a vocabulary for them."""
    for name in weights(SOURCES):
        (folder / name).mkdir(parents=True)
        for file in (DATA / name).glob("*.jsonl"):
            rows = list(itertools.islice(file.open(encoding="utf-8"), ROWS))
            (folder / name / file.name).write_text("".join(rows), encoding="utf-8")
            for row in map(json.loads, rows):
                for part in row.get("segments", [row]):
                    if "image" in part:
                        copy = folder / name / part["image"]
                        copy.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(DATA / name / part["image"], copy)
        for file in (DATA / name).glob("*.txt"):
            lines = itertools.islice(file.open(encoding="utf-8"), LINES)
            (folder / name / file.name).write_text("".join(lines), encoding="utf-8")
    return 2300  # large enough for 29 languages


def make(folder: Path) -> int:
    """Makes sets with the names, files and keys of the real ones, but random images; returns a vocabulary's size."""
    random = np.random.default_rng(0)
    counts: dict[str, int] = {}
    for name in weights(SOURCES):
        (folder / name / "images").mkdir(parents=True)

    def image(name: str) -> str:
        counts[name] = number = counts.get(name, -1) + 1
        pixels = random.integers(0, 256, (2, 2, 3), np.uint8).repeat(16, 0).repeat(16 + 8 * (number % 2), 1)
        Image.fromarray(pixels).save(folder / name / "images" / f"{number}.png")
        return f"images/{number}.png"

    def told(name: str, number: int) -> dict[str, object]:
        text = [{"type": "text", "text": f"step {number} " * 9} for _ in range(2)]
        return {"title": f"story {number}", "segments": [text[0], {"type": "image", "image": image(name)}, text[1]]}

    rows = {
        "based-cooking/docs": told,
        "based-cooking/captions": lambda name, i: {"image": image(name), "text": f"dish {i}"},
        "clothing/captions": lambda name, i: {"image": image(name), "text": f"a photo of dress {i}"},
        "noto-emoji/captions": lambda name, i: {"image": image(name), "text": f"face {i}"},
        "easy-vqa/captions": lambda name, i: {"image": image(name), "text": f"figure {i}"},
        "easy-vqa/vqa": lambda name, i: {"image": image(name), "question": f"which is {i}?", "answer": "this"},
    }
    for file, row in rows.items():
        made = [json.dumps(row(file.partition("/")[0], i)) for i in range(ROWS)]
        (folder / f"{file}.jsonl").write_text("\n".join(made))
    shutil.rmtree(folder / "text" / "udhr" / "images")
    for i in range(29):
        (folder / "text" / "udhr" / f"{i:02d}.txt").write_text("\n".join(f"Article {j} of {i}." for j in range(LINES)))
    return 300


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets",
    [
        make,
        pytest.param(
            cut,
            marks=pytest.mark.skipif(
                not all((DATA / name).exists() for name in weights(SOURCES)),
                reason="the shared data is not beside this repository",
            ),
        ),
    ],
)
def test_five_sets_are_mixed_by_weight_without_code(sets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir, folder = tmp_path / "w", tmp_path / "sets"
    settings = TINY | {"text_tokenizer.vocab_size": sets(folder)}
    config = ["--config", f"{ROOT}/experiments/mixture.py:path={folder},side=32", "--workdir", str(workdir)]
    config += [f"--config.{key}={value}" for key, value in settings.items()]
    for verb in ("tokenizer", "prepare", "train"):
        assert main([verb, *config]) == 0
    said = capsys.readouterr().out.splitlines()
    for part in ("train", "validation"):
        report = json.loads((workdir / "data" / part / "manifest.json").read_text())["report"]
        assert report.keys() == SHARES.keys()
        assert all(found["documents"] and not found["skipped"] for found in report.values()), "all of them is good"
        if part == "train":  # too few rows are held out to have every kind
            kinds = {name: found["tasks"] for name, found in report.items()}
            assert kinds["based-cooking"]["interleaved"] and kinds["easy-vqa"]["image_to_text"], kinds
            assert kinds["udhr"].keys() == {"text"}, kinds
    for name, share in SHARES.items():
        (line,) = (line for line in said if line.startswith(f"{name}: ") and "rows an epoch" in line)
        assert f"{100 * share:.1f}% of the rows" in line
    rows = [json.loads(row) for row in (workdir / "model" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    assert main(["validate", *config, "--first", "5", "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert all(f"train: {name}" in page and f"validation: {name}" in page for name in SHARES)
