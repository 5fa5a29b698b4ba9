"""The wheel works without the repository: the version, every verb, the experiments, the demo."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import itertools
import json
import pickle
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import ar_unified
from ar_unified.cli.main import VERBS, main
from ar_unified.paths import experiment_file
from tests import wheel_alone
from tests.cli.conftest import SMALL
from tests.interop import formats
from tests.wheel_alone import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WHEEL = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
KINDS = ("captions", "questions", "stories")  # numbers for the demo's sources, in their order
# The demo with as little of everything as every stage needs.
FEW = (
    *(f"data.train[{i}].split=train[:200]" for i, _ in enumerate(KINDS)),
    *(f"data.validation[{i}].split=validation[:50]" for i, _ in enumerate(KINDS)),
    *(f"data.tests.unseen_combinations[{i}].split=unseen_combinations[:20]" for i, _ in enumerate(KINDS)),
    "image_tokenizer.steps=2",
    "training.steps=2",
    "training.warmup_steps=0",
    "training.validate_every=2",
    "evaluation.limit=2",
    "text_tokenizer.vocab_size=300",
    *(f"{key}={value}" for key, value in SMALL.items() if key.startswith("model.")),
    "image_tokenizer.width=8",
    "image_tokenizer.blocks=(0,0,1)",
    "training.batch_size=8",
)
# The demo's dataset with this many examples, because drawing all 115,000 takes a minute of CPU.
FEW_DRAWN = """
from ar_unified.data.shapes import Shapes
for config in Shapes.BUILDER_CONFIGS:
    config.train, config.held_out = 200, 50
"""

# Runs command lines one after the other; each must end with status 0. They share a process, because a start takes two
# seconds of CPU.
CALLS = """
import json, sys
from ar_unified.cli.main import main
for call in json.loads(sys.argv[1]):
    try:
        status = main(call)
    except SystemExit as end:  # of --help
        status = end.code
    if status:
        sys.exit(f"{call}: status {status}")
"""


def test_the_version_is_written_once():
    assert ar_unified.__version__ == PROJECT["project"]["version"]
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("ar_unified", "tokenizers", "experiments", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".toml", ".cff") and f'"{ar_unified.__version__}"' in path.read_text()
    ]
    assert not found


def test_every_experiment_is_in_the_wheel():
    """A new experiment must be added to pyproject.toml, or its name is known only in a clone."""
    shipped = {path: f"ar_unified/{path}" for path in WHEEL["force-include"]}
    assert shipped == WHEEL["force-include"]
    there = {f"experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")}
    assert there | {"experiments/image_tokenizers", "experiments/published"} == shipped.keys()


def test_every_package_that_is_imported_is_asked_for():
    """pyproject.toml itself names each package. It is not enough that another dependency does."""
    groups = PROJECT["project"]["optional-dependencies"]
    told = [*PROJECT["project"]["dependencies"], *itertools.chain(*groups.values())]
    asked = {re.findall(r"^[\w.-]+", each)[0].lower().replace("_", "-") for each in told}
    harnesses = {"lm_eval", "lmms_eval", "vlmeval"}  # they call us, and users of our adapters have them
    known = importlib.metadata.packages_distributions()
    missing = {
        name
        for folder in ("ar_unified", "tokenizers/ar_tokenizers")
        for path in (ROOT / folder).rglob("*.py")
        for name in imported(path)
        if name not in sys.stdlib_module_names | harnesses | {"ar_unified", "ar_tokenizers"}
        if not asked & {each.lower().replace("_", "-") for each in known.get(name, [name])}
    }
    assert not missing


def test_what_the_dockerfile_names_is_there():
    """No image is built here. Each file that the Dockerfile copies is in the context, each backend is an extra, and
    each Python is pinned."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    let_through = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    copied = {word for words in re.findall(r"^COPY (?:--\S+ )*(.*) \S+$", text, re.MULTILINE) for word in words.split()}
    assert copied == let_through and not [name for name in copied if not (ROOT / name).exists()]
    needed = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], *WHEEL["packages"]}
    needed |= set(WHEEL["force-include"])
    assert not [name for name in needed if not {name, name.partition("/")[0]} & copied], "hatchling reads them"

    (backends,) = re.findall(r"^ *([a-z |]+)\) package=\"\.\[\$BACKEND\]\"", text, re.MULTILINE)
    assert set(backends.split(" | ")) == {"cuda", "tpu"} <= PROJECT["project"]["optional-dependencies"].keys()
    (python,) = re.findall(r"^ARG PYTHON=3\.(\d+)$", text, re.MULTILINE)
    assert (ROOT / f"requirements/py3{python}.txt").is_file() and re.search(r"^USER [1-9]", text, re.MULTILINE)
    assert f'ENTRYPOINT ["{next(iter(PROJECT["project"]["scripts"]))}"]' in text


