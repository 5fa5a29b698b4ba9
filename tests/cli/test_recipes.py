"""experiments/published/fine_tune.py: each system's recipe is a config that runs; Anole's trains only a part of the
parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified import bundle as bundles
from ar_unified.bundle import Bundle, named
from ar_unified.cli.main import main
from ar_unified.cli.plan import run_of
from ar_unified.experiment import config as configs
from ar_unified.experiment.check import check
from ar_unified.experiment.experiment import Experiment
from ar_unified.workdir import Workdir
from tests.cli.conftest import ROOT, refused
from tests.published_bundles import parts

FILE = f"{ROOT}/experiments/published/fine_tune.py"
# System -> the keys that its recipe sets. docs/published_weights.md says where they were published.
EXPECTED: dict[str, dict[str, Any]] = {
    "chameleon": {
        "training.learning_rate": 1e-5, "training.final_fraction": 0.0, "training.weight_decay": 0.1,
        "training.batch_size": 128, "training.accumulation": 16, "model.dropout": 0.05, "loss.prompt": 0.0,
    },
    "anole": {
        "training.learning_rate": 1e-3, "training.only": ("head[image]",), "training.fresh": ("head[image]",),
        "training.weight_decay": 0.0, "training.b2": 0.999, "training.schedule": "wsd", "training.decay": "linear",
        "training.decay_fraction": 1.0, "training.warmup_steps": 0, "training.condition_dropout": 0.0,
        "model.dropout": 0.0, "loss.prompt": 1.0,
    },
    "lumina_mgpt": {
        "training.learning_rate": 2e-5, "training.final_fraction": 1.0, "training.weight_decay": 0.1,
        "training.clip_norm": 4.0, "model.dropout": 0.05, "loss.z_loss": 1e-5, "loss.prompt": 0.0,
        "training.condition_dropout": 0.1,
    },
    "emu3": {
        "training.learning_rate": 1e-5, "training.final_fraction": 0.1, "training.warmup_steps": 30,
        "training.weight_decay": 0.1, "training.clip_norm": 5.0, "training.b2": 0.95, "training.eps": 1e-6,
        "training.condition_dropout": 0.05, "loss.roles.text": 0.0, "loss.roles.control": 0.0, "loss.roles.size": 0.0,
        "loss.roles.image": 1.0, "training.batch_size": 8,
    },
    "liquid": {"training.learning_rate": 2e-5},
    "lwm": {"loss.mean": "by_side", "training.learning_rate": 1e-5},
    "emu3_5": {"training.learning_rate": 1e-5, "training.clip_norm": 1.0, "loss.mean": "joint"},
}  # fmt: skip


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny bundle for each system. All have Chameleon's ids and the system's name."""
    folder = tmp_path_factory.mktemp("systems")
    for name in EXPECTED:
        made = parts("emu3" if name == "emu3" else "chameleon")
        bundles.write(folder / name, **made | {"published": {"system": name, "untrained": "noise"}})
    return folder


def at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


@pytest.mark.parametrize("system", EXPECTED)
def test_a_bundle_is_trained_as_its_authors_did(system: str, systems: Path) -> None:
    config = configs.load(f"{FILE}:init={systems / system},path={systems}")
    assert {key: at(config, key) for key in EXPECTED[system]} == EXPECTED[system]
    check(config, ("model",))
    assert run_of(config).only == config.training.only


def test_another_recipe_may_be_named_and_a_batch(systems: Path) -> None:
    config = configs.load(f"{FILE}:init={systems / 'chameleon'},path={systems},recipe=anole,batch=32,steps=50")
    assert config.training.only == ("head[image]",) and config.training.steps == 50
    assert (config.training.batch_size, config.training.accumulation) == (32, 4)
    refused(
        ["plan", "--config", f"{FILE}:init={systems / 'chameleon'},path={systems},recipe=anol", "--target", "h200:1"],
        "recipe: expected plain, chameleon, anole, .*; found anol; did you mean 'anole'",
    )


def test_places_that_name_nothing_are_refused_before_anything_is_done(systems: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A text.")
    here = ["--config", f"{FILE}:init={systems / 'chameleon'},path={tmp_path}", "--workdir", str(tmp_path / "w")]
    refused(
        ["train", *here, "--config.training.only=('head[images]',)", "--config.training.fresh=('haed',)"],
        r"(?s)2 problems.*config.training.only: 'head\[images\]': expected one of"
        r".*config.training.fresh: 'haed' matches no parameter",
    )
    alone = ["--config", f"{ROOT}/experiments/folder.py:path={tmp_path}", "--workdir", str(tmp_path / "w")]
    refused(["train", *alone, "--config.training.fresh=('head',)"], "fresh: expected none without config.init")


def rows(file: Path, *found: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


def chat(i: int, *shown: dict[str, Any]) -> dict[str, Any]:
    """A conversation about images; `shown`: the parts before its text."""
    asked = [*shown, {"type": "text", "text": f'Draw the "image" {i}.'}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "I only write."}]}


