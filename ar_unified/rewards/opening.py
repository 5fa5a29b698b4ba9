"""Opens a reward by its name."""

from __future__ import annotations

from ar_unified.errors import UserError, nearest
from ar_unified.rewards import command, functions, scores, shipped
from ar_unified.rewards.reward import Reward, RewardConfig

FORMS = 'the name of a shipped reward, "module:function", "command:PROGRAM ARGUMENTS" or "scores:FILE"'


def open_reward(config: RewardConfig) -> Reward:
    """Opens the reward that a config names. Raises UserError that says what is wrong or missing."""
    kind, colon, rest = config.function.partition(":")
    if not config.function:
        raise UserError(f"expected {FORMS}; found none")
    if not colon:
        if kind not in shipped.REWARDS:
            known = ", ".join(shipped.REWARDS)
            raise UserError(f"expected {FORMS}; found {kind!r}{nearest(kind, shipped.REWARDS)}. Shipped: {known}")
        return functions.guarded(shipped.REWARDS[kind], config.timeout)
    if not rest:
        raise UserError(f"expected {FORMS}; found {config.function!r}")
    if kind == "command":
        return command.Command(rest, config.timeout)
    if kind == "scores":
        return scores.Scores(rest)
    return functions.guarded(functions.named(kind, rest), config.timeout)
