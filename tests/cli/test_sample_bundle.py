"""`ar-unified sample --from BUNDLE`: requests in bulk, without a workdir."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ar_unified
from ar_unified.cli.main import main
from tests import bundles
from tests.cli.conftest import refused

PROMPTS = ["A small star.", "red", "A red star in the top left."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample")
    bundles.write(root / "bundle")
    rows = [{"id": f"r{i}", "prompt": prompt, "seed": i} for i, prompt in enumerate(PROMPTS)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    given = ["--from", folder / "bundle", "--requests", folder / "prompts.jsonl", "--output", output]
    return ["sample", *map(str, given), *more]


def test_a_bundle_draws_what_it_draws_in_a_notebook(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "out", "--batch-size", "8", "--n", "2")) == 0
    assert str(tmp_path / "out" / "index.html") in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert sorted((line["id"], line["sample"]) for line in lines) == [(f"r{i}", j) for i in range(3) for j in range(2)]
    model = ar_unified.load(folder / "bundle", batch_size=8)
    for line in lines:
        number = int(line["id"][1:])
        expected = model.draw(PROMPTS[number], seed=number, n=2)[line["sample"]]
        image = tmp_path / "out" / line["segments"][0]["image"]
        np.testing.assert_array_equal(np.asarray(Image.open(image).convert("RGB")), np.asarray(expected))
    before = (tmp_path / "out" / "samples.jsonl").read_bytes()
    assert main(arguments(folder, tmp_path / "out", "--batch-size", "8", "--n", "2")) == 0
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == before, "what is done is not done again"


def test_what_goes_with_a_bundle_and_what_does_not(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(arguments(folder, out, "--workdir", str(tmp_path)), "--from BUNDLE needs no workdir")
    refused(arguments(folder, out, "--config.seed=1"), "--from BUNDLE needs no workdir")
    refused(arguments(folder, out, "--processes", "2"), "--processes does nothing with --from, where --part K/N shares")
    of_bundle = ["sample", "--from", str(folder / "bundle")]
    refused([*of_bundle, "--output", str(out)], "expected --requests FILE and --output DIR .* found no --requests")
    refused([*of_bundle, "--requests", str(folder / "prompts.jsonl")], "found no --output")
    of_run = ["sample", "--config", "shapes", "--workdir", str(tmp_path), "--requests", str(folder / "prompts.jsonl")]
    refused([*of_run, "--max-length", "64"], "--max-length does nothing with a workdir, which uses the keys")
    refused(
        ["sample", "--requests", str(folder / "prompts.jsonl")],
        "expected --workdir DIR of a training, or --from BUNDLE",
    )
    refused(["sample", "--from", str(tmp_path), *arguments(folder, out)[3:]], "expected a bundle, which has a bundle")
    assert not out.exists()
    refused(arguments(folder, out, "--max-length", "8"), "none of 3 requests .*the engine's max_length is 8")
