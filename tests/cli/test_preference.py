"""Preference tuning from the command line: a tiny bundle, the cache of the reference, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from safetensors.numpy import load_file

from ar_unified.checkpoint import restore_params
from ar_unified.cli.main import main
from ar_unified.interop import peft
from ar_unified.metrics import REWARDS, read_metrics
from tests import bundles
from tests.cli.conftest import refused
from tests.training.test_loop import same_bits

CONFIG = """
from ml_collections import ConfigDict
from ar_unified.experiment.config import begin_with, defaults

def get_config(folder):
    config = defaults()
    begin_with(config, f"{folder}/bundle")
    source = lambda split: (ConfigDict(dict(kind="jsonl", path=f"{folder}/pairs.jsonl", split=split)),)
    config.data.train, config.data.validation = source("train"), source("validation")
    config.training.objective = "preference"
    config.preference.beta = 1.0
    config.training.steps, config.training.warmup_steps, config.training.batch_size = 6, 1, 8
    config.training.learning_rate = 1e-2
    config.training.sequence_length = 96
    config.training.log_every = config.training.validate_every = 3
    config.training.checkpoint_every = 3
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, a bundle, and pairs of texts, one of them bad."""
    root = tmp_path_factory.mktemp("preference")
    bundles.write(root / "bundle")
    (root / "config.py").write_text(CONFIG)
    rows: list[dict[str, Any]] = [
        {"prompt": f"star {i}", "chosen": f"red {'top ' * (i % 3)}", "rejected": "blue", "split": split}
        for i, split in enumerate(["train"] * 24 + ["validation"] * 4)
    ]
    rows.insert(3, {"prompt": "star", "chosen": "red", "rejected": "red", "split": "train"})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(folder: Path, workdir: Path, **changes: object) -> list[str]:
    more = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return ["--config", f"{folder / 'config.py'}:{folder}", "--workdir", str(workdir), *more]


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("trained") / "w"
    for verb in ("tokenizer", "prepare", "train"):
        assert main([verb, *arguments(folder, workdir)]) == 0
    return workdir


def weights(workdir: Path) -> Any:
    return jax.device_get(restore_params(str(workdir / "model" / "checkpoints")))


def test_margins_widen_from_nothing(trained: Path) -> None:
    rows = read_metrics(trained / "model" / "metrics.jsonl")
    found = [row[f"{REWARDS}margins"] for row in rows if f"{REWARDS}margins" in row]
    held_out = [row[f"validation/{REWARDS}margins"] for row in rows if f"validation/{REWARDS}margins" in row]
    assert found[-1] > found[0] and held_out[-1] > 0.1
    left_out = json.loads((trained / "data" / "train" / "skipped.jsonl").read_text())
    assert left_out["kind"] == "same_answers" and left_out["origin"].endswith("pairs.jsonl:4")


def test_a_cache_that_is_there_changes_nothing_and_a_broken_one_is_made_again(
    folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "model")
    assert main(["train", *arguments(folder, workdir)]) == 0
    said = capsys.readouterr().out
    assert "reference: log-probabilities of train are read from" in said and "pairs of train" not in said
    same_bits(weights(workdir), weights(trained))
    files = sorted((workdir / "reference").glob("*/pairs.npy"))
    kept = [file.read_bytes() for file in files]
    assert len(files) == 2
    files[0].write_bytes(kept[0][:-4] + b"\0\0\0\1")
    (files[1].parent / "record.json").write_text("{")
    shutil.rmtree(workdir / "model")
    assert main(["train", *arguments(folder, workdir)]) == 0
    said = capsys.readouterr().out
    assert "on 24 pairs of train" in said and "on 4 pairs of validation" in said
    assert [file.read_bytes() for file in files] == kept
    same_bits(weights(workdir), weights(trained))


def test_without_a_reference_none_is_computed(folder: Path, trained: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    for name in ("model", "reference"):
        shutil.rmtree(workdir / name)
    assert main(["train", *arguments(folder, workdir, preference__loss="simpo", training__steps=2)]) == 0
    assert not (workdir / "reference").exists()


def test_an_adapter_is_compared_with_what_it_stands_beside(folder: Path, trained: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    for name in ("model", "reference"):
        shutil.rmtree(workdir / name)
    assert main(["train", *arguments(folder, workdir, lora__rank=2)]) == 0
    for file in trained.glob("reference/*/*"):
        assert (workdir / file.relative_to(trained)).read_bytes() == file.read_bytes()
    assert weights(workdir).keys() == {"lora"}
    rows = read_metrics(workdir / "model" / "metrics.jsonl")
    found = [row[f"{REWARDS}margins"] for row in rows if f"{REWARDS}margins" in row]
    assert found[-1] > found[0]


@pytest.mark.slow
def test_a_training_that_begins_with_an_adapter_and_its_rows_is_compared_with_both(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    workdir, adapter = tmp_path / "w", tmp_path / "adapter"
    shutil.copytree(trained, workdir)
    changes = dict(lora__rank=2, training__only="('embedding[text]',)")
    shutil.rmtree(workdir / "model")
    assert main(["train", *arguments(folder, workdir, **changes)]) == 0
    assert main(["export", "--workdir", str(workdir), "--to", "peft", "--output", str(adapter)]) == 0
    assert any(name.endswith("trainable_tokens_delta") for name in load_file(adapter / peft.WEIGHTS))
    shutil.rmtree(workdir / "model")
    still = dict(lora__init=adapter, training__learning_rate=1e-9, training__log_every=1)
    assert main(["train", *arguments(folder, workdir, **changes | still)]) == 0
    rows = read_metrics(workdir / "model" / "metrics.jsonl")
    assert max(abs(row[f"{REWARDS}margins"]) for row in rows if f"{REWARDS}margins" in row) < 1e-4
    assert len(list(workdir.glob("reference/*"))) == 4, "the base's reference, and that with the adapter"


def test_another_beta_is_another_training(folder: Path, trained: Path) -> None:
    refused(["train", *arguments(folder, trained, preference__beta=0.5)], r"preference\.beta = 1\.0.*has 0\.5")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(init=""), r"config\.init: expected the bundle to tune, because training\.objective is 'preference'"),
        (dict(training__sequence_length=90), "sequence_length: expected at least 96, for both answers of a pair"),
        (dict(preference__loss="kto"), r"config\.preference\.loss: expected one of dpo, ipo, simpo; found 'kto'"),
        (dict(preference__beta=0.0), r"config\.preference\.beta: expected more than 0"),
        (dict(training__objective="preferences"), "objective: expected one of .*did you mean 'preference'"),
        (dict(training__objective="likelihood"), "expected documents, found preference pairs"),
        (dict(training__fresh="('head',)"), r"fresh: expected none with a reference"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, trained: Path, changes: dict[str, object], said: str) -> None:
    refused(["train", *arguments(folder, trained, **changes)], said)
