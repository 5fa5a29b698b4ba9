"""The commands on the pages of docs/, and how tests/cli/test_pages.py runs them: on little data, with small models.

`SMALL` has the keys that make an experiment small. `RUN` lists the pages and the replacements in their commands.
`NOT_RUN` lists the commands that are not run, and the reasons.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests import test_docs
from tests.cli.conftest import SMALL as FOLDER
from tests.test_wheel import FEW

# Kinds of experiments, and a pattern of the arguments of each. The first kind that fits is taken.
KINDS = {
    "text": "[:,]init=LLM", "unseen": ",unseen=", "init": "[:,](init|from)=", "brought": r"image_tokenizer\.model=",
}  # fmt: skip
TWO_STEPS = {"training.steps": 2, "training.warmup_steps": 0, "image_tokenizer.steps": 2}
OF_BUNDLE = {
    "training.steps": 2, "training.warmup_steps": 0, "training.validate_every": 2, "training.checkpoint_every": 2,
    "training.batch_size": 8, "evaluation.limit": 2, "sampling.batch_size": 8,
}  # fmt: skip


def part(sources: int, *tests: str) -> dict[str, str]:
    """Keys that leave only the first examples of the embedded data: in this many sources for training, in as many for
    validation, and in these test sets, which have one source each."""
    return {
        **{f"data.train[{i}].split": "train[:40]" for i in range(sources)},
        **{f"data.validation[{i}].split": "validation[:10]" for i in range(sources)},
        **{f"data.tests.{name}[0].split": f"{name}[:10]" for name in tests},
    }


# Keys for a model of the embedded data that has its own tokenizers.
ALONE = OF_BUNDLE | dict(key.split("=", 1) for key in FEW if not key.startswith(("data.", "training.", "evaluation.")))
PHOTOS = {
    "data.image_size": "(32,32)", "image_tokenizer.crop": 32, "image_tokenizer.short_side": 32,
    "image_tokenizer.steps": 2, "image_tokenizer.batch_size": 8, "evaluation.tokenizer_probe_steps": 0,
}  # fmt: skip
PRETRAIN = dict(key.split("=", 1) for key in FEW if key.startswith("model.")) | {
    "data.image_size": "(32,32)", "data.max_tokens": 64, "training.sequence_length": 64, "training.batch_size": 8,
}  # fmt: skip
# Keys for images that are smaller than those of a published model.
PUBLISHED = {"data.image_size": "(16,16)", "data.max_tokens": 160, "sampling.max_length": 192}
# Keys for a text model that learns small images.
EXTENDED = {
    "data.image_size": "(32,32)",
    "data.max_tokens": 160,
    "training.sequence_length": 192,
    "sampling.max_length": 192,
}
# An experiment -> the keys that make it small. "NAME:KIND" is the experiment with arguments of a kind in KINDS.
SMALL: dict[str, Mapping[str, Any]] = {
    "shapes": dict(key.split("=", 1) for key in FEW),
    "folder": FOLDER | TWO_STEPS,
    "folder:init": OF_BUNDLE,
    "folder:text": OF_BUNDLE | EXTENDED,
    "folder:brought": {key: value for key, value in FOLDER.items() if not key.startswith("image_tokenizer.")}
    | {"training.steps": 2, "training.warmup_steps": 0},
    "text_tokenizer": {"text_tokenizer.vocab_size": 320},
    "fine_tune:init": OF_BUNDLE
    | {"training.accumulation": 1, "training.preview_every": 0, "training.sequence_length": 192},
    "lora:init": OF_BUNDLE | part(1),
    "grpo:init": OF_BUNDLE | part(1) | {"reward.group_size": 2, "reward.on_error": "skip"},
    "grpo:unseen": OF_BUNDLE
    | {key.replace("train[0]", "train[1]"): value for key, value in part(1, "unseen_combinations").items()}
    | {"reward.group_size": 2, "reward.on_error": "skip"},
    "apart": ALONE | part(1, "unseen_combinations"),
    "mixture": FOLDER | TWO_STEPS,
    "pretrain": PRETRAIN,
    "instruct:init": OF_BUNDLE | part(3, "unseen_combinations"),
    "edit": ALONE | part(2, "unseen_combinations"),
    "edit:init": OF_BUNDLE | part(3, "unseen_combinations"),
    "dpo:init": OF_BUNDLE | {"data.train[0].split": "train[:1%]", "data.validation[0].split": "validation[:5%]"},
    "words": {"training.steps": 4, "training.checkpoint_every": 2},
    "photos": PHOTOS | {"image_tokenizer.width": 8, "image_tokenizer.blocks": "(0,1)"},
    "llamagen": PHOTOS
    | {"image_tokenizer.width": 32, "image_tokenizer.multipliers": "(1,1)", "image_tokenizer.z_channels": 32}
    | {"image_tokenizer.factor": 2, "image_tokenizer.blocks": "(1,1)", "image_tokenizer.codes": 64}
    | {"image_tokenizer.dtype": "float32", "image_tokenizer.adversary.dtype": "float32"}
    | {"image_tokenizer.adversary.width": 8, "image_tokenizer.adversary.layers": 1},
}


@dataclass(frozen=True)
class Page:
    """A page with commands to run.

    Attributes:
        names: replacements for words that the reader must choose, and for numbers that would take hours.
        has: what the reader already has: names in tests.cli.readers.HAS, or parts of the demo.
        keys: keys for all commands with a config of this page.
        longer: each training has this many steps more than the one before.
        more: further arguments of commands, by how their arguments begin.
        rows: the file that the page's rows make, if the reader is to write them.
    """

    file: str
    names: Mapping[str, str] = field(default_factory=dict)
    has: tuple[str, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
    longer: int = 0
    more: Mapping[str, str] = field(default_factory=dict)
    rows: str = ""


def page(file: str, *has: str, **told: Any) -> Any:
    """A Page as a parameter of a test.

    Args:
        file: a page of docs/, or in capitals one beside it.
        has: `Page.has`.
        told: in capitals, replacements (`Page.names`); all others: fields of Page.
    """
    names = {name: value for name, value in told.items() if name.isupper()}
    fields = {name: value for name, value in told.items() if name not in names}
    fields["names"] = MappingProxyType(names | fields.get("names", {}))
    return pytest.param(Page(f"{'' if file.isupper() else 'docs/'}{file}.md", has=has, **fields), id=file)


SHAPES_RUN = dict(FILE="shapes", DIR="workdirs/shapes")
TEXT_RUN = dict(FILE="words.py:words", DIR="workdirs/words")
# No TPU's compiler: eight CPU devices, for which a plan compiles the same program.
PLANNED = {
    "experiments/pretrain.py:model=chameleon_7b,chips=64": "experiments/pretrain.py:model=chameleon_7b,chips=8",
    "--config.training.batch_size=256": "--config.training.batch_size=8",
    "--config.training.sequence_length=2048": "--config.training.sequence_length=64",
    **dict.fromkeys(("v5p:4x4x4", "v5p:2x2x1"), "h200:8"),
}
RUN = [
    page("BUILD", "shapes"),
    page("start", "shapes", DIR="mine"),
    page("your_data", DIR="mine", FILE="experiments/folder.py:path=mine"),
    page("data", "sets", PATH="mine", DIR="sets"),
    page("data_checks", "shapes", DIR="mine", names={"workdirs/mine/data": "workdirs/shapes/data"}),
    page("sampling", "shapes", "bundle", "adapter", BUNDLE="bundle", rows="prompts.jsonl"),
    page("evaluation", "shapes", "bundle", PHOTOGRAPHS="mine", BUNDLE="bundle", PATH="mine", **SHAPES_RUN),
    page("tuning", "emu3", DIR="mine", keys=PUBLISHED, names=PLANNED),
    page("planning", names=PLANNED),
    page("pretraining", names=PLANNED),
    page("object_stores", "store"),
    page("text_tokenizers", DIR="mine"),
    page(
        "lora",
        "bundle",
        "llm",
        "tokenizer",
        BUNDLE="bundle",
        LLM="llm",
        FOLDER="tokenizer",
        DIR="mine",
        names={"--config.training.warmup_steps=5": "--config.training.warmup_steps=0"},  # for fewer steps
    ),
    page("rewards", "shapes", "bundle", BUNDLE="bundle", **SHAPES_RUN, names=PLANNED),
    page(
        "published_weights",
        "chameleon",
        "llamagen",
        DIR="mine",
        FILE="experiments/folder.py:path=mine",
        names={"vqgan": "vqgan-of-meta"},
        # Its rows of 4,096 tokens would take minutes.
        more={
            "evaluate --from": "--config.evaluation.limit=2 --config.sampling.max_length=192 "
            "--config.training.batch_size=8 --config.training.sequence_length=192"
        },
        keys=PUBLISHED,
    ),
    page(
        "workdirs",
        "words",
        **TEXT_RUN,
        VERB="train",
        names={
            "--config.training.steps=10000": "--config.training.steps=4",
            "--config.training.keep_every=2000": "--config.training.keep_every=2",
            "workdirs/long:6000": "workdirs/long:2",
            "--config.training.steps=7500": "--config.training.steps=3",
        },
    ),
    page("preference_tuning", "bundle", "pairs", BUNDLE="bundle"),
    page("troubleshooting", "words", "chameleon", **TEXT_RUN, PATH="mine", FOLDER="Chameleon", longer=2, names=PLANNED),
    page("instruction_tuning", "bundle", BUNDLE="bundle"),
    page("image_editing", "bundle", BUNDLE="bundle"),
    page("image_tokenizers", "llamagen", DIR="mine", DIR2="mine", FILE="vq_ds16_t2i.safetensors", FOLDER="llamagen"),
    page("from_llm", "qwen", "tokenizer", DIR="mine", BUNDLE="bundle", FOLDER="tokenizer", keys=EXTENDED),
    page("results", "shapes", "results"),
    page(
        "benchmarks",
        "sets",
        "bundle",
        "book",
        DIR="sets",
        names={
            "FILE": "book.txt",
            "FILE.json": "numbers.json",
            "NAME=BUNDLE:CAPTIONS": "shapes=bundle:sets/noto-emoji/captions.jsonl",
        },
        more={
            "experiments/benchmarks/text_tokenizer.py": "--pieces 600 --megabytes 0.1",
            "experiments/benchmarks/quantizers.py": "--only fsq --steps 2 --probe 2",
            "experiments/benchmarks/packing.py": "--documents 200",
            "experiments/benchmarks/feeding.py": "--images 192 --side 64 --documents 2000 --warm 1 1 --most 2 2 "
            "--repeats 1 --sides ours",
            "experiments/benchmarks/parallel_decoding.py": "--images 2 --batches 1 --windows 2 --repeats 1",
        },
    ),
]


@dataclass(frozen=True)
class NotRun:
    """Why a command of a page is not run here.

    Attributes:
        why: the reason.
        test: a file that tests the command, or its purpose, in another way; and a word that is in this file.
    """

    why: str
    test: tuple[str, str] = ("", "")


BESIDE_TORCH = NotRun(
    "torch is not in the environment of these tests: run beside it in .venv-interop, on small models",
    ("tests/interop/test_benchmarks.py", "vs_transformers.main"),
)
BUCKET = "it needs a bucket and a cluster"
DEMO = NotRun("the verb of docs/start.md, in its default workdir", ("tests/test_wheel.py", '["demo"'))
CI = "CI runs it"
# (page, beginning of the command) -> why it is not run here.
NOT_RUN: dict[tuple[str, str], NotRun] = {
    ("", "make setup"): NotRun("it made the environment of this test", (".ci/run", "make setup")),
    ("", "make test-all"): NotRun("some hours: it runs this test"),
    ("", "make test"): NotRun("it runs this test, or is a part of CI as this is", (".ci/run", " test-slow ")),
    ("", "make lint"): NotRun(CI, (".ci/run", " lint ")),
    ("", "make docs"): NotRun(CI, (".ci/run", " docs")),
    ("", "make wheel"): NotRun(CI, (".ci/run", " wheel")),
    ("", "make libtpu"): NotRun(CI, (".ci/run", " libtpu ")),
    ("", "make demo"): NotRun("25 minutes; the verb of docs/start.md, which is run", ("Makefile", "ar-unified demo")),
    ("", "make plan"): NotRun("an hour: it compiles published shapes", ("tests/planning/test_plan.py", "v5e:")),
    ("", "make mutate"): NotRun("up to an hour: it runs the quick tests", ("tests/test_mutations.py", "mutate")),
    ("", "make check-hopper"): NotRun("it installs NVIDIA's compiler, 1.4 GB"),
    ("", "make check-gpu"): NotRun("eight minutes on a GPU", ("tests/test_check_gpu.py", "experiments.benchmarks.gpu")),
    ("", "source "): NotRun("it changes a shell; .ci/run names the environment's programs", (".ci/run", ".venv/bin")),
    ("", "pip install"): NotRun("an installation", ("tests/test_wheel.py", "wheel_alone.environment")),
    ("", "docker "): NotRun("there is no Docker here", ("tests/cli/test_launch.py", "the_image_installs_the_backend")),
    ("CONTRIBUTING.md", "python tests/summary.py"): NotRun(CI, (".ci/run", "tests/summary.py --last")),
    ("CONTRIBUTING.md", "ar-unified --version"): NotRun("docs/troubleshooting.md has it, too, and is run"),
    ("README.md", "ar-unified demo"): DEMO,
    ("BUILD.md", "ar-unified demo"): DEMO,
    ("docs/benchmarks.md", "python experiments/benchmarks/cpu_vs_transformers.py"): BESIDE_TORCH,
    ("docs/benchmarks.md", "python experiments/benchmarks/sampling_vs_transformers.py"): BESIDE_TORCH,
    ("docs/benchmarks.md", "python experiments/benchmarks/image_tokenizer.py"): NotRun(
        BESIDE_TORCH.why, ("tests/interop/test_benchmarks.py", "image_tokenizer.theirs")
    ),
    ("docs/benchmarks.md", "python experiments/benchmarks/loader_scale.py"): NotRun(
        "another test runs it, with a million documents", ("tests/data/test_loader_scale.py", '"--documents"')
    ),
    ("docs/benchmarks.md", "python experiments/benchmarks/attention_cycles.py"): NotRun(
        "two minutes: it compiles kernels for TPUs", ("tests/kernels/test_tpu_backward.py", "attention_cycles")
    ),
    ("docs/benchmarks.md", "python experiments/benchmarks/decode_programs.py"): NotRun(
        "twenty minutes: it compiles Chameleon's layers for TPUs", ("tests/planning/test_decoding_on_tpu.py", "decode")
    ),
    ("docs/benchmarks.md", "python experiments/benchmarks/import_memory.py"): NotRun(
        "68 GB: a file of its form is made small", ("tests/interop/test_import_memory.py", "generate")
    ),
    ("docs/lora.md", "python -m experiments.benchmarks.lora_step"): NotRun(
        "half a minute of compiling, even for the smallest model"
    ),
    ("docs/data_at_scale.md", "ar-unified prepare --config FILE --workdir gs://bucket/run --beam=--runner=Dir"): NotRun(
        "it needs Apache Beam: run beside it in .venv-interop, on two processes",
        ("tests/cli/test_prepare_by_beam.py", "direct_num_workers=2"),
    ),
    ("docs/data_at_scale.md", "ar-unified prepare --config FILE --workdir gs://bucket/run --beam=--runner=Fl"): NotRun(
        BUCKET
    ),
    ("docs/data_at_scale.md", "ar-unified prepare --config FILE --workdir gs://bucket/run --beam=--runner=Dat"): NotRun(
        BUCKET
    ),
    ("docs/pretraining.md", "ar-unified run"): NotRun(
        "both of its processes are started together", ("tests/cli/test_launch.py", "docs/pretraining.md")
    ),
}


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every command of every page, in order."""
    yield from ((file, words) for file, _, words in test_docs.commands())


