"""Facts about a trained experiment, for the top of a report and for the files of its adapter."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ar_unified import history
from ar_unified.bundle import Bundle
from ar_unified.checkpoint import restore_params
from ar_unified.errors import UserError
from ar_unified.experiment import settings
from ar_unified.experiment.experiment import STAGES, Experiment
from ar_unified.model.config import parameter_count
from ar_unified.model.lora import LoraConfig
from ar_unified.workdir import read_history, read_json


def facts(experiment: Experiment) -> dict[str, str]:
    """Short facts for the top of a report."""
    step, best = experiment.checkpoint, experiment.config.sampling.checkpoint == "best"
    facts = {"checkpoint": f"step {step}, the {'best on held-out documents' if best else 'last'}"} | of_model(
        experiment
    )
    if lora := settings.lora(experiment.config):
        facts["model"] += f", tuned by an adapter of rank {lora.rank}"
    if changed := read_history(experiment.workdir.model):
        facts["changed"] = "; ".join(map(history.told, changed))
    return facts


def of_model(experiment: Experiment) -> dict[str, str]:
    """The facts of the model itself, whether it was trained here or comes from a bundle."""
    vocabulary = experiment.grammar.vocabulary
    codes = f" + {vocabulary.codebook_size} image codes" if vocabulary.codebook_size else ", no images"
    return {
        "model": f"{parameter_count(experiment.model) / 1e6:.2f}M parameters in {experiment.model.n_layers} layers",
        "vocabulary": f"{vocabulary.text_size} text pieces{codes}",
    }


def trained_adapter(experiment: Experiment) -> tuple[LoraConfig, Any, Bundle]:
    """The adapter's config, all trained values (the adapter's and others), and the bundle that the adapter was trained
    on.

    Raises UserError if no adapter was trained.
    """
    lora = settings.lora(experiment.config)
    if lora is None:
        raise UserError("config.lora.rank: expected a training of an adapter, found 0: the whole model was trained")
    experiment.require(
        (experiment.workdir.model / "done.json").exists(), experiment.workdir.model / "done.json", "train"
    )
    return lora, restore_params(experiment.checkpoint_folder, step=experiment.checkpoint), experiment.base()


def seconds(experiment: Experiment) -> dict[str, float]:
    """Wall time of the finished stages, in order."""
    records = {name: experiment.workdir.path / name / "done.json" for name in STAGES}
    return {name: read_json(path)["summary"]["seconds"] for name, path in records.items() if path.exists()}


def weights_hash(experiment: Experiment) -> str:
    """A hash that identifies the weights in use."""
    trained = json.dumps(experiment.trained(), sort_keys=True)
    step = "" if experiment.config.sampling.checkpoint == "last" else f" step {experiment.checkpoint}"
    return hashlib.sha256((trained + step).encode()).hexdigest()
