"""If a Chameleon's head was never trained on image codes, a message says so at import and when it draws."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ar_unified
from ar_unified.bundle import Bundle
from ar_unified.cli.main import main
from ar_unified.interop.untrained import untrained
from ar_unified.language.border import Border
from ar_unified.language.vocabulary import Role, Vocabulary
from tests.interop import formats, tables

RNG = np.random.default_rng(0)
CODES = 64


def learnt(rows: np.ndarray) -> np.ndarray:
    """Rows of different lengths with a common direction, like trained ones."""
    return (rows * RNG.lognormal(0, 0.5, (len(rows), 1)) + RNG.normal(0, 0.1, rows.shape[1])).astype(np.float32)


HEADS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "are nearly zero": lambda rows: rows * 1e-4,
    "are all alike": lambda rows: np.broadcast_to(rows[:1], rows.shape),
    "look like random numbers": lambda rows: rows,
    "": learnt,
}


def imported(folder: Path, change: Callable[[np.ndarray], np.ndarray], count: int = 1) -> Path:
    """The bundle of Meta's files with new rows for image codes in the head; the rows for text look trained."""
    formats.meta(folder / "download", count=count)
    table = tables.chameleon(placeholder="<reserved08707>")
    codes = table.ids("IMGIMG")
    models = folder / "download" / "models" / ("7b" if count == 1 else "30b")
    paths = sorted(models.glob("consolidated*.safetensors"))
    parts = [load_file(path) for path in paths]
    head = np.concatenate([part["output.weight"] for part in parts])
    images = change(head[codes])
    head = learnt(head)
    head[codes] = images
    for path, part, rows in zip(paths, parts, np.split(head, count), strict=True):
        save_file(part | {"output.weight": np.ascontiguousarray(rows)}, path, metadata={"format": "pt"})
    beside = ["--text", str(folder / "download" / "tokenizer")]
    beside += ["--image", str(folder / "download" / "tokenizer" / "vqgan.safetensors")]
    assert (
        main(["import", "--from", str(models), "--as", "chameleon", "--output", str(folder / "bundle"), *beside]) == 0
    )
    return folder / "bundle"


@pytest.mark.parametrize("how", HEADS)
def test_it_is_told_by_its_head(how: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bundle = imported(tmp_path, HEADS[how], count=4 if how == "are all alike" else 1)
    said, record = capsys.readouterr().out, json.loads((bundle / "published.json").read_text())
    if not how:
        assert "was not trained to generate images" not in said and "untrained" not in record
        return
    assert f"This model was not trained to generate images: its head's rows for image codes {how}" in said
    assert record["untrained"] in said and record["untrained"] in (bundle / "README.md").read_text()


def test_rows_of_zeros_are_told_whatever_is_beside_them() -> None:
    """The rows of an enlarged head start like this, and so do those of a file that was created but never filled."""
    vocabulary = Vocabulary(64, CODES, 1)
    border = Border.from_ids(range(vocabulary.size))
    head, zeros = RNG.normal(size=(vocabulary.size, 8)), np.zeros((vocabulary.size, 8))
    image = vocabulary.ids(Role.IMAGE)
    assert untrained(zeros, border, vocabulary) == "are nearly zero"
    half = zeros.copy()
    half[image] = head[image]
    assert untrained(half, border, vocabulary) == "look like random numbers, unlike the rows of text"


def test_whoever_draws_with_it_is_warned(tmp_path: Path) -> None:
    for how in ("are nearly zero", ""):
        model = ar_unified.load(imported(tmp_path / (how or "trained"), HEADS[how]), max_length=128)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (image,) = model.draw("a red circle", guidance=1)
        told = [str(each.message) for each in caught if "not trained to generate images" in str(each.message)]
        assert image.size == (16, 16) and len(told) == bool(how), how
    trained = Bundle(tmp_path / "trained" / "bundle").published
    assert trained is not None and trained["system"] == "chameleon"
