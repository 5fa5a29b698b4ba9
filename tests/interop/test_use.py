"""A Chameleon, imported from Meta's files, reads and draws images like any model, with equal results in a batch and one
by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import ar_unified
from ar_unified.cli.main import main
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.model import Model
from tests.interop import formats


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = tmp_path_factory.mktemp("meta")
    formats.meta(folder / "download")
    beside = ["--text", str(folder / "download" / "tokenizer")]
    beside += ["--image", str(folder / "download" / "tokenizer" / "vqgan.safetensors")]
    weights = str(folder / "download" / "models" / "30b")
    assert main(["import", "--from", weights, "--as", "chameleon", "--output", str(folder / "bundle"), *beside]) == 0
    return ar_unified.load(folder / "bundle", batch_size=16, max_length=256)


def test_sixteen_ragged_requests_together_are_those_one_by_one(model: Model) -> None:
    rng, warm = np.random.default_rng(0), Filter(temperature=1.0)
    pixels = rng.integers(0, 256, (16, 16, 16, 3), np.uint8)

    def request(i: int):
        content = ["a circle " * (i % 5 + 1), *([pixels[i]] if i % 2 else [])]
        kind = {"mode": "image"} if i % 4 == 3 else {"mode": "text", "max_tokens": 8 + i}
        asked = model.request(*content, seed=i, guidance=1.0, text=warm, image=warm, **kind)
        return dataclasses.replace(asked, id=f"{i:02}")

    requests = [request(i) for i in range(16)]
    together = sorted(model.generate(requests), key=lambda sample: sample.request.id)
    for asked, sample in zip(requests, together, strict=True):
        (alone,) = model.generate([asked])
        assert not sample.error and np.array_equal(sample.tokens, alone.tokens), asked.id
    drawn = [part for sample in together for part in sample.document.parts if hasattr(part, "codes")]
    assert len(drawn) == 4
    for part in drawn:
        assert np.asarray(model.detokenize_image(part.codes)).shape == (16, 16, 3)
