"""An experiment without images: stages do their work, and a stage with nothing to do says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ar_unified.cli.main import main
from ar_unified.cli.plan import run_of
from ar_unified.errors import UNUSABLE
from ar_unified.experiment import config as configs
from ar_unified.language.document import TextPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import TEXT_ALONE
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.sampling.plan import plan
from ar_unified.sampling.request import Request, RequestError
from tests.sampling.tiny import Letters

CONFIG = """
from ml_collections import ConfigDict
from ar_unified.experiment.config import defaults, model

def get_config(path):
    config = defaults()
    source = lambda split: (ConfigDict(dict(kind="text", path=path, by="line", split=split)),)
    config.data.train, config.data.validation = source("[:95%]"), source("[95%:]")
    config.image_tokenizer.steps = 0
    config.model = model("debug", n_layers=1)
    config.training.steps, config.training.warmup_steps, config.training.batch_size = 6, 1, 8
    config.training.sequence_length = config.data.max_tokens = config.sampling.max_length = 64
    config.sampling.batch_size = 8
    return config
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "corpus").mkdir()
    lines = [f"the red circle {i} stands left of the blue square and smiles" for i in range(40)]
    (tmp_path / "corpus" / "a.txt").write_text("\n".join(lines))
    (tmp_path / "config.py").write_text(CONFIG)
    return ["--config", f"{tmp_path / 'config.py'}:{tmp_path / 'corpus'}", "--workdir", str(tmp_path / "w")]


@pytest.mark.slow
def test_text_alone_runs_through_every_stage(arguments, tmp_path, capsys):
    assert main(["run", *arguments]) == 0
    out, workdir = capsys.readouterr().out, tmp_path / "w"
    assert "text alone: no image tokenizer" in out and "image_tokenizer: none is trained" in out
    assert "tokenizer_evaluation: there is no image tokenizer" in out
    assert not (workdir / "image_tokenizer").exists() and not (workdir / "tokenizer_evaluation").exists()
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation["validation"]["bits_per_text_byte"] > 0 and evaluation["tokenizer"] == {}
    assert "</html>" in (workdir / "report.html").read_text()
    samples = [json.loads(line) for line in (workdir / "samples" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2, "of the two lines that are held out"
    for sample in samples:
        assert sample["segments"][0]["type"] == "text" and not sample.get("error")
        assert "the red circle".startswith(sample["prompt"][0]["text"][:14])

    requests = [
        dict(id="words", prompt="the red", mode="text"),
        dict(id="drawn", prompt="the red"),
        dict(id="shown", content=[dict(type="image", image="a.png")], mode="text"),
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in requests))
    assert main(["sample", *arguments, "--requests", str(tmp_path / "r.jsonl")]) == 0
    rows = [json.loads(line) for line in (workdir / "samples" / "r" / "samples.jsonl").read_text().splitlines()]
    found = {row["id"]: row.get("error", "") for row in rows}
    assert not found["words"] and 'expected "text" or "free"' in found["drawn"]
    assert "trained on text alone; found an image" in found["shown"]
    capsys.readouterr()
    assert main(["run", *arguments]) == 0
    assert capsys.readouterr().out.count("done already") == 5


def test_images_without_an_image_tokenizer_are_refused_before_the_first_stage(arguments, tmp_path, capsys):
    source = f"(dict(kind='images', path='{tmp_path}', label='album'),)"
    (tmp_path / "0.png").write_bytes(b"")
    config = tmp_path / "config.py"
    config.write_text(CONFIG.replace("    return config", f"    config.data.tests.more = {source}\n    return config"))
    assert main(["run", *arguments]) == UNUSABLE
    said = capsys.readouterr()
    assert "config.image_tokenizer.steps is 0 and no model is given, but album may have images" in said.err
    assert "====" not in said.out and not (tmp_path / "w" / "text_tokenizer").exists()


def test_a_plan_of_text_alone_has_no_image_codes(arguments):
    vocabulary = run_of(configs.load(arguments[1], [])).vocabulary
    assert vocabulary.codebook_size == 0 and vocabulary.text_size == 512


@pytest.mark.parametrize(
    "wrong",
    [
        dict(mode="image"),
        dict(mode="interleaved"),
        dict(mode="free", min_images=1),
        dict(mode="free", canvas=np.zeros((1, 1), np.int32)),
    ],
)
def test_a_request_for_a_image_is_refused_with_a_sentence(wrong):
    grammar = Grammar(Vocabulary(16, 0), TEXT_ALONE, Letters())
    request = Request("a", (TextPart("abc"),), **wrong)
    with pytest.raises(RequestError, match="this model was trained on text alone"):
        plan(grammar, request, 64)
    for mode in ("text", "free"):
        assert plan(grammar, Request("a", (TextPart("abc"),), mode=mode), 64).budget == 64 - 5
