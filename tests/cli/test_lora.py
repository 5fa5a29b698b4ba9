"""Trains an adapter from the command line: the files that it writes, and both exports, adapter and merged bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ar_unified
from ar_unified.bundle import Bundle, named
from ar_unified.checkpoint import Checkpoints
from ar_unified.cli.main import main
from ar_unified.interop import peft
from ar_unified.model.lora import LoraConfig
from tests import adapters, bundles
from tests.cli.conftest import ROOT, refused

QUICK = {
    "lora.rank": 2,
    "lora.alpha": 4.0,
    "training.steps": 6,
    "training.warmup_steps": 1,
    "training.learning_rate": 0.02,
    "training.batch_size": 8,
    "training.log_every": 2,
    "training.validate_every": 3,
    "training.checkpoint_every": 3,
    "training.attention_share": False,
    "model.dropout": 0.0,
    "sampling.batch_size": 8,
}


def arguments(verb: str, folder: Path, bundle: Bundle, workdir: Path, *more: str, **changes: object) -> list[str]:
    settings = QUICK | {key.replace("__", "."): value for key, value in changes.items()}
    config = f"{ROOT}/experiments/folder.py:path={folder},init={bundle.folder}"
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return [verb, "--config", config, "--workdir", str(workdir), *more, *overrides]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return bundles.write(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.mark.slow
def test_an_adapter_is_trained_exported_served_and_merged(bundle, folder, tmp_path, capsys) -> None:
    workdir = tmp_path / "w"
    for verb in ("tokenizer", "prepare", "train"):
        assert main(arguments(verb, folder, bundle, workdir)) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "transformer: trains lora: " in said and f"begins with the weights of {bundle.folder}" in said
    stored = Checkpoints(workdir / "model" / "checkpoints", readonly=True)
    assert stored.restore(params=None)["params"].keys() == {"lora"}

    out = ["--workdir", str(workdir), "--output"]
    assert main(["export", *out, str(tmp_path / "adapter"), "--to", "peft"]) == 0
    assert "an adapter of rank 2" in capsys.readouterr().out
    assert main(["export", *out, str(tmp_path / "merged")]) == 0
    beside = ar_unified.load(bundle.folder, dtype="float32", adapters={"mine": tmp_path / "adapter"})
    inside, tokens = ar_unified.load(tmp_path / "merged", dtype="float32"), np.arange(30)[None]
    logits = inside.logits(tokens)
    assert np.abs(beside.logits(tokens, adapter="mine") - logits).max() < 1e-5 * np.abs(logits).max()
    assert np.abs(beside.logits(tokens) - logits).max() > 1e-3, "nothing was learnt"
    base, new = named(bundle.params()), named(Bundle(tmp_path / "merged").params())
    np.testing.assert_array_equal(base["head"], new["head"])

    # ---- another training starts from the adapter, with a first step that changes almost nothing
    begin = dict(lora__init=tmp_path / "adapter", training__steps=1, training__learning_rate=1e-9)
    begin |= dict(training__warmup_steps=0, training__checkpoint_every=1, lora__base_dtype="int8")
    for verb in ("tokenizer", "prepare", "train"):
        assert main(arguments(verb, folder, bundle, tmp_path / "again", **begin)) == 0, capsys.readouterr().err
    assert f"the adapter begins as {tmp_path / 'adapter'}" in capsys.readouterr().out
    out_again = ["--workdir", str(tmp_path / "again"), "--output", str(tmp_path / "second try")]
    assert main(["export", *out_again, "--to", "peft"]) == 0
    first, after = (peft.read(tmp_path / name, bundle.config) for name in ("adapter", "second try"))
    for path, pair in first.matrices.items():
        for begun, left in zip(pair, after.matrices[path], strict=True):
            np.testing.assert_allclose(left, begun, atol=1e-7)
            assert np.abs(begun).max() > 1e-3
    begin |= dict(lora__rank=3)
    refused(arguments("train", folder, bundle, tmp_path / "third", **begin), r"lora.rank .or ranks.: expected 2, as")

    # ---- the workdir's model with a loaded adapter, which a row chooses
    adapters.write(tmp_path / "second", Bundle(tmp_path / "merged"), LoraConfig(rank=3, alpha=6.0), seed=3, spread=0.5)
    rows = [{"id": name, "prompt": bundles.SENTENCES[0], "seed": 1} for name in ("none", "second")]
    rows[1]["adapter"] = "second"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = ["--requests", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "s")]
    ask += ["--adapter", f"second={tmp_path / 'second'}"]
    assert main(arguments("sample", folder, bundle, workdir, *ask)) == 0
    lines = map(json.loads, (tmp_path / "s" / "samples.jsonl").read_text().splitlines())
    drawn = {row["id"]: row for row in lines}
    assert not any("error" in row for row in drawn.values()) and drawn["none"]["tokens"] != drawn["second"]["tokens"]

    twice = [*ask[:-1], f"mine={tmp_path / 'adapter'}"]
    words = "adapter 'mine': .*adapter was trained on the bundle with which this workdir's training began.* use it with"
    refused(arguments("sample", folder, bundle, workdir, *twice), words)

    # ---- mismatches are refused
    other = bundles.write(tmp_path / "other", layout="rows")
    refused(
        arguments("sample", folder, bundle, workdir, *ask[:-1], f"second={tmp_path}"),
        "adapter 'second'.*adapter_config",
    )
    twice = [*ask, f"second={tmp_path}"]
    refused(arguments("sample", folder, bundle, workdir, *twice), "--adapter second: expected each name once")
    refused(arguments("train", folder, bundle, workdir, lora__rank=4), r"lora.rank.*2")
    without = arguments("train", folder, bundle, workdir, lora__rank=0)
    refused(without, r"with lora.rank = 2, this run has '\(absent\)'.* repeat --config.lora.rank=2$")
    for verb, more in {"sample": ask, "evaluate": [], "export": out + [str(tmp_path / "no")]}.items():
        given = arguments(verb, folder, bundle, workdir, lora__rank=0)
        refused(
            given + [each for each in more if each not in given], "config.lora.rank: expected 2, as in the training"
        )
    moved = ["export", *out, str(tmp_path / "no"), f"--config.init={other.folder}"]
    refused(moved, "expected .* as|config.init: the adapter was trained on bundle")


def test_what_cannot_be_adapted_is_said(bundle, folder, tmp_path) -> None:
    def said(words: str, **changes: object) -> None:
        refused(arguments("train", folder, bundle, tmp_path / "w", **changes), words)

    said("config.lora.rank: expected at least 0, found -1", lora__rank=-1)
    said("config.lora.targets: 'mlp.op' matches no matrix of a layer", lora__targets="('mlp.op',)")
    said("config.lora.base_dtype: expected one of float32, bfloat16, int8; found 'int4'", lora__base_dtype="int4")
    without = ["train", "--config", f"{ROOT}/experiments/folder.py:path={folder}", "--workdir", str(tmp_path / "w")]
    refused([*without, "--config.lora.rank=2"], "config.lora.rank: expected 0 without config.init")
    full = ["export", "--workdir", str(tmp_path / "w"), "--output", str(tmp_path / "o"), "--to", "peft"]
    refused([*full, "--config", without[2]], "config.lora.rank: expected a training of an adapter|is not there yet")
    assert not (tmp_path / "w" / "model").exists()
