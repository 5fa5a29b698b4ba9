"""Train the transformer on the token shards, or by rewards for the answers that it samples.

Reads data/train and data/validation. With config.training.objective="reward" it reads the sources instead: their
documents give the prompts, the model samples answers, and config.reward scores them (docs/rewards.md). Writes into the
workdir:
  model/checkpoints       Orbax: parameters, optimizer state and the vocabulary's manifest. The last few checkpoints are
                          kept, and the one with the lowest validation loss (training.keep_best). With LoRA
                          (config.lora.rank above 0) they have only what is trained; config.init has the rest
  model/metrics.jsonl     loss and log Z by role, loss by task, bits per image token and per byte of text, gradient
                          norm, learning rate, speed, and attention between text and images; model/tensorboard has the
                          same, with sample images
  model/goodput.json      how the wall time of every attempt was spent
  model/failed_rewards.jsonl   with rewards: every answer without a reward, with its prompt and the reason
  model/history.json      the settings that changed during the training, and at which steps

Keys that affect only cost (model.remat, training.accumulation, loss.chunk, mesh, log_every, ...) may change whenever
the training is started again. training.steps and the schedule may change as well; a finished training then continues.
To continue from an earlier checkpoint without changing this training, branch it into a workdir of its own:
    ar-unified train --branch WORKDIR:STEP --workdir NEW --config FILE --config.training.steps=N ...
--config.init=FOLDER begins a training with the weights, tokenizers and language of a bundle. The config must describe
the bundle's model; folder:path=DIR,init=FOLDER takes the model's shape from the bundle. If the bundle is
of text alone and the experiment has an image tokenizer, the model is extended by the ids that images need
(docs/from_llm.md). training.code_embedding_init says how their rows are initialised; in training.only, [new] names
them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_unified import storage
from ar_unified.checkpoint import Checkpoints, steps_in
from ar_unified.data import prepare as preparing
from ar_unified.data.images import draws_none, for_single
from ar_unified.data.prepare import load_report
from ar_unified.errors import UserError, about
from ar_unified.experiment import config as configs
from ar_unified.experiment.adapter import first_adapter, require_rows
from ar_unified.experiment.beginning import beginning
from ar_unified.experiment.branch import begin_branch, branch
from ar_unified.experiment.changes import Training
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.likelihood import likelihood
from ar_unified.experiment.objective import Objective
from ar_unified.experiment.preference import preference
from ar_unified.experiment.reward import reward
from ar_unified.experiment.settings import lora, selected, shapes, trained, training
from ar_unified.experiment.start import by_first_process, open_experiment
from ar_unified.history import DECIDING
from ar_unified.language.document import CodesPart
from ar_unified.manifests import Json
from ar_unified.model.lora import merged
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.request import Request
from ar_unified.training.loop import fit
from ar_unified.training.optimizer import OptimizerConfig, learning_rate
from ar_unified.workdir import Stage

_OBJECTIVES: dict[str, Callable[[Experiment], Objective]] = {
    "likelihood": likelihood,
    "preference": preference,
    "reward": reward,
}
_PREVIEWS = 8
_KEYS = ("model", "loss", "training", "mesh")


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Trains the transformer; with --branch, first makes a branch of another workdir. Returns the exit status. Raises
    UserError or RunError.
    """
    if not arguments.branch:
        experiment = open_experiment(arguments, overrides, ["model"])
    else:
        if storage.is_mirrored(Path(arguments.workdir)):
            raise UserError("--branch: expected a --workdir on disk: a training cannot be branched in an object store")
        begin = partial(begin_branch, origin=arguments.branch[0], step=arguments.branch[1])
        experiment = open_experiment(arguments, overrides, ["model"], begin)
        branch(experiment, *arguments.branch, lambda: _fingerprint(experiment, _objective(experiment)))
    train(experiment, profile=arguments.profile)
    return 0


def _fingerprint(experiment: Experiment, made: Objective) -> dict[str, Json]:
    return experiment.fingerprint(*_KEYS, *made.keys, **made.facts)


def train(experiment: Experiment, profile: tuple[int, int] | None = None) -> None:
    """Runs the stage `model`. `profile` is as in training.loop.fit."""
    plan_rows(experiment)
    with experiment.leaving_nothing():
        _train(experiment, profile)


