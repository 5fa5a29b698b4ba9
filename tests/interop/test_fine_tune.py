"""experiments/published/fine_tune.py uses an imported model's shape and its system's recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from ar_unified.bundle import Bundle
from ar_unified.cli.main import main
from ar_unified.experiment import config as configs
from ar_unified.experiment.check import check
from tests.interop import formats
from tests.sources import ROOT

FILE = f"{ROOT}/experiments/published/fine_tune.py"


def test_the_recipe_is_the_systems(tmp_path: Path) -> None:
    folder = formats.lumina_1(tmp_path / "download", tokenizer=True)
    beside = ["--text", str(folder / "tokenizer"), "--image", str(folder / "tokenizer" / "vqgan.safetensors")]
    into = ["--as", "lumina_mgpt", "--output", str(tmp_path / "bundle")]
    assert main(["import", "--from", str(folder), *into, *beside]) == 0
    config = configs.load(f"{FILE}:init={tmp_path / 'bundle'},path={tmp_path},steps=7", [])
    check(config, ("model",))
    assert config.training.learning_rate == 2e-5 and config.training.clip_norm == 4.0 and config.training.steps == 7
    assert config.loss.z_loss == 1e-5 and config.model.dropout == 0.05 and config.data.layout == "lumina_mgpt"
    assert config.model.d_model == Bundle(tmp_path / "bundle").config.d_model and config.sampling.guidance == 4.0


def test_what_it_needs_is_said() -> None:
    with pytest.raises(ValueError, match="needs a bundle and a folder"):
        configs.load(f"{FILE}:path=a", [])