def imported(path: Path) -> set[str]:
    """The first parts of the names that a module imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_an_experiment_goes_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shapes = str(ROOT / "experiments" / "shapes.py")
    assert experiment_file("shapes") == experiment_file("experiments/shapes.py") == shapes
    assert experiment_file("folder:path=a:b").endswith("experiments/folder.py:path=a:b")
    assert experiment_file("image_tokenizers/ibq:path=x").endswith("image_tokenizers/ibq.py:path=x")
    (tmp_path / "photos").mkdir()
    assert experiment_file("photos:path=photos").endswith("experiments/photos.py:path=photos")
    (tmp_path / "shapes").write_text("")
    assert experiment_file("shapes") == "shapes", "a file of one's own comes first"
    assert experiment_file("mine/other.py:x") == "mine/other.py:x", "the loader says that it is not there"
    with pytest.raises(SystemExit):
        main(["plan", "--config", "shpaes", "--target", "v5p:2x2x1"])
    assert "expected a file, or one of apart, dpo, easy_vqa, edit, emoji, folder," in capsys.readouterr().err


@pytest.mark.slow
def test_the_wheel_alone_has_every_verb_and_runs_the_demo(tmp_path):
    """Everything runs in an environment with only the wheel and its dependencies, in an empty folder."""
    alone = wheel_alone.environment(tmp_path)
    assert not [name for name in alone.names if "benchmarks" in name or "__pycache__" in name]
    (tmp_path / "empty").mkdir()
    run = functools.partial(alone.run, cwd=tmp_path / "empty")
    assert run(CALLS, json.dumps([["--version"]])) == f"ar-unified {ar_unified.__version__}\n"
    helped = run(CALLS, json.dumps([[verb, "--help"] for verb in VERBS]))
    assert re.findall(r"^usage: ar-unified (\S+)", helped, re.MULTILINE) == list(VERBS)
    keys = [f"--config.{key}" for key in FEW]
    on_few = functools.partial(run, f"{FEW_DRAWN}\n{CALLS}")
    said = on_few(json.dumps([["demo", *keys]]))
    assert said.endswith("Open workdirs/shapes/report.html\n")
    workdir = tmp_path / "empty" / "workdirs" / "shapes"
    assert (workdir / "report.html").stat().st_size > 10_000 and (workdir / "evaluation.json").exists()
    calls = every_verb(tmp_path / "empty", keys)
    assert {"demo", *(verb for verb, *_ in calls)} == VERBS.keys()
    on_few(json.dumps(calls))
    for made in ("drawn/index.html", "again/index.html", "scores.jsonl", "np/np.safetensors", "chameleon/bundle.json"):
        assert (tmp_path / "empty" / made).exists(), made


def every_verb(here: Path, keys: list[str]) -> list[list[str]]:
    """Calls of every verb after the demo, with small files that are made in the current folder."""
    (here / "prompts.jsonl").write_text('{"prompt": "A small blue star in the top right.", "n": 2}\n')
    (here / "texts.jsonl").write_text('{"prompt": "What is it?", "answer": "A blue star."}\n')
    (here / "np.ckpt").write_bytes(pickle.dumps({"a": np.ones((2, 3), np.float32)}))
    formats.meta(here / "download")
    of_run = ["--config", "shapes", "--workdir", "workdirs/shapes", *keys]
    beside = ["--text", "download/tokenizer", "--image", "download/tokenizer/vqgan.safetensors"]
    return [
        *([verb, *of_run] for verb in ("run", "tokenizer", "prepare", "train", "evaluate")),  # all done already
        ["sample", *of_run, "--requests", "prompts.jsonl", "--output", "drawn"],
        ["export", "--workdir", "workdirs/shapes", "--output", "bundle"],
        ["sample", "--from", "bundle", "--requests", "prompts.jsonl", "--output", "again"],
        ["score", "--from", "bundle", "--data", "texts.jsonl", "--output", "scores.jsonl"],
        ["validate", "texts.jsonl"],
        ["convert-pickle", "--from", "np.ckpt", "--output", "np"],
        ["import", "--from", "download/models/30b", "--as", "chameleon", "--output", "chameleon", *beside],
        ["plan", "--config", "shapes", "--target", "h200:1", "--no-advice"],  # a CPU device stands in for the H200
    ]
