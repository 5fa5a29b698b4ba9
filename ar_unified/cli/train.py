"""Train the transformer on the token shards, or by rewards of what it draws itself.

Reads data/train and data/validation; with config.training.objective="reward" the sources, whose documents ask, and
draws answers, which config.reward judges (docs/rewards.md). Leaves in the workdir:
  model/checkpoints       Orbax: parameters and optimizer state, each with the vocabulary's manifest; the last few, and
                          that of the lowest validation loss (training.keep_best)
  model/metrics.jsonl     loss and log Z by role, loss by task, bits, norms, rates, attention between text and images;
                          model/tensorboard the same, with sample images
  model/goodput.json      where the wall time of every attempt went
  model/failed_rewards.jsonl   by rewards: every answer that had none, with its prompt and why
  model/history.json      what changed while it was trained, and at which step

What only decides cost (model.remat, training.accumulation, loss.chunk, mesh, log_every, ...) may change whenever the
training is started again. So may training.steps and the schedule, also of a finished training: it goes on. To go on
from a checkpoint in the middle and leave the training as it is, branch it into a workdir of its own:
    ar-unified train --branch WORKDIR:STEP --workdir NEW --config FILE --config.training.steps=N ...
To begin a training of your own with the weights, tokenizers and language of a bundle: --config.init=FOLDER. The config
must describe that model; experiments/folder.py:path=DIR,init=FOLDER takes it from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ar_unified.checkpoint import Checkpoints, steps_in
from ar_unified.data import prepare as preparing
from ar_unified.data.images import NoImages, draws_none
from ar_unified.data.loader import PackedBatches, Phase
from ar_unified.data.prepare import load_report
from ar_unified.errors import about
from ar_unified.experiment import by_reward
from ar_unified.experiment import config as configs
from ar_unified.experiment.branch import branch
from ar_unified.experiment.changes import Training
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.settings import phases, selected, training
from ar_unified.experiment.start import by_first_process, open_experiment
from ar_unified.history import DECIDING
from ar_unified.language.document import CodesPart
from ar_unified.model.transformer import Params
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.request import Request
from ar_unified.training.loop import fit
from ar_unified.training.optimizer import OptimizerConfig, learning_rate
from ar_unified.training.selection import Selection
from ar_unified.training.tasks import TransformerTask
from ar_unified.workdir import Stage

_VALIDATION_BATCHES = 8
_PREVIEWS = 8
_KEYS = ("model", "loss", "training", "mesh")


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    experiment = open_experiment(arguments, overrides, ["model"])
    if arguments.branch:
        branch(
            experiment,
            *arguments.branch,
            lambda: _fingerprint(experiment),
        )
    train(experiment, profile=arguments.profile)
    return 0


def _fingerprint(experiment: Experiment) -> dict[str, Any]:
    """Of the stage."""
    road = OBJECTIVES[experiment.config.training.objective](experiment)
    return experiment.fingerprint(*_KEYS, *road.keys, **_facts(experiment, road.facts))


def train(experiment: Experiment, profile: tuple[int, int] | None = None) -> None:
    """Stage model; `profile`: of training.loop.fit."""
    plan_rows(experiment)
    with experiment.leaving_nothing():
        _train(experiment, profile)


@by_first_process
def plan_rows(experiment: Experiment) -> None:
    """Where `prepare` has not planned rows of this length, or an earlier one has planned none, it is done once here."""
    for split in ("train", "validation"):
        folder = experiment.workdir.data / split
        if not (folder / "manifest.json").exists():
            continue
        try:
            preparing.plan_rows(folder, load_report(folder), experiment.config.training.sequence_length)
        except OSError as error:  # what is finished may lie where nothing can be written
            experiment.say(f"{folder}: {error.strerror}: every start of a process plans its rows anew, in memory")


class _Road(NamedTuple):
    """From an experiment to what its objective trains.

    Attributes:
        keys: sections of the config that decide the result besides _KEYS. facts: what else decides it.
        task: called with the stage's folder when the stage is open.
    """

    keys: tuple[str, ...]
    facts: dict[str, Any]
    task: Callable[[Path], TransformerTask]


def _by_likelihood(experiment: Experiment) -> _Road:
    """Documents of the shards, every token of them."""
    batches = _batches(experiment)
    return _Road((), batches.order, lambda _: _likelihood_task(experiment, batches))


def _by_reward(experiment: Experiment) -> _Road:
    """Answers that the model draws itself."""

    def task(folder: Path) -> TransformerTask:
        experiment.say(by_reward.told(experiment))
        return by_reward.task(experiment, folder)

    return _Road(by_reward.KEYS, by_reward.facts(experiment), task)


OBJECTIVES: dict[str, Callable[[Experiment], _Road]] = {"likelihood": _by_likelihood, "reward": _by_reward}


def _train(experiment: Experiment, profile: tuple[int, int] | None) -> None:
    config, settings, grammar = experiment.config, experiment.config.training, experiment.grammar
    with about("config.training"):
        selected(config, "only", grammar.vocabulary)
        fresh = selected(config, "fresh", grammar.vocabulary) if settings.fresh else None
    road = OBJECTIVES[settings.objective](experiment)
    checkpoints = experiment.checkpoint_folder
    progress = Training("training.steps", settings.steps, partial(steps_in, checkpoints), checkpoints)
    stage = experiment.stage(
        "model", *_KEYS, *road.keys, together=True, training=progress, **_facts(experiment, road.facts)
    )
    if stage.done:
        return experiment.skip(stage)
    _say_rate(experiment, stage, max(progress.checkpoints(), default=0))
    task = road.task(stage.folder)
    fit(
        task,
        training(config),
        stage.folder,
        mesh=experiment.mesh,
        manifest=grammar.manifest(),
        preview=_preview(experiment) if settings.preview_every else None,
        checkpoint_folder=checkpoints,
        begin=_begin(experiment, task, fresh),
        profile=profile,
        logger=experiment.say,
    )
    best = Checkpoints(experiment.checkpoint_folder, readonly=True).best()
    kept = dict(zip(("best_step", "best_validation_loss"), best, strict=True)) if best else {}
    experiment.finish(stage, {"steps": settings.steps, **kept})


def _likelihood_task(experiment: Experiment, batches: PackedBatches) -> TransformerTask:
    config, settings, grammar = experiment.config, experiment.config.training, experiment.grammar
    for name, facts in batches.describe().items():
        shares = ", then ".join(f"{share:.1%}" for share in facts["shares"])
        experiment.say(f"{name}: {facts['rows']} rows an epoch, {facts['fill']:.1%} full, {shares} of the rows")
    validation = []
    folder = experiment.workdir.data / "validation"
    held_out = load_report(folder).sources if folder.exists() else {}
    if any(source.documents for source in held_out.values()):
        both = any(phase.flip_pairs for phase in batches.phases)  # then both ways weigh alike
        as_it_stands = Phase(flip_pairs=0.5 if both else 0.0, condition_dropout=0.0)
        rows = dict(batch_size=settings.batch_size, sequence_length=settings.sequence_length)
        stream = PackedBatches(folder, grammar, phases=[as_it_stands], **rows)
        validation = [stream.batch(step) for step in range(_VALIDATION_BATCHES)]
    else:
        experiment.say("no document is held out: training goes on without a validation loss")
    return TransformerTask(
        experiment.model,
        grammar.vocabulary,
        batches.batch,
        validation,
        role_weights=configs.plain(config.loss.roles),
        task_weights=configs.plain(config.loss.tasks),
        prompt_weight=config.loss.prompt,
        split=grammar.layout.split(grammar.vocabulary, config.loss.softmax),
        z_loss=config.loss.z_loss,
        text_bytes=experiment.text_tokenizer.piece_bytes,
        chunk=config.loss.chunk,
        attention_share=settings.attention_share,
        code_vectors=_code_vectors(experiment),
        only=tuple(settings.only),
    )


def _facts(experiment: Experiment, of_objective: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the trained model beside the config."""
    init = {} if experiment.bundle is None else {"init": experiment.bundle.hash}
    facts = dict(manifest=experiment.grammar.manifest(), mixture=experiment.mixture())
    return facts | dict(of_objective) | init


