"""The parts that all objectives of the transformer's training have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ar_unified.data.images import NoImages
from ar_unified.data.loader import PackedBatches
from ar_unified.data.phases import Phase
from ar_unified.data.prepare import load_report
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.adapter import first_adapter
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.settings import state_of
from ar_unified.manifests import Json
from ar_unified.training.tasks import TransformerTask

Batches = TypeVar("Batches", bound=PackedBatches)
VALIDATION_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Objective:
    """The objective of an experiment, which config.training.objective names.

    Attributes:
        facts: what decides the trained model in addition to the config.
        keys: further sections of the config that decide it.
        task: makes the task. It is called with the stage's folder after the stage has begun, because it may take long.
    """

    facts: dict[str, Any]
    keys: tuple[str, ...]
    task: Callable[[Path], TransformerTask]


def training_batches(experiment: Experiment, kind: type[Batches]) -> Batches:
    """Batches of data/train, which `prepare` has made."""
    config, training = experiment.config, experiment.config.training
    folder = experiment.workdir.data / "train"
    if experiment.workdir.reader:
        experiment.workdir.await_file(folder / "manifest.json")
    return kind(
        folder,
        experiment.grammar,
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        seed=config.seed,
        phases=settings.phases(training, experiment.mixture()),
    )


def tell(experiment: Experiment, batches: PackedBatches) -> None:
    """Prints the number of rows of every source, and its share of all rows."""
    for name, facts in batches.describe().items():
        shares = ", then ".join(f"{share:.1%}" for share in facts["shares"])
        experiment.say(f"{name}: {facts['rows']} rows an epoch, {facts['fill']:.1%} full, {shares} of the rows")
        for length, of in facts.get("by_length", {}).items():
            experiment.say(
                f"{name}, rows of {length} tokens: {of['rows']} an epoch, {of['fill']:.1%} full, "
                f"{of['left_out']} documents are longer and left out"
            )


def held_out_batches(experiment: Experiment, kind: type[Batches], phase: Phase) -> Batches | None:
    """Batches of data/validation. Returns None and prints a line if no document is held out."""
    training, folder = experiment.config.training, experiment.workdir.data / "validation"
    held_out = load_report(folder).sources if folder.exists() else {}
    if not any(source.documents for source in held_out.values()):
        experiment.say("no document is held out: training goes on without a validation loss")
        return None
    batch_size, length = settings.longest(training)
    rows = dict(batch_size=batch_size, sequence_length=length)
    return kind(folder, experiment.grammar, phases=[phase], **rows)


def validation(held_out: PackedBatches | None) -> list[Any]:
    """The batches that every validation uses; they are the same each time."""
    return [held_out.batch(step) for step in range(VALIDATION_BATCHES)] if held_out is not None else []


def facts(experiment: Experiment, own: Mapping[str, Json]) -> dict[str, object]:
    """What decides the trained model in addition to the config. `own`: the facts that only this objective has."""
    init = {} if experiment.bundle is None else {"init": experiment.bundle.hash}
    known = dict(manifest=experiment.grammar.manifest(), mixture=experiment.mixture())
    adapter = {"lora": _adapter(experiment)} if experiment.config.lora.rank else {}
    # Without an adapter the facts are the same as in versions that had no adapters.
    return known | state_of(experiment.config.training) | dict(own) | init | adapter


def _adapter(experiment: Experiment) -> dict[str, Json]:
    """Everything that decides the adapter, without the path of its file. `ranks` and `alphas` are left out if they are
    empty, because earlier versions did not have them."""
    said = {key: value for key, value in configs.plain(experiment.config.lora).items() if key != "init"}
    # The rank comes first, because a message names the first key that differs from a training without an adapter.
    said = {"rank": said.pop("rank")} | {
        key: value for key, value in said.items() if value or key not in ("ranks", "alphas")
    }
    first = first_adapter(experiment.config, experiment.bundle)
    return said if first is None else said | {"init": first.adapter.hash}


def loss_settings(experiment: Experiment) -> dict[str, Any]:
    """Arguments of a `TransformerTask` for its losses. They do not depend on which parameters are trained."""
    config, grammar = experiment.config, experiment.grammar
    return dict(
        config=experiment.model,
        vocabulary=grammar.vocabulary,
        role_weights=configs.plain(config.loss.roles),
        task_weights=configs.plain(config.loss.tasks),
        split=grammar.layout.split(grammar.vocabulary, config.loss.softmax),
        mean_split=grammar.layout.split(grammar.vocabulary, config.loss.mean),
        z_loss=config.loss.z_loss,
        text_bytes=experiment.text_tokenizer.piece_bytes,
        chunk=config.loss.chunk,
    )


def task_settings(experiment: Experiment) -> dict[str, Any]:
    """Arguments of a `TransformerTask` that do not depend on the objective."""
    config = experiment.config
    return loss_settings(experiment) | dict(
        attention_share=config.training.attention_share,
        code_vectors=_code_vectors(experiment),
        only=tuple(config.training.only),
        rates=tuple(config.training.rates),
        phases=settings.moving(config.training),
        new=experiment.new_ids,
        lora=settings.lora(config),
    )


def _code_vectors(experiment: Experiment) -> np.ndarray | None:
    """The codes' vectors for `training.code_embedding_init`; None if rows begin at random or come from a bundle."""
    how, tokenizer = experiment.config.training.code_embedding_init, experiment.image_tokenizer
    drawn = how == "random" or experiment.bundle is not None
    return None if drawn or isinstance(tokenizer, NoImages) else tokenizer.vectors()
