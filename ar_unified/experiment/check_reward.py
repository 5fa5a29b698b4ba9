"""Checks whether the objective "reward" of a config can be trained; `check` calls it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ml_collections import ConfigDict

from ar_unified.experiment import settings
from ar_unified.experiment.problems import Problems
from ar_unified.rewards.opening import open_reward

# keys of config.training whose steps must fall between two rounds of sampling
_AT_BORDERS = ("steps", "checkpoint_every", "keep_every")


def check_reward(config: ConfigDict, problems: Problems, stages: Collection[str]) -> None:
    """Notes all problems. Each single setting is always checked; combinations are checked only if the objective is
    "reward".
    """
    names = [*config.reward.keys()]
    before = len(problems.lines)
    parts: tuple[Callable[[ConfigDict], object], ...] = (settings.policy, settings.rewarding, settings.drawing)
    for part in parts if config.training.objective == "reward" else parts[1:]:
        with problems.of("reward", [*names, "batch_size"]):
            part(config)
    if config.training.objective != "reward" or len(problems.lines) > before:
        return
    for key in ("mean", "softmax"):
        if config.loss[key] != "joint":
            found = config.loss[key]
            why = "expected joint with training.objective 'reward', whose answers are drawn from one softmax"
            problems.say(f"loss.{key}", f"{why}; found {found!r}")
    every = settings.policy(config).steps
    for key in _AT_BORDERS:
        if config.training[key] % every:
            problems.say(
                f"training.{key}",
                f"expected a multiple of the {every} steps for one round of sampling (config.reward.epochs x "
                f"minibatches); found {config.training[key]}",
            )
    if "model" not in stages:
        return
    if config.reward.function.startswith("scores:"):
        why = "expected no file of scores, because a file has no scores for the answers that a training draws"
        problems.say("reward.function", why)
        return
    with problems.of("reward.function"):
        open_reward(settings.rewarding(config))
