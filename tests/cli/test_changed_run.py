"""A run is changed, made longer and branched from the command line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_unified.checkpoint import steps_in
from ar_unified.cli.arguments import _branch
from ar_unified.cli.main import main
from ar_unified.data.loader import PackedBatches
from ar_unified.experiment import experiment as experiment_module
from ar_unified.metrics import read_metrics
from ar_unified.parallel.mesh import make_mesh
from ar_unified.workdir import read_json
from tests.cli.conftest import ROOT, command

SETTINGS: dict[str, Any] = dict(
    image_tokenizer__steps=1, training__steps=36, training__log_every=1, training__validate_every=0,
    training__checkpoint_every=6, training__keep=2, training__keep_every=18, training__schedule="wsd",
    training__decay_fraction=0.0, evaluation__limit=1,
)  # fmt: skip


def history(folder: Path) -> list[tuple[Any, ...]]:
    path = folder / "model" / "history.json"
    return [(row["kind"], row["step"], row["changed"]) for row in read_json(path)] if path.exists() else []


def run(verb: str, folder: Path, workdir: Path, *flags: str, **changes: Any) -> int:
    return main([*command(verb, folder, workdir, **SETTINGS | changes), *flags])


@pytest.mark.slow
def test_a_training_that_ran_out_of_memory_is_changed_made_longer_and_branched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(experiment_module, "make_mesh", lambda *_: make_mesh({}, jax.devices()[:1]))
    whole, changed, decayed = tmp_path / "whole", tmp_path / "changed", tmp_path / "decayed"
    for verb in ("tokenizer", "prepare"):
        assert run(verb, folder, whole) == 0
    shutil.copytree(whole, changed)
    assert run("train", folder, whole) == 0

    batch = PackedBatches.batch

    def out_of_memory(batches: PackedBatches, step: int, *part: int) -> Any:
        if step == 30:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return batch(batches, step, *part)

    with monkeypatch.context() as patch:
        patch.setattr(PackedBatches, "batch", out_of_memory)
        assert run("train", folder, changed) == 3
    assert "Try model.remat=full or a smaller loss.chunk (now 1024)" in capsys.readouterr().err
    cheap: dict[str, Any] = dict(model__remat="full", training__accumulation=2, loss__chunk=64)
    assert run("train", folder, changed, **cheap) == 0
    ours, theirs = ([row["loss"] for row in read_metrics(path / "model/metrics.jsonl")] for path in (changed, whole))
    assert len(ours) == 36
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

    assert run("evaluate", folder, changed, **cheap) == 0
    before = (changed / "evaluation.json").read_bytes()
    capsys.readouterr()
    for verb in ("train", "evaluate"):
        assert run(verb, folder, changed, **cheap | dict(training__steps=40, training__log_every=2)) == 0
    out = capsys.readouterr().out
    assert "model: changed at step 36: training.steps 36 -> 40\n" in out and "extended" not in out
    assert "model: changed at step 36: training.log_every 1 -> 2 (this does not change the result)" in out
    assert re.search(r"^==== model: [0-9.]+ s in 3 starts$", out, re.MULTILINE)
    assert "learning rate: 0 in step 36" in out and "evaluation: made again, because model.training.steps is 40" in out
    assert (changed / "evaluation.old-1" / "evaluation.json").read_bytes() == before
    assert (changed / "evaluation.old-1" / "report.html").exists() and (changed / "evaluation.json").exists()
    assert "training.steps 36 -&gt; 40" in (changed / "report.html").read_text()
    names = {"model.remat": ["none", "full"], "loss.chunk": [1024, 64], "training.accumulation": [1, 2]}
    assert history(changed) == [
        ("cost", 30, names),
        ("extended", 36, {"training.steps": [36, 40]}),
        ("cost", 36, {"training.log_every": [1, 2]}),
    ]

    decay = dict(training__steps=24, training__decay_fraction=0.25)
    assert run("train", folder, decayed, "--branch", f"{whole}:12", **decay) == 2
    assert "one of [18, 30, 36]; found 12" in capsys.readouterr().err
    assert run("train", folder, decayed, "--branch", f"{whole}:18", **decay) == 0
    rows = read_metrics(decayed / "model/metrics.jsonl")
    assert [row["loss"] for row in rows[:18]] == theirs[:18] and len(rows) == 24
    rates = [row["learning_rate"] for row in rows]
    assert rates[17] == pytest.approx(2e-3) and rates[17] > rates[18] and rates[-1] == 0
    fields = {"training.steps": [36, 24], "training.decay_fraction": [0.0, 0.25]}
    assert history(decayed) == [("branched", 18, fields)]
    assert steps_in(whole / "model/checkpoints") == [18, 30, 36] and not history(whole)
    assert run("train", folder, whole) == 0 and "model: done already" in capsys.readouterr().out


def test_a_branch_is_a_workdir_and_perhaps_a_step() -> None:
    assert _branch("a:b/c:12") == (Path("a:b/c"), 12) and _branch("a:b") == (Path("a:b"), None)


def test_a_branch_takes_the_datasets_that_were_drawn_and_is_refused_before_any_is(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Drawing `shapes` would take minutes. So the origin's dataset is damaged here, and the error shows that the branch
    reads its own link to it."""
    origin, workdir = tmp_path / "origin", tmp_path / "branch"
    drawn = "tfds/shapes/captions/1.1.0"
    for folder, name in ((f"{origin}/{drawn}", "dataset_info.json"), (f"{origin}/model", "started.json")):
        Path(folder).mkdir(parents=True)
        (Path(folder) / name).write_text("{}")
    (origin / "model" / "checkpoints" / "500" / "state").mkdir(parents=True)
    (origin / "model" / "checkpoints" / "500" / "_CHECKPOINT_METADATA").write_text("{}")
    (origin / "tfds" / "shapes" / "captions" / "1.1.0.incompleteABC").mkdir()

    def branched(steps: int) -> str:
        argv = ["train", "--config", str(ROOT / "experiments" / "shapes.py"), "--workdir", str(workdir)]
        assert main([*argv, "--branch", f"{origin}:500", f"--config.training.steps={steps}"]) == 2
        return capsys.readouterr().err

    assert "expected more than the 500 that the branch begins with, found 500" in branched(500)
    assert not (workdir / "tfds").exists()
    assert "damaged files (AssertionError): delete this folder" in branched(501)
    found = workdir / drawn / "dataset_info.json"
    assert found.samefile(origin / drawn / "dataset_info.json")
    found.write_text("{")
    assert f"below {workdir}/tfds/shapes/captions, found other or damaged files (ParseError)" in branched(501)
    assert [path.name for path in (workdir / "tfds/shapes/captions").iterdir()] == ["1.1.0"]
