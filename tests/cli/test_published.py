"""A training from a published model's bundle has the bundle's tokenizers and layout, so its experiment is short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified import bundle as bundles
from ar_unified.bundle import Bundle, named
from ar_unified.cli.arguments import parser_of
from ar_unified.cli.main import main
from ar_unified.cli.plan import run_of
from ar_unified.experiment import config as configs
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.start import open_experiment
from ar_unified.workdir import Workdir
from tests import tokenizer_files as files
from tests.cli.conftest import ROOT, refused
from tests.published_bundles import parts

EXPERIMENT = """
from ml_collections import ConfigDict
from ar_unified.experiment.config import begin_with, defaults, parse_arg


def get_config(arg=None):
    args, config = parse_arg(arg, path=None, init=None), defaults()
    config.data.train = (ConfigDict(dict(kind="folder", path=args["path"], split="[:75%]")),)
    config.data.validation = (ConfigDict(dict(kind="folder", path=args["path"], split="[75%:]")),)
    begin_with(config, args["init"])
    config.training.update(dict(steps=2, warmup_steps=0, batch_size=8, log_every=1, validate_every=2, preview_every=0))
    return config
"""


def command(verb: str, kind: str, folder: Path, here: Path, *changes: str) -> list[str]:
    """The arguments of an experiment that starts from the bundle of `kind`, which is made here."""
    (here / "mine.py").write_text(EXPERIMENT)
    if not (here / kind).exists():
        bundles.write(here / kind, **parts(kind))
    config = f"{here / 'mine.py'}:path={folder},init={here / kind}"
    return [verb, "--config", config, "--workdir", str(here / "w"), *(f"--config.{change}" for change in changes)]


def opened(workdir: Path) -> Experiment:
    return Experiment(configs.recorded(workdir / "config.json"), Workdir(workdir))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chameleon", pytest.param("emu3", marks=pytest.mark.exhaustive)])
def test_it_is_trained_on_a_folder_and_exported_as_it_came(folder, tmp_path, kind, capsys):
    came = bundles.write(tmp_path / kind, **parts(kind))
    for verb in ("tokenizer", "prepare", "train"):
        assert main(command(verb, kind, folder, tmp_path)) == 0, capsys.readouterr()
    (tmp_path / kind).rename(tmp_path / "gone")  # the workdir now has everything
    assert main(["export", "--workdir", str(tmp_path / "w"), "--output", str(tmp_path / "out")]) == 0
    found, came = Bundle(tmp_path / "out"), Bundle(tmp_path / "gone")
    assert found.record == came.record and found.border == came.border and found.published == came.published
    assert {name: x.tolist() for name, x in found.kept().items()} == {n: x.tolist() for n, x in came.kept().items()}
    file = f"text_tokenizer/{came.text_tokenizer.file}"
    assert (found.folder / file).read_bytes() == (came.folder / file).read_bytes()
    changed = [name for name, leaf in named(found.params()).items() if np.any(leaf != named(came.params())[name])]
    assert "embedding" in changed and "layers.attention.query" in changed
    rows = [json.loads(line) for line in (tmp_path / "w" / "model" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in name for row in rows for name in row)


def test_a_training_is_read_without_the_bundle_that_it_began_with(folder, tmp_path):
    assert main(command("tokenizer", "chameleon", folder, tmp_path)) == 0
    (tmp_path / "chameleon").rename(tmp_path / "gone")
    arguments = parser_of("export").parse_args(["--workdir", str(tmp_path / "w"), "--output", "out"])
    for work in ("export", "requests", "images", "samples", "evaluation", "tokenizer_evaluation"):
        experiment = open_experiment(arguments, ["--config.sampling.text.temperature=0.5"], [work])
        assert experiment.image_tokenizer.config.codebook_size


def test_documents_are_written_in_its_language(folder, tmp_path, capsys):
    for verb in ("tokenizer", "prepare"):
        assert main(command(verb, "emu3", folder, tmp_path)) == 0, capsys.readouterr()
    experiment: Any = opened(tmp_path / "w")
    grammar = experiment.grammar
    assert grammar.manifest() == parts("emu3")["grammar"].manifest() and grammar.vocabulary.used == 635
    assert experiment.text_tokenizer.border == parts("emu3")["text_tokenizer"].border
    assert "67 items -> 67 documents (30 text_to_image, 30 image_to_text, 7 interleaved)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("chameleon", ["data.image_size=(32,32)"], "'layout.height': config.init=.* has 2, this config has 4"),
        ("chameleon", ["data.layout=grid"], "'offsets.size': config.init=.* has 338, this config has 339"),
        ("emu3", ["data.image_size=(128,128)"], "'layout.height': config.init=.* has 12, this config has"),
        (
            "llama",
            ["text_tokenizer.lossy=refuse"],
            "text_tokenizer.lossy: expected 'warn', because the bundle's text .*prefix",
        ),
    ],
)
def test_another_language_is_refused_by_field(folder, tmp_path, kind, changes, words):
    refused(command("tokenizer", kind, folder, tmp_path, *changes), words)


def test_images_may_be_smaller_than_they_may_become(folder, tmp_path):
    assert main(command("tokenizer", "emu3", folder, tmp_path, "data.image_size=(8,8)")) == 0
    assert opened(tmp_path / "w").grammar.layout.height == 12


def test_plan_and_validate_know_its_language_and_what_it_loses(folder, tmp_path, capsys):
    argv = command("validate", "chameleon", folder, tmp_path)
    run = run_of(configs.load(argv[2]))
    assert (run.vocabulary, run.layout) == (
        parts("chameleon")["grammar"].vocabulary,
        parts("chameleon")["grammar"].layout,
    )
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "|<eot>|<boi>|<image code 19>|" in said and "loses text" not in said and "tokens: " in said
    (tmp_path / "texts.txt").write_text("a small red star\n")
    (tmp_path / "text.py").write_text(EXPERIMENT.replace('"folder"', '"text"').replace(', split="[:75%]"', ""))
    bundles.write(tmp_path / "llama", **parts("llama"))
    config = f"{tmp_path / 'text.py'}:path={tmp_path / 'texts.txt'},init={tmp_path / 'llama'}"
    assert main(["validate", "--config", config, "--workdir", str(tmp_path / "v")]) == 0
    assert "this text tokenizer loses text: normalizer_spec.add_dummy_prefix" in capsys.readouterr().out


def test_a_tokenizer_json_may_be_brought_without_a_bundle(tmp_path, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_text("".join(f"{text}\n" for text in files.CORPUS))

    def run(name: str, data: bytes, *more: str) -> list[str]:
        (tmp_path / name).write_bytes(data)
        config = f"{ROOT}/experiments/text_tokenizer.py:path={tmp_path / 'c'}"
        brought = [f"--config.text_tokenizer.model={tmp_path / name}", *more]
        return ["tokenizer", "--config", config, "--workdir", str(tmp_path / f"w {name}"), *brought]

    assert main(run("tokenizer.json", files.byte_level())) == 0
    report: dict[str, Any] = json.loads((tmp_path / "w tokenizer.json" / "text_tokenizer" / "report.json").read_text())
    assert report["pieces"] == 363 and report["symbols_that_text_can_spell"] == ["<tool_call>"] and not report["losses"]
    assert opened(tmp_path / "w tokenizer.json").text_tokenizer.file == "tokenizer.json"
    refused(
        run("qwen.json", files.byte_level("NFC")), "text_tokenizer.model: .*qwen.json: this text tokenizer loses text"
    )
    assert main(run("qwen.json", files.byte_level("NFC"), "--config.text_tokenizer.lossy=warn")) == 0
    assert "this text tokenizer loses text: normalizer NFC" in capsys.readouterr().out
    assert main(run("my.tiktoken", files.tiktoken_file(files.ranks()))) == 0
    refused(
        run("broken.json", b"{"),
        "text_tokenizer.model: .*broken.json: expected a tokenizer.json, found a file that is not JSON",
    )
