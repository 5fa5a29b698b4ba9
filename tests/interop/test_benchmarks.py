"""The benchmarks beside transformers run, and both sides compute the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import cpu_vs_transformers, image_tokenizer, sampling_vs_transformers

pytestmark = pytest.mark.interop


def test_training_and_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    cpu_vs_transformers.main(["--size", "trial", "--dtypes", "float32", "--batches", "2", "--repeats", "1"])
    said = capsys.readouterr().out
    ours, theirs = (
        list(map(float, re.findall(r"[\d.]+", part)))
        for part in re.search(r"losses ours (.*); transformers (.*)", said).groups()
    )  # type: ignore[union-attr]
    assert ours == pytest.approx(theirs, abs=2e-4) and len(ours) == 2
    assert "same greedy tokens: 1.000" in said and said.count("tok/s") == 5


def test_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AR_UNIFIED_BENCHMARK_SIDE", "2")
    monkeypatch.setattr(sampling_vs_transformers, "SIDE", 2)
    monkeypatch.setattr(sampling_vs_transformers, "NEW", 8)
    sampling_vs_transformers.main(
        ["--images", "1", "--texts", "--repeats", "1", "--output", str(tmp_path / "out.json")]
    )
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]["images b=1"]
    assert runs.keys() == {"ours", "hf", "tuned", "loop"} and all(len(times) == 1 for times in runs.values())
    assert "images/min" in capsys.readouterr().out


def test_image_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_tokenizer, "SIDE", 32)
    for task, bound in (("encode", 0), ("decode", 1e-3)):
        ours, theirs = image_tokenizer.ours("f16", task, 1)(), image_tokenizer.theirs("f16", task, 1)()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=task)
        assert ours.shape == theirs.shape and len(np.unique(ours)) > 1
