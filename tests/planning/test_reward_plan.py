"""The plan of a training by rewards has the policy's step, its reference and the sampler's weights."""

from __future__ import annotations

from dataclasses import replace

from ar_unified.planning.plan import make_plan
from ar_unified.planning.targets import parse_target
from ar_unified.training.policy import PolicyConfig
from tests.planning.test_plan import SMALL, quiet


def test_a_training_by_rewards_is_planned_with_its_reference_and_its_sampler():
    plain, rewarded = (
        make_plan(replace(SMALL, policy=policy, drawn_contexts=2), parse_target("h200:8"), say=quiet)
        for policy in (PolicyConfig(group_size=4), PolicyConfig(group_size=4, kl=0.1))
    )
    assert plain["fits"] and rewarded["fits"]
    parts, more = (plan["programs"][0]["memory"]["parts"] for plan in (plain, rewarded))
    assert "reference" not in parts and more["reference"] == more["parameters"]  # both are divided over fsdp
    # Each device has all of the sampler's weights in the compute dtype: on two fsdp devices that is twice the
    # parameters.
    assert abs(parts["held"] / parts["parameters"] - 2) < 0.3
    assert rewarded["programs"][0]["flops"]["executed"] > plain["programs"][0]["flops"]["executed"]
    likelihood = make_plan(SMALL, parse_target("h200:8"), say=quiet)["programs"][0]
    assert "held" not in likelihood["memory"]["parts"]
    assert plain["programs"][0]["tokens"] == 2 * likelihood["tokens"]  # a row for each context
