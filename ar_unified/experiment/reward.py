"""The objective "reward". Makes its task, and the engine that samples answers, from a config and a workdir."""

from __future__ import annotations

from pathlib import Path

import jax

from ar_unified.data.images import draws_none
from ar_unified.errors import UserError, about
from ar_unified.experiment import config as configs
from ar_unified.experiment import objective, settings
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.objective import Objective
from ar_unified.experiment.prompts import Prompts
from ar_unified.experiment.rollouts import Rollouts, fitting
from ar_unified.manifests import Json
from ar_unified.rewards.opening import open_reward
from ar_unified.sampling.engine import Engine
from ar_unified.training.policy import PolicyTask


def reward(experiment: Experiment) -> Objective:
    """Learns from answers that the model draws, judged by the reward in config.reward."""

    def task(folder: Path) -> PolicyTask:
        experiment.say(_told(experiment))
        return _task(experiment, folder)

    return Objective(objective.facts(experiment, _facts(experiment)), ("reward",), task)


def _facts(experiment: Experiment) -> dict[str, Json]:
    """What decides the trained policy in addition to the config: the prompts, their order, and, with guidance, the
    unconditional context."""
    sampling = experiment.config.sampling
    compared = dict(context=sampling.context, negative_prompt=sampling.negative_prompt)
    guided = compared if experiment.config.reward.guidance != 1 else {}
    return dict(sources=experiment.fingerprints(), resize=experiment.resize.kind, **experiment.resize.way, **guided)


def _task(experiment: Experiment, folder: Path) -> PolicyTask:
    """The task, whose batches are answers drawn by the model. A file in `folder` lists answers without a reward."""
    config, sampling = experiment.config, experiment.config.sampling
    tokenizer, grammar = experiment.image_tokenizer, experiment.grammar
    drawing, policy, rewarding = settings.drawing(config), settings.policy(config), settings.rewarding(config)
    if grammar.vocabulary.codebook_size and drawing.mode != "text" and (why := draws_none(tokenizer)):
        raise UserError(f"config.reward: answers may have images, and {why}")
    length = config.training.sequence_length
    with about("config.sampling"):
        engine = Engine(
            experiment.model,
            None,
            grammar,
            batch_size=sampling.batch_size,
            max_length=length,
            kv_dtype=sampling.kv_dtype or None,
            weights_dtype=sampling.weights_dtype or None,
            mesh=experiment.decoding_mesh,
            logprobs=True,
        )
    compared = dict(context=sampling.context, negative_prompt=sampling.negative_prompt)
    drawn = drawing.request("drawing", **compared)
    shares = list(experiment.mixture().values())
    prompts = Prompts(
        experiment.train, shares, drawn, fitting(engine, length), tokenizer, experiment.resize, config.seed
    )
    with about("config.reward.function"):
        judge = open_reward(rewarding)
    number = f"-{jax.process_index():05d}" if jax.process_index() else ""
    with about("config.training"):
        batch = Rollouts(
            prompts,
            engine,
            tokenizer,
            judge,
            rewarding,
            policy,
            mesh=experiment.mesh,
            batch_size=config.training.batch_size,
            length=length,
            contexts=drawn.contexts,
            chunk=config.loss.chunk,
            lora=settings.lora(config),
            failed=folder / f"failed_rewards{number}.jsonl",
            say=experiment.say,
        )
    shared = objective.task_settings(experiment) | {"attention_share": False}
    return PolicyTask(batch=batch, policy=policy, **shared)


def _told(experiment: Experiment) -> str:
    """A line that says what is drawn and judged."""
    found = configs.plain(experiment.config.reward)
    prompts = experiment.config.training.batch_size // found["group_size"]
    return (
        f"reward {found['function']}: {found['group_size']} answers to each of {prompts} prompts a step, at "
        f"temperature {found['temperature']:g}"
    )