def _batches(experiment: Experiment) -> PackedBatches:
    config, settings = experiment.config, experiment.config.training
    folder = experiment.workdir.data / "train"
    if experiment.workdir.reader:
        experiment.workdir.await_file(folder / "manifest.json")
    return PackedBatches(
        folder,
        experiment.grammar,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        seed=config.seed,
        phases=phases(settings, experiment.mixture()),
    )


def _begin(experiment: Experiment, task: TransformerTask, fresh: Selection | None) -> Callable[[Params], Params] | None:
    """Gives the bundle's parameters, if config.init names one, with what is to begin at random in its place."""
    bundle = experiment.bundle
    if bundle is None:
        return None

    def begin(abstract: Params) -> Params:
        experiment.say(f"model: begins with the weights of {bundle.folder}")
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        params = bundle.params(places, "float32")
        if fresh is None:
            return params
        experiment.say(f"model: at random begin {', '.join(experiment.config.training.fresh)}")
        key = jax.random.key(experiment.config.seed)
        renewed = jax.jit(
            lambda params: fresh.put(params, fresh.take(task.init(key))), donate_argnums=0, out_shardings=places
        )
        return renewed(params)

    return begin


def _say_rate(experiment: Experiment, stage: Stage, taken: int) -> None:
    """What a schedule that has just changed makes of the learning rate, which may rise again."""
    changes = [entry for entry in stage.history if entry["kind"] in DECIDING]
    if not changes or not taken or changes[-1]["step"] != taken:
        return
    now = configs.plain(experiment.config.training)
    old = {field.removeprefix("training."): values[0] for field, values in changes[-1]["changed"].items()}
    rates = [learning_rate(configs.pick(OptimizerConfig, each), each["steps"]) for each in (now | old, now)]
    experiment.say(f"learning rate: {rates[0](taken - 1):.3g} in step {taken}, {rates[1](taken):.3g} in the next")


def _code_vectors(experiment: Experiment) -> np.ndarray | None:
    """For `training.code_embedding_init`; None: random rows."""
    how, tokenizer = experiment.config.training.code_embedding_init, experiment.image_tokenizer
    drawn = how == "random" or experiment.bundle is not None
    return None if drawn or isinstance(tokenizer, NoImages) else tokenizer.vectors()


def _preview(experiment: Experiment) -> Any:
    """A function that draws images for the first held-out prompts that ask for one; None: there is no decoder."""
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
    sampling = experiment.config.sampling

    def preview(step: int, params: Any) -> Mapping[str, np.ndarray]:
        engine = Engine(
            experiment.model, params, experiment.grammar, batch_size=_PREVIEWS, max_length=sampling.max_length
        )
        shown = {}
        for sample in engine.generate(requests):
            for part in sample.document.parts if sample.document else ():
                if isinstance(part, CodesPart):
                    shown[f"sample {sample.request.id}"] = experiment.image_tokenizer.decode(part.codes[None])[0]
        return shown

    return preview
