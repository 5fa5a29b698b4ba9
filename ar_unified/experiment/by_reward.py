"""The objective "reward" of an experiment: its task and its drawing, from a config and a workdir."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from ar_unified.data.images import draws_none
from ar_unified.errors import UserError, about
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.prompts import Prompts
from ar_unified.experiment.rollouts import Rollouts, fitting
from ar_unified.rewards.opening import open_reward
from ar_unified.sampling.engine import Engine
from ar_unified.training.policy import PolicyTask

KEYS = ("reward",)  # sections that this objective reads and others do not


def facts(experiment: Experiment) -> dict[str, Any]:
    """What decides the trained policy beside the config: the prompts, in their order."""
    sampling = experiment.config.sampling
    compared = dict(context=sampling.context, negative_prompt=sampling.negative_prompt)
    guided = compared if experiment.config.reward.guidance != 1 else {}
    return dict(sources=experiment.fingerprints(), resize=experiment.resize.kind, **guided)


def task(experiment: Experiment, folder: Path) -> PolicyTask:
    """The task, whose batches are drawn; answers without a reward are named in a file of `folder`."""
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
        reward = open_reward(rewarding)
    number = f"-{jax.process_index():05d}" if jax.process_index() else ""
    with about("config.training"):
        batch = Rollouts(
            prompts,
            engine,
            tokenizer,
            reward,
            rewarding,
            policy,
            mesh=experiment.mesh,
            batch_size=config.training.batch_size,
            length=length,
            contexts=drawn.contexts,
            chunk=config.loss.chunk,
            failed=folder / f"failed_rewards{number}.jsonl",
            say=experiment.say,
        )
    return PolicyTask(
        experiment.model,
        grammar.vocabulary,
        batch,
        chunk=config.loss.chunk,
        attention_share=False,
        only=tuple(config.training.only),
        policy=policy,
    )


def told(experiment: Experiment) -> str:
    """What is drawn and judged, in a line."""
    found = configs.plain(experiment.config.reward)
    prompts = experiment.config.training.batch_size // found["group_size"]
    return (
        f"reward {found['function']}: {found['group_size']} answers to each of {prompts} prompts a step, at "
        f"temperature {found['temperature']:g}"
    )
