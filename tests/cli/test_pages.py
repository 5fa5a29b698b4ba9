"""The commands on the pages of docs/ run: those of one page in order, in a new folder, on little data.

Additional keys make the training of a command small (`SMALL_BY_EXPERIMENT`), and small files replace those of a reader
(`Page.names`). `NOT_RUN` names each command that no test here runs, with the reason.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from ar_unified import bundle
from ar_unified.cli.main import main
from ar_unified.data.shapes import Shapes
from tests import test_docs
from tests.cli.conftest import ROOT, SMALL
from tests.published_bundles import parts
from tests.test_wheel import FEW

SHAPES = dict(key.split("=", 1) for key in FEW)
OF_BUNDLE = {
    "training.steps": 2, "training.warmup_steps": 0, "training.validate_every": 2, "training.checkpoint_every": 2,
    "training.batch_size": 8, "evaluation.limit": 2, "sampling.batch_size": 8,
}  # fmt: skip
PART = {"data.train[0].split": "train[:40]", "data.validation[0].split": "validation[:10]"}
SMALL_BY_EXPERIMENT: dict[str, dict[str, Any]] = {
    "shapes": SHAPES,
    "folder": SMALL | {"training.steps": 2, "training.warmup_steps": 0, "image_tokenizer.steps": 2},
    "text_tokenizer": {"text_tokenizer.vocab_size": 320},
    "fine_tune": OF_BUNDLE | {"training.accumulation": 1, "training.preview_every": 0, "training.sequence_length": 192},
    "lora": OF_BUNDLE | PART,
    "grpo": OF_BUNDLE | PART | {"reward.group_size": 2, "reward.on_error": "skip"},
}


@dataclass(frozen=True)
class Page:
    """A page with commands to run.

    Attributes:
        names: replacements for names that the reader must choose.
        has: what the reader already has: "shapes", the finished demo; "bundle", an export of it; "emu3", an import.
    """

    file: str
    names: MappingProxyType[str, str] = field(default_factory=lambda: MappingProxyType({}))
    has: tuple[str, ...] = ()


def page(file: str, *has: str, **names: str) -> Any:
    return pytest.param(Page(f"docs/{file}.md", MappingProxyType(names), has), id=file)


RUN = [
    page("start", "shapes", DIR="mine"),
    page("your_data", DIR="mine"),
    page("data", PATH="mine"),
    page("data_checks", DIR="mine"),
    page("sampling", "shapes", "bundle", BUNDLE="bundle"),
    page(
        "evaluation",
        "shapes",
        "bundle",
        FILE="shapes",
        DIR="workdirs/shapes",
        PHOTOGRAPHS="mine",
        BUNDLE="bundle",
        PATH="mine",
    ),
    page("tuning", "emu3", DIR="mine"),
    page("text_tokenizers", DIR="mine"),
    page("lora", "bundle", BUNDLE="bundle"),
    page("rewards", "shapes", "bundle", BUNDLE="bundle", FILE="shapes", DIR="workdirs/shapes"),
    page("workdirs", "shapes", FILE="shapes", DIR="workdirs/shapes"),
]
# (page, beginning of the command) -> why it is not run here, and which test runs it instead.
HOURS = "a tokenizer of published size: tests/training/test_tokenizer_task.py trains small ones"
PODS = "it compiles for TPUs that are not here: tests/cli/test_plan.py runs it, where libtpu is"
FILES = (
    "it needs a published file, and nothing is downloaded: tests/cli/test_published.py imports files of the same form"
)
SHELL = "it sets up an environment, or is what runs this test: .ci/run calls it"
UNSEEN = (
    "half an hour: tests/test_experiment_data.py makes the prompts, tests/experiment/test_rollouts.py reads the config"
)
EXTENDED = "it needs a language model of text alone: tests/cli/test_extended_lora.py extends a small one"
MEASURES = "a benchmark: minutes to hours, and a folder of photographs or of shards"
NOT_RUN = {
    ("", "make "): SHELL,
    ("docs/benchmarks.md", "python experiments/benchmarks/"): MEASURES,
    ("docs/results.md", "python experiments/benchmarks/gallery.py"): "tests/test_gallery.py calls it",
    ("docs/data.md", "ar-unified run --config experiments/mixture.py"): "tests/test_experiment_data.py mixes sets",
    ("docs/data_checks.md", 'ar-unified validate {"kind": "tfds"'): "it builds the whole dataset below the home folder",
    (
        "docs/data_checks.md",
        "ar-unified validate workdirs/mine/data",
    ): "tests/data/test_page.py looks at a prepared folder",
    (
        "docs/data_at_scale.md",
        "ar-unified prepare --config FILE --workdir gs://bucket/run --beam=",
    ): "it needs a bucket and a runner: tests/cli/test_prepare_by_beam.py",
    ("docs/rewards.md", "python experiments/data/make_unseen_prompts.py"): UNSEEN,
    ("docs/rewards.md", "ar-unified run --config experiments/apart.py"): UNSEEN,
    ("docs/rewards.md", "ar-unified export --workdir workdirs/apart"): UNSEEN,
    ("docs/rewards.md", "ar-unified run --config experiments/grpo.py:from=BUNDLE,unseen"): UNSEEN,
    (
        "docs/instruction_tuning.md",
        "ar-unified",
    ): "tests/evaluation/test_conversations.py and tests/data/test_conversations.py have its parts",
    ("docs/lora.md", "ar-unified run --config experiments/folder.py"): EXTENDED,
    ("docs/lora.md", "ar-unified export --workdir workdirs/eyes"): EXTENDED,
    ("docs/image_tokenizers.md", "ar-unified"): HOURS,
    ("docs/planning.md", "ar-unified plan"): PODS,
    ("docs/pretraining.md", "ar-unified plan"): PODS,
    ("docs/pretraining.md", "ar-unified run"): "two processes: tests/cli/test_launch.py starts them",
    (
        "docs/preference_tuning.md",
        "ar-unified",
    ): "tests/cli/test_preference.py trains on pairs, tests/cli/test_score.py scores",
    (
        "docs/image_editing.md",
        "ar-unified",
    ): "tests/test_experiment_data.py and tests/data/test_edits.py have its parts",
    ("docs/from_llm.md", "ar-unified"): "tests/cli/test_from_llm.py does both on a small language model",
    ("docs/published_weights.md", "ar-unified"): FILES,
    ("docs/tuning.md", "ar-unified import"): FILES,
    (
        "docs/troubleshooting.md",
        "ar-unified",
    ): "keys for runs that ran out of memory: tests/experiment/test_changes.py changes them",
    ("docs/workdirs.md", "ar-unified train --branch"): "tests/cli/test_changed_run.py branches",
    (
        "docs/workdirs.md",
        "ar-unified train --config FILE --workdir workdirs/long",
    ): "tests/cli/test_changed_run.py has its kind",
    ("docs/workdirs.md", "ar-unified VERB"): "a pattern of commands; tests/test_wheel.py asks every verb for --help",
}


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every command of every page, in order."""
    for block in [*test_docs.snippets(""), *test_docs.snippets("sh")]:
        for words in test_docs.lines(block.values[0]):
            if words and words[0] in ("ar-unified", "python", "make"):
                yield str(block.id).partition(":")[0], words