@by_first_process
def plan_rows(experiment: Experiment) -> None:
    """Plans rows of the training's lengths once, if `prepare` has not planned them."""
    lengths = sorted({length for _, length in shapes(experiment.config.training).values()}, reverse=True)
    for split in ("train", "validation"):
        folder = experiment.workdir.data / split
        if not (folder / "manifest.json").exists():
            continue
        try:
            for length in lengths if split == "train" else lengths[:1]:
                preparing.plan_rows(folder, load_report(folder), length, leave_out=length < lengths[0])
        except OSError as error:  # finished data may be in a read-only folder
            experiment.say(f"{folder}: {error.strerror}: every process plans its rows again in memory")


def _train(experiment: Experiment, profile: tuple[int, int] | None) -> None:
    config, settings, grammar = experiment.config, experiment.config.training, experiment.grammar
    with about("config.training"):
        selected(config, "only", grammar.vocabulary, experiment.new_ids)
        adapter = lora(config)
        fresh = selected(config, "fresh", grammar.vocabulary, experiment.new_ids) if settings.fresh else None
    if experiment.extends and (first := first_adapter(config, experiment.bundle)) is not None:
        require_rows(first, grammar, trained(config, grammar.vocabulary, experiment.new_ids))
    made = _objective(experiment)
    checkpoints = experiment.checkpoint_folder
    progress = Training("training.steps", settings.steps, partial(steps_in, checkpoints), checkpoints)
    stage = experiment.stage("model", *_KEYS, *made.keys, together=True, training=progress, **made.facts)
    if stage.done:
        return experiment.skip(stage)
    _say_rate(experiment, stage, max(progress.checkpoints(), default=0))
    task = made.task(stage.folder)
    fit(
        task,
        training(config),
        stage.folder,
        mesh=experiment.mesh,
        manifest=grammar.manifest(),
        preview=_preview(experiment) if settings.preview_every else None,
        checkpoint_folder=checkpoints,
        begin=beginning(experiment, task, fresh),
        kept_elsewhere=adapter is not None,
        profile=profile,
        logger=experiment.say,
    )
    best = Checkpoints(experiment.checkpoint_folder, readonly=True).best()
    kept = dict(zip(("best_step", "best_validation_loss"), best, strict=True)) if best else {}
    experiment.finish(stage, {"steps": settings.steps, **kept})


def _objective(experiment: Experiment) -> Objective:
    return _OBJECTIVES[experiment.config.training.objective](experiment)


def _say_rate(experiment: Experiment, stage: Stage, taken: int) -> None:
    """Prints how the learning rate continues after a change of its schedule, because it may rise again."""
    changes = [entry for entry in stage.history if entry["kind"] in DECIDING]
    if not changes or not taken or changes[-1]["step"] != taken:
        return
    now = configs.plain(experiment.config.training)
    old = {field.removeprefix("training."): values[0] for field, values in changes[-1]["changed"].items()}
    rates = [learning_rate(configs.pick(OptimizerConfig, each), each["steps"]) for each in (now | old, now)]
    experiment.say(f"learning rate: {rates[0](taken - 1):.3g} in step {taken}, {rates[1](taken):.3g} in the next")


def _preview(experiment: Experiment) -> Any:
    """A function that draws images for the first held-out prompts that ask for an image; None without a decoder."""
    if draws_none(experiment.image_tokenizer):
        return None
    prompts = []
    for source in experiment.held_out["validation"]:
        for i in range(min(len(source), _PREVIEWS)):
            document = source[i]
            if document.task == "text_to_image":
                prompts.append(document.asked[-1].parts)
    requests = [
        Request(id=str(i), parts=prompt, mode="image", seed=i, image=experiment.filter("image"))
        for i, prompt in enumerate(prompts[:_PREVIEWS])
    ]
    sampling, tokenizer = experiment.config.sampling, for_single(experiment.image_tokenizer)

    adapter = lora(experiment.config)
    whole = (
        jax.jit(partial(merged, adapter, dtype=experiment.model.dtype))
        if adapter is not None
        else lambda params: params
    )

    def preview(step: int, params: Any) -> Mapping[str, np.ndarray]:
        engine = Engine(
            experiment.model, whole(params), experiment.grammar, batch_size=_PREVIEWS, max_length=sampling.max_length
        )
        shown = {}
        for sample in engine.generate(requests):
            for part in sample.document.parts if sample.document else ():
                if isinstance(part, CodesPart):
                    shown[f"sample {sample.request.id}"] = tokenizer.decode(part.codes[None])[0]
        return shown

    return preview
