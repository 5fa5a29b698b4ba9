"""An adapter for an 8-bit base learns from rewards. The base is rounded once, and is the same at every start."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import ar_unified
from ar_unified.checkpoint import Checkpoints
from ar_unified.cli.main import main
from ar_unified.metrics import read_metrics
from tests import bundles
from tests.cli.test_lora import arguments

REWARD = dict(
    lora__base_dtype="int8",
    training__objective="reward",
    training__steps=4,
    training__checkpoint_every=2,
    training__log_every=1,
    reward__group_size=4,
    reward__minibatches=2,
    reward__kl=0.05,
    reward__function="tests.cli.test_rewards:bright",
)


@pytest.mark.slow
@pytest.mark.exact
def test_rewards_teach_an_adapter_beside_8_bits_and_a_second_start_ends_with_the_same_bits(
    folder: Path, tmp_path: Path, capsys
) -> None:
    # Initialised weights: the sharper attention of other tests would amplify rounding errors to 1e-3.
    mild = jax.tree.map(lambda leaf: leaf / 6 if leaf.ndim > 1 else leaf, bundles.parts()["params"])
    bundle, workdir = bundles.write(tmp_path / "tiny", params=mild), tmp_path / "w"
    for verb in ("tokenizer", "train"):
        assert main(arguments(verb, folder, bundle, workdir, **REWARD)) == 0, capsys.readouterr().err
    rows = read_metrics(workdir / "model" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["groups/failed"] == 0 for row in rows)
    # Answers are drawn in float32 with the adapter merged into the rounded matrices; training keeps them separate.
    assert all(row["sampler_trainer/max"] < 1e-4 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl"] > 1e-6
    folders = workdir / "model" / "checkpoints"
    first = Checkpoints(folders, readonly=True).restore(params=None)["params"]
    assert first.keys() == {"lora"} and max(np.abs(leaf).max() for leaf in jax.tree.leaves(first)) > 1e-3

    for last in folders.glob("*4*"):
        shutil.rmtree(last)
    (workdir / "model" / "done.json").unlink()
    assert main(arguments("train", folder, bundle, workdir, **REWARD)) == 0, capsys.readouterr().err
    again = Checkpoints(folders, readonly=True).restore(params=None)["params"]
    jax.tree.map(np.testing.assert_array_equal, again, first)

    out = ["export", "--workdir", str(workdir), "--output"]
    assert main([*out, str(tmp_path / "merged")]) == 0
    assert main([*out, str(tmp_path / "adapter"), "--to", "peft"]) == 0
    beside = ar_unified.load(bundle.folder, dtype="float32", adapters={"mine": tmp_path / "adapter"})
    inside, tokens = ar_unified.load(tmp_path / "merged", dtype="float32"), np.arange(30)[None]
    logits = inside.logits(tokens)
    assert np.abs(beside.logits(tokens, adapter="mine") - logits).max() < 1e-5 * np.abs(logits).max()
    assert np.abs(beside.logits(tokens) - logits).max() > 1e-4