def why_not(file: str, words: list[str]) -> NotRun | None:
    """Why a command is not run; None if it is run."""
    if words[0] == "make":
        words = [word for word in words if "=" not in word]
    line = " ".join(words)
    return next((why for (of, begins), why in NOT_RUN.items() if of in ("", file) and line.startswith(begins)), None)


def small(words: list[str], of: Page, trained: int = 0) -> list[str]:
    """The arguments of a command after all replacements. trained: how many trainings of the page were before it."""
    told = [
        re.sub(r"(?<=[=,:])([A-Z]+2?)(?=,|$)", lambda m: of.names.get(m[1], m[1]), of.names.get(word, word))
        for word in words[1:]
    ]
    config = next((b for a, b in zip(told, told[1:], strict=False) if a == "--config"), "")
    if told[0] == "demo":
        config = "shapes"
    keys: dict[str, Any] = {}
    if config and "--from" not in told:  # evaluation of a bundle uses the bundle's sizes
        kinds = [kind for kind, given in KINDS.items() if any(re.search(given, word) for word in words)]
        keys |= {**SMALL[":".join([Path(config.partition(":")[0]).stem, *kinds[:1]])], **of.keys}
        if of.longer:
            keys["training.steps"] = of.longer * (1 + trained)
    # The keys that a page sets itself stay as they are, except for its numbers of steps.
    own = {
        after.removeprefix("--config.").partition("=")[0]
        for before, after in zip(words[1:], told, strict=True)
        if after.startswith("--config.") and not (before == after and ".steps=" in after)
    }
    told += next((more.split() for begins, more in of.more.items() if " ".join(told).startswith(begins)), [])
    return [*told, *(f"--config.{key}={value}" for key, value in keys.items() if key not in own)]
