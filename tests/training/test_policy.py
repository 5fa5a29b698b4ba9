"""The pure functions of GRPO are compared with exact enumeration, and with a transcription in NumPy."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.training.policy import (
    PolicyConfig,
    divergence,
    group_advantages,
    token_objective,
    token_weights,
)

B, T, G = 6, 5, 3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def loss(config, logp, old, advantage, reference, drawn, kept):
    objective, _ = token_objective(config, logp, old, advantage, reference)
    weight, total = token_weights(config, drawn, kept)
    return jnp.sum(weight * objective) / total


# ---- the gradient is the policy gradient ------------------------------------------------------------------------


def log_probability(theta, answer):
    """Answers of two tokens from a vocabulary of two. The second token's distribution depends on the first. theta: [3,
    2]."""
    logp = jax.nn.log_softmax(theta, axis=-1)
    return jnp.stack([logp[0, answer[0]], logp[1 + answer[0], answer[1]]])


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
def test_the_expected_gradient_is_that_of_the_expected_reward(normalisation):
    """The expectation over all groups of two-token answers. The mean of a group includes the sample's own reward, so a
    group of size G gives (1 - 1/G) of the gradient. A step's loss is a mean over the two tokens."""
    answers = np.array(list(itertools.product((0, 1), repeat=2)))
    rewards = np.array([0.3, 1.0, -2.0, 0.5])
    theta = jnp.array([[0.2, -0.4], [1.0, 0.1], [-0.3, 0.8]])
    config = PolicyConfig(group_size=G, scale_rewards=False, normalisation=normalisation, drop_flat=False)

    def of_answers(theta):
        return jax.vmap(log_probability, (None, 0))(theta, answers)

    def expected_reward(theta):
        return jnp.sum(jnp.exp(of_answers(theta).sum(axis=1)) * rewards)

    def of_group(theta, group, advantage):
        logp, there = of_answers(theta)[group], jnp.ones((G, 2), bool)
        return loss(config, logp, jax.lax.stop_gradient(logp), advantage, None, there, there[:, 0])

    groups = np.array(list(itertools.product(range(4), repeat=G)))
    weight = np.exp(np.asarray(of_answers(theta)).sum(axis=1))[groups].prod(axis=1)
    advantages, _, _ = group_advantages(rewards[groups], False)
    each = jax.jit(jax.vmap(jax.grad(of_group), (None, 0, 0)))(theta, groups, advantages)
    found = np.einsum("n,nij->ij", weight, each)
    np.testing.assert_allclose(found, -(1 - 1 / G) / 2 * jax.grad(expected_reward)(theta), atol=1e-6)
    assert np.abs(found).max() > 0.05


# ---- against a transcription ------------------------------------------------------------------------------------


def transcribed(config, logp, old, advantage, reference, drawn, kept):
    """The policy loss, computed token by token."""
    sums, total, rows = [], 0, 0
    for i in range(B):
        terms = []
        for t in range(T):
            if not (drawn[i, t] and kept[i]):
                continue
            ratio = np.exp(logp[i, t] - old[i, t])
            bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            term = -min(ratio * advantage[i], bounded * advantage[i])
            if reference is not None:
                r = np.exp(reference[i, t]) / np.exp(logp[i, t])
                term += config.kl * (r - np.log(r) - 1)
            terms.append(term)
        total += len(terms)
        rows += bool(terms)
        mean = config.normalisation == "sequence" and terms
        sums.append(sum(terms) / len(terms) if mean else sum(terms))
    return sum(sums) / {"token": total, "sequence": rows, "constant": rows * T}[config.normalisation]


CASES = {
    "token": PolicyConfig(),
    "sequence": PolicyConfig(normalisation="sequence"),
    "constant": PolicyConfig(normalisation="constant"),
    "asymmetric": PolicyConfig(clip_low=0.1, clip_high=0.5),
    "only_below": PolicyConfig(clip_low=0.05, clip_high=100.0),
    "kl": PolicyConfig(kl=0.3),
    "kl_sequence": PolicyConfig(kl=0.3, normalisation="sequence", clip_high=0.28),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_a_transcription(name):
    config = CASES[name]
    rng = np.random.default_rng(0)
    logp, reference = -rng.uniform(0.1, 3.0, (2, B, T))
    old = logp + rng.normal(0, 0.4, (B, T))
    advantage = rng.normal(0, 1, B)
    drawn = rng.random((B, T)) < 0.7
    drawn[1] = False
    kept = np.array([True, True, False, True, True, True])
    more = (old, advantage, reference if config.kl else None, drawn, kept)
    found, gradient = jax.jit(jax.value_and_grad(lambda logp: loss(config, logp, *map(_array, more))))(logp)
    assert found == pytest.approx(transcribed(config, logp, *more), abs=1e-6)
    step, moved = 1e-6, np.zeros((B, T))
    for i, t in np.ndindex(B, T):
        there = [logp.copy(), logp.copy()]
        there[0][i, t] += step
        there[1][i, t] -= step
        moved[i, t] = (transcribed(config, there[0], *more) - transcribed(config, there[1], *more)) / (2 * step)
    np.testing.assert_allclose(gradient, moved, atol=1e-6)
    assert np.abs(moved).max() > 0.01


def _array(x):
    return None if x is None else jnp.asarray(x)


def test_what_the_clip_holds_back_is_told():
    logp, old = jnp.log(jnp.array([[1.5, 1.1, 0.5, 1.5]])), jnp.zeros((1, 4))
    for advantage, expected in ((1.0, [True, False, False, True]), (-1.0, [False, False, True, False])):
        _, held = token_objective(PolicyConfig(), logp, old, jnp.array([advantage]), None)
        assert held.tolist() == [expected]


def test_advantages_of_groups():
    rewards = np.array([[0.0, 1.0, 1.0, 0.0], [0.1, 0.1, 0.1, 0.1], [1.0, 2.0, 3.0, 6.0]])
    plain, deviation, flat = group_advantages(rewards, scale=False)
    scaled, _, _ = group_advantages(rewards, scale=True)
    np.testing.assert_allclose(plain, [[-0.5, 0.5, 0.5, -0.5], [0, 0, 0, 0], [-2, -1, 0, 3]])
    np.testing.assert_allclose(scaled[[0, 2]], plain[[0, 2]] / rewards[[0, 2]].std(axis=1, keepdims=True))
    assert not scaled[1].any() and not deviation[1].any()
    assert flat[:, 0].tolist() == [False, True, False]


def test_the_divergence_is_one_in_the_mean_and_never_negative():
    """The mean over the policy of k3 is KL(policy || reference)."""
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.5, 0.3])
    found = divergence(jnp.log(p), jnp.log(q))
    assert (np.asarray(found) >= 0).all()
    assert float((p * found).sum()) == pytest.approx((p * np.log(p / q)).sum())


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(group_size=1), "group_size: expected at least 2, found 1"),
        (dict(normalisation="tokens"), "did you mean 'token'"),
        (dict(clip_low=1.5), "clip_low: expected a number in"),
        (dict(kl=-0.1), "kl: expected at least 0"),
        (dict(minibatches=0), "minibatches: expected at least 1"),
    ],
)
def test_a_wrong_setting_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PolicyConfig(), **change)
