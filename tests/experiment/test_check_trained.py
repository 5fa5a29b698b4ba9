"""A config that differs from the training whose model it reads is refused, and the message names each key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ar_unified.cli.main import main
from ar_unified.errors import UserError
from ar_unified.experiment import config as configs
from ar_unified.experiment.check_trained import check_trained
from ar_unified.experiment.experiment import STAGES, Experiment
from ar_unified.workdir import Workdir, read_json, write_json
from tests import bundles
from tests.cli.conftest import refused
from tests.cli.workdirs import trained

ADAPTER = dict(alpha=16.0, base_dtype="float32", dropout=0.0, rank=2, rslora=False, targets=["attention", "mlp"])
AGAIN = "Repeat the --config and the --config.KEY flags of the training, or leave out both: then the settings in "


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """The records of a workdir in which an adapter was trained on a bundle."""
    here = tmp_path_factory.mktemp("adapted")
    bundle = bundles.write(here / "bundle")
    workdir = trained(here / "w", lora=ADAPTER, training={"only": []}, init=bundle.hash)
    config = read_json(workdir.config)
    write_json(workdir.config, config | {"init": str(bundle.folder), "lora": config["lora"] | {"rank": 2}})
    return workdir


def check(workdir: Workdir, *changes: str, stages: tuple[str, ...] = ("export",)) -> None:
    config = configs.recorded(workdir.config, [f"--config.{change}" for change in changes])
    check_trained(Experiment(config, workdir), stages)


@pytest.mark.parametrize(
    "change, words",
    [
        ("lora.rank=0", "config.lora.rank: expected 2, as in the training; found 0"),
        ("lora.alpha=32.0", "config.lora.alpha: expected 16.0, as in the training; found 32.0"),
        ("lora.rslora=True", "config.lora.rslora: expected False"),
        ("lora.ranks=('mlp=8',)", r"config.lora.ranks: expected \[\], as in the training; found \['mlp=8'\]"),
        ("lora.targets=('mlp',)", r"config.lora.targets: expected \['attention', 'mlp'\]"),
        ("training.only=('head',)", r"config.training.only: expected \[\], as in the training; found \['head'\]"),
        ("model.rope_theta=100.0", "config.model.rope_theta: expected 500.0, as in the training; found 100.0"),
        ("data.layout=rows", "config.data.layout: expected 'grid', as in the training; found 'rows'"),
        ("init=", "config.init: expected the bundle that the adapter was trained on, found none"),
    ],
)
def test_each_key_that_decides_the_model_is_named(adapted, change, words):
    with pytest.raises(UserError, match=rf"^{words}.*\. {AGAIN}{adapted.config} are used"):
        check(adapted, change)
    check(adapted, change, stages=("tokenizer_evaluation",))  # reads no transformer
    check(adapted, change, stages=STAGES)  # trains it, and compares the records by itself


def test_all_keys_are_named_at_once_and_without_the_bundle_not_those_that_the_bundle_decides(adapted):
    with pytest.raises(UserError, match=rf"2 problems:\n  .*lora.alpha.*\n  .*data.max_tokens.*\n{AGAIN}"):
        check(adapted, "lora.alpha=32.0", "data.max_tokens=50")
    with pytest.raises(UserError, match=rf"2 problems:\n  .*lora.rank.*\n  .*config.init: .*found none\n{AGAIN}"):
        check(adapted, "init=", "lora.rank=0", "model.d_model=64", "training.only=('head',)")


def test_other_keys_may_differ(adapted):
    check(adapted)
    for key in ("lora.dropout=0.5", "lora.base_dtype=int8", "training.learning_rate=1.0", "model.dropout=0.5"):
        check(adapted, key)
    check(adapted, "training.phases=({'begin': 0.5},)", "sampling.max_length=100")


def test_an_adapter_that_was_not_trained_is_refused(tmp_path):
    workdir = trained(tmp_path / "w")
    with pytest.raises(UserError, match="config.lora.rank: expected 0, as in the training; found 2"):
        check(workdir, "lora.rank=2")


def test_every_verb_that_reads_the_model_refuses_and_needs_no_flags_without_a_config(tmp_path, capsys):
    """The verbs use the recorded config, so that only the flags of this command can differ."""
    workdir = trained(tmp_path / "w")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": bundles.SENTENCES[0], "mode": "text", "max_tokens": 2}))
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "A small red star."}))
    there = ["--workdir", str(workdir.path)]
    verbs = {
        "sample": ["--requests", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "drawn")],
        "score": ["--data", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "scores.jsonl")],
        "export": ["--output", str(tmp_path / "bundle")],
        "evaluate": [],
    }
    for verb, more in verbs.items():
        words = "config.model.rope_theta: expected 500.0, as in the training; found 100.0. Repeat"
        refused([verb, *there, *more, "--config.model.rope_theta=100.0"], words)
        if verb != "evaluate":  # its sources are gone
            assert main([verb, *there, *more]) == 0, capsys.readouterr().err
    refused(["evaluate", *there], "config.data.train.*/gone/images")
    assert Path(tmp_path / "drawn" / "samples.jsonl").exists()
