"""Compares a config with the settings that a workdir's training recorded, before its model is read.

The weights alone do not show every difference: with another lora.alpha, for example, the same adapter would be merged
with another scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ar_unified.data.images import WAY
from ar_unified.errors import UserError, several
from ar_unified.experiment import config as configs
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.problems import Problems
from ar_unified.manifests import Json
from ar_unified.model.config import config_from, decisive
from ar_unified.workdir import read_json

# The keys of sections that decide how a trained model is used; a bundle keeps them.
DATA = ("image_size", "resize", "layout", "max_tokens")
LOSS = ("softmax",)
_LORA = ("rank", "alpha", "rslora", "ranks", "alphas", "targets")
_READING = {"samples", "requests", "evaluation", "export"}  # stages and work that only read the trained model


def check_trained(experiment: Experiment, stages: Collection[str]) -> None:
    """Raises UserError with every key of the config that differs from the finished training whose model is read.

    Keys that the record lacks, because an earlier version wrote it, are not compared. If there is no record, or if the
    `stages` train the model themselves, nothing is compared.
    """
    trained, data = (recorded(experiment, stage) for stage in ("model", "data"))
    if not trained or "model" in stages or not _READING & set(stages):
        return
    config, problems = configs.plain(experiment.config), Problems()
    _compare(config, problems, {"lora": _adapter(trained)})
    if "lora" in trained:
        with problems.of("init"):
            experiment.base()
        if not problems.found_in("init"):  # another bundle has another model, so the keys of the model would differ too
            places = ("only", *(("phases",) if "trains" in trained else ()))  # a checkpoint has only what was trained
            _compare(config, problems, {"training": _of(trained, "training", places)})
    if not problems.found_in("init"):
        model = tuple(decisive(config_from(config["model"], vocab_size=1)))
        sections = {"model": _of(trained, "model", model), "loss": _of(trained, "loss", LOSS)}
        _compare(config, problems, sections | {"data": _of(data, "data", (*DATA, *WAY))})
    if problems.lines:
        end = ". " if len(problems.lines) == 1 else "\n"
        raise UserError(
            f"{several(problems.lines)}{end}Repeat the --config and the --config.KEY flags of the training, or leave "
            f"out both: then the settings in {experiment.workdir.config} are used"
        )


def _compare(config: Mapping[str, Any], problems: Problems, sections: Mapping[str, Mapping[str, Json]]) -> None:
    for section, recorded in sections.items():
        for name, value in recorded.items():
            if (found := config[section].get(name, value)) != value:
                problems.say(f"{section}.{name}", f"expected {value!r}, as in the training; found {found!r}")


def _adapter(trained: Mapping[str, Any]) -> dict[str, Json]:
    """The recorded keys of config.lora. Records lack `ranks` and `alphas` if these are empty."""
    found = {"ranks": [], "alphas": [], **trained["lora"]} if "lora" in trained else {"rank": 0}
    return _of({"lora": found}, "lora", _LORA)


def _of(record: Mapping[str, Any], section: str, names: Collection[str]) -> dict[str, Json]:
    """Those of the keys `names` that a section of a record has."""
    found = record.get(section, {})
    return {name: found[name] for name in names if name in found}


def recorded(experiment: Experiment, stage: str) -> dict[str, Json]:
    """The fingerprint of a finished stage; {} if the stage has not finished, or was removed."""
    path = experiment.workdir.path / stage / "done.json"
    return read_json(path)["fingerprint"] if path.exists() else {}
