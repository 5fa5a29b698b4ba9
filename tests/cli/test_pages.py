"""Runs the commands on the pages of docs/: the commands of one page in order, in a new folder, on little data.

tests/cli/pages.py says how, and which commands are not run and why.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds

from ar_unified.cli.main import main
from ar_unified.data.shapes import Shapes
from tests import stores, test_docs
from tests.cli.conftest import ROOT
from tests.cli.pages import NOT_RUN, RUN, Page, commands, small, why_not
from tests.cli.readers import HAS, fewer_levels, machine

TRAINING = ("run", "train", "demo")


def test_every_command_is_run_or_has_a_reason():
    run = {param.values[0].file for param in RUN}
    missing = [
        f"{file}: {' '.join(words)}" for file, words in commands() if file not in run and not why_not(file, words)
    ]
    assert not missing
    stale = [key for key, why in NOT_RUN.items() if not any(why_not(*each) is why for each in commands())]
    assert not stale
    assert len([each for each in commands() if not why_not(*each)]) > 90


@pytest.mark.parametrize("of", NOT_RUN.values(), ids=lambda of: of.why)
def test_what_runs_a_command_elsewhere_is_there(of):
    file, word = of.test
    assert of.why and (not file or word in (ROOT / file).read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def few_drawn() -> Iterator[None]:
    """The embedded dataset has as few examples as in the wheel's demo, and LlamaGen's network fewer levels."""
    with pytest.MonkeyPatch.context() as patch:
        for config in Shapes.BUILDER_CONFIGS:
            patch.setattr(config, "train", 200)
            patch.setattr(config, "held_out", 50)
        fewer_levels(patch)
        yield


@pytest.fixture(scope="module")
def demo(few_drawn: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's finished workdir and an export of it, made by the first page's commands."""
    here = tmp_path_factory.mktemp("demo")
    (first,) = [
        words
        for file, words in commands()
        if file == "docs/start.md" and "workdirs/shapes" in words and "demo" in words
    ]
    argv = small(first, Page("docs/start.md"))
    argv[argv.index("--workdir") + 1] = str(here / "shapes")
    with machine(argv):
        assert main(argv) == 0
        assert main(["export", "--workdir", str(here / "shapes"), "--output", str(here / "bundle")]) == 0
    return here


@pytest.fixture
def store(tmp_path: Path) -> Iterator[None]:
    """An object store in which the reader's folder is s3://bucket/set."""
    here = stores.Store()
    try:
        with stores.using(here.variables() | {"AR_UNIFIED_CACHE": str(tmp_path / "cache")}):
            stores.put_folder(Path("mine"), f"s3://{stores.BUCKET}/set")
            yield
    finally:
        here.close()


@pytest.mark.slow
@pytest.mark.parametrize("of", RUN)
def test_the_commands_of_a_page(
    of: Page,
    folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each command, in the order of the page, ends with status 0."""
    monkeypatch.chdir(tmp_path)
    # TFDS must not use the folder of the user who runs the tests.
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tensorflow_datasets"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")]))
    # A copy, because experiments/benchmarks/gallery.py writes into the folder `docs` next to `experiments`.
    shutil.copytree(ROOT / "experiments", "experiments", ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copytree(folder, "mine")
    Path("mine/en.txt").write_text("A square.\n" * 20)
    Path("prompts.jsonl").write_text('{"prompt": "A small blue star in the top right.", "n": 2}\n')
    for has in of.has:
        if has in HAS:
            HAS[has](tmp_path)
        elif has == "store":
            request.getfixturevalue("store")
        else:
            place = {"shapes": "workdirs/shapes", "bundle": "bundle"}[has]
            shutil.copytree(request.getfixturevalue("demo") / has, place)
    if of.rows:
        (rows,) = [block.values[0] for block in test_docs.snippets("jsonl") if str(block.id).startswith(of.file)]
        Path(of.rows).write_text(rows)
        shutil.copy("mine/0.png", "a.png")
    trainings = 0
    for file, words in commands():
        if file == of.file and not why_not(file, words):
            trainings += words[1] in TRAINING
            argv = small(words, of, trainings)
            assert not given(words, argv, monkeypatch), f"{' '.join(words)}: {capfd.readouterr().err[-2000:]}"
            if argv[0] == "sample" and "--output" in argv:
                assert not errors(Path(argv[argv.index("--output") + 1]) / "samples.jsonl"), " ".join(words)


def errors(samples: Path) -> list[str]:
    """What is wrong with requests, which does not change the status."""
    rows = map(json.loads, samples.read_text(encoding="utf-8").splitlines())
    return [row["error"] for row in rows if row.get("error")]


def given(words: list[str], argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a command with these arguments in this process; returns its status."""
    if words[0] == "echo":
        text, into, file = argv
        assert into == ">"
        Path(file).write_text(text + "\n")
        return 0
    with machine(argv), monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # imported before
        try:
            if words[0] == "ar-unified":
                return main(argv)
            if argv[0] == "-c":
                exec(argv[1], {})
                return 0
            if argv[0] == "-m":
                patch.setattr(sys, "argv", argv[1:])
                runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
            else:
                patch.setattr(sys, "argv", argv)
                patch.syspath_prepend(Path(argv[0]).parent.resolve())
                runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:  # of --help, and of scripts
            return end.code
    return 0