def why_not(file: str, words: list[str]) -> str:
    """Returns the reason why a command is not run, or ""."""
    line = " ".join(words)
    return next((why for (of, begins), why in NOT_RUN.items() if of in ("", file) and line.startswith(begins)), "")


def small(words: list[str], names: MappingProxyType[str, str]) -> list[str]:
    """The arguments of a command after all replacements."""
    told = [re.sub(r"(?<=[=,:])([A-Z]+2?)(?=,|$)", lambda m: names.get(m[1], m[1]), names.get(w, w)) for w in words[1:]]
    config = (
        "shapes"
        if told[0] == "demo"
        else next((b for a, b in zip(told, told[1:], strict=False) if a == "--config"), "")
    )
    experiment = Path(config.partition(":")[0]).stem
    # Evaluation of a bundle uses the bundle's sizes.
    keys = SMALL_BY_EXPERIMENT[experiment] if config and "--from" not in told else {}
    return [*told, *(f"--config.{key}={value}" for key, value in keys.items())]


def test_every_command_is_run_or_has_a_reason():
    run = {param.values[0].file for param in RUN}
    missing = [
        f"{file}: {' '.join(words)}" for file, words in commands() if file not in run and not why_not(file, words)
    ]
    assert not missing
    stale = [key for key in NOT_RUN if not any(why_not(*each) == NOT_RUN[key] for each in commands())]
    assert not stale
    runs = [each for each in commands() if not why_not(*each)]
    assert len(runs) > 30


@pytest.fixture(scope="module", autouse=True)
def few_drawn() -> Iterator[None]:
    """The embedded dataset has as few examples as in the wheel's demo."""
    with pytest.MonkeyPatch.context() as patch:
        for config in Shapes.BUILDER_CONFIGS:
            patch.setattr(config, "train", 200)
            patch.setattr(config, "held_out", 50)
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
    argv = small(first, MappingProxyType({}))
    argv[argv.index("--workdir") + 1] = str(here / "shapes")
    assert main(argv) == 0
    assert main(["export", "--workdir", str(here / "shapes"), "--output", str(here / "bundle")]) == 0
    return here


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
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    shutil.copytree(folder, "mine")
    Path("mine/en.txt").write_text("A square.\n" * 20)
    Path("prompts.jsonl").write_text('{"prompt": "A small blue star in the top right.", "n": 2}\n')
    for has in of.has:
        if has == "emu3":
            bundle.write(Path("emu3"), **parts("emu3") | {"published": {"system": "emu3"}})
        else:
            place = {"shapes": "workdirs/shapes", "bundle": "bundle"}[has]
            shutil.copytree(request.getfixturevalue("demo") / has, place)
    for file, words in commands():
        if file == of.file and not why_not(file, words):
            assert main(small(words, of.names)) == 0, f"{' '.join(words)}: {capfd.readouterr().err[-2000:]}"