def test_what_it_is_trained_on_may_be_rows_tables_or_text(systems: Path, tmp_path: Path) -> None:
    bundles.write(tmp_path / "llama", **parts("llama"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("A text.")
    talk = rows(tmp_path / "chat.jsonl", chat(0))
    for init, path, kind in (
        (tmp_path / "llama", tmp_path / "texts", "text"),
        (tmp_path / "llama", talk, "jsonl"),
        (systems / "chameleon", talk, "jsonl"),
        (systems / "chameleon", tmp_path / "shards.parquet", "parquet"),
        (systems / "chameleon", tmp_path / "texts", "folder"),
    ):
        config = configs.load(f"{FILE}:init={init},path={path}")
        assert [part[0].kind for part in (config.data.train, config.data.validation)] == [kind] * 2, path


def test_a_model_of_text_alone_learns_from_conversations_without_images(tmp_path: Path) -> None:
    bundles.write(tmp_path / "llama", **parts("llama"))
    config = f"{FILE}:init={tmp_path / 'llama'},path={tmp_path / 'chat.jsonl'}"
    rows(tmp_path / "chat.jsonl", *map(chat, range(40)))
    assert Experiment(configs.load(config), Workdir(tmp_path / "w")).text_only
    rows(tmp_path / "chat.jsonl", *map(chat, range(40)), chat(40, {"type": "image", "image": "a.png"}))
    refused(
        ["run", "--config", config, "--workdir", str(tmp_path / "w")], "no model is given, but chat may have images"
    )


@pytest.mark.slow
def test_a_model_of_text_alone_is_tuned_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bundles.write(tmp_path / "llama", **parts("llama"))
    talk = rows(tmp_path / "chat.jsonl", *map(chat, range(40)))
    config = f"{FILE}:init={tmp_path / 'llama'},path={talk},steps=2"
    here = ["--config", config, "--workdir", str(tmp_path / "w"), "--config.training.preview_every=0"]
    for verb in ("tokenizer", "prepare", "train"):
        assert main([verb, *here]) == 0, capsys.readouterr()
    assert main(["export", "--workdir", str(tmp_path / "w"), "--output", str(tmp_path / "out")]) == 0
    given = ["--from", str(tmp_path / "out"), "--config", config, "--output", str(tmp_path / "numbers")]
    assert main(["evaluate", *given]) == 0, capsys.readouterr()
    found = json.loads((tmp_path / "numbers" / "evaluation.json").read_text())["validation"]
    steps = map(json.loads, (tmp_path / "w" / "model" / "metrics.jsonl").read_text().splitlines())
    (last,) = [row for row in steps if "validation/loss" in row]
    assert found["loss"] == last["validation/loss"] and found["loss/task/text"] > 0


@pytest.mark.slow
def test_anoles_recipe_trains_rows_of_the_head_that_begin_anew(
    systems: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    here = ["--config", f"{FILE}:init={systems / 'chameleon'},path={folder},recipe=anole,steps=2,batch=8"]
    here += ["--workdir", str(tmp_path / "w")]
    small = ["--config.training.sequence_length=160", "--config.training.preview_every=0", "--config.loss.chunk=256"]
    for verb in ("tokenizer", "prepare", "train"):
        assert main([verb, *here, *small]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "trains 24 of 384 rows of head: 768 of" in said and "head[image] begin at random" in said
    assert main(["export", "--workdir", str(tmp_path / "w"), "--output", str(tmp_path / "out")]) == 0
    came, found = Bundle(systems / "chameleon"), Bundle(tmp_path / "out")
    assert found.published == {"system": "chameleon"}, "its head is trained now"
    v, before, after = came.grammar.vocabulary, named(came.params()), named(found.params())
    codes = np.zeros(v.size, bool)
    codes[v.image_offset : v.rest_offset] = True
    for name, leaf in before.items():
        rows = ~codes if name == "head" else slice(None)
        assert np.array_equal(leaf[rows], after[name][rows]), name
    new = np.asarray(after["head"])[codes]
    assert np.abs(new - np.asarray(before["head"])[codes]).min(1).max() > 1e-3
    assert 0.5 < new.std() * came.config.d_model**0.5 < 1.5, "as a head begins, and not six times that"
