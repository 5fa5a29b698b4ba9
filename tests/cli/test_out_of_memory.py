"""A verb that runs out of memory names its own flags or keys, and ends with the status of a run that had to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ar_unified.cli import evaluate, sample, score
from ar_unified.experiment import config as configs
from ar_unified.experiment.experiment import Experiment
from ar_unified.workdir import Workdir
from tests import bundles
from tests.cli.conftest import refused


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    for module, name in ((sample, "load"), (sample, "_run"), (score, "load"), (score, "weights_hash")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(evaluate, "_evaluate_bundle", fail)
    experiment = Experiment(configs.defaults(), Workdir(tmp_path / "w"))
    experiment.__dict__["engine"] = experiment.__dict__["image_tokenizer"] = None
    monkeypatch.setattr(experiment, "use_adapters", lambda adapters: None)
    for module in (sample, score):
        monkeypatch.setattr(module, "open_experiment", lambda *_: experiment)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')


@pytest.mark.parametrize("verb", ["sample", "score"])
def test_a_bundle_has_a_flag_for_it(verb: str, tmp_path: Path) -> None:
    given = {"sample": "--requests", "score": "--data"}[verb]
    argv = [verb, "--from", "bundle", given, str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out")]
    refused(argv, r"out of memory: RESOURCE_EXHAUSTED.*5 bytes\. Try a smaller --batch-size", status=3)


@pytest.mark.parametrize("verb", ["sample", "score"])
def test_a_workdir_has_keys_for_it(verb: str, tmp_path: Path) -> None:
    given = {"sample": "--requests", "score": "--data"}[verb]
    argv = [verb, "--config", "shapes", "--workdir", str(tmp_path / "w"), given, str(tmp_path / "a.jsonl")]
    refused([*argv, "--output", str(tmp_path / "out")], r"bytes\. Try a smaller sampling.batch_size \(now", status=3)


def test_the_evaluation_of_a_bundle_has_keys_for_it_and_leaves_nothing(tmp_path: Path) -> None:
    bundles.write(tmp_path / "bundle")
    out = tmp_path / "out"
    argv = ["evaluate", "--from", str(tmp_path / "bundle"), "--data", str(tmp_path / "a.jsonl"), "--output", str(out)]
    refused(argv, r"bytes\. Try a smaller sampling.batch_size .*a larger training.accumulation", status=3)
    assert not out.exists()
