"""GRPO in a real training: groups drawn in the training job, rewards that fail, and a training that is killed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_unified.errors import UserError
from ar_unified.experiment import config as configs
from ar_unified.experiment import rollouts as module
from ar_unified.experiment import settings
from ar_unified.experiment.check import check
from ar_unified.experiment.rollouts import DrawingConfig, require_groups
from ar_unified.metrics import read_metrics
from ar_unified.model.lora import LoraConfig
from ar_unified.model.lora import init as init_adapter
from ar_unified.model.quantized import Quantized
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch
from ar_unified.rewards.reward import RewardConfig, RewardFailed
from ar_unified.training.optimizer import OptimizerConfig
from ar_unified.training.policy import PolicyConfig, PolicyTask, divergence, log_probabilities
from ar_unified.training.step import gradients
from tests import bundles
from tests.experiment import rewarded
from tests.parallel.job import environment, free_port
from tests.sampling import tiny

ROOT = Path(__file__).resolve().parents[2]


class Killed(Exception):
    pass


def dying(batch, at):
    """Kills the run when that step draws."""
    base: Any = type(batch)
    call = base.__call__

    class Dying(base):
        def __call__(self, step, params):
            if step == at:
                raise Killed
            return call(self, step, params)

    batch.__class__ = Dying
    return batch


def same_bits(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def params():
    return jax.device_put(rewarded.weights(), jax.devices()[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, rewarded.run(folder, rewarded.rollouts())


def test_the_sampler_and_the_trainer_agree_and_the_metrics_say_it(whole):
    rows = read_metrics(whole[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert 0 < row["sampler_trainer/mean"] < row["sampler_trainer/max"] <= 1e-5
        assert 0 < row["reward"] < 1 and row["entropy"] > 0 and row["drawn_tokens"] == 6
        assert row["groups/failed"] == row["clipped"] == 0
        assert "kl" not in row


def test_in_bfloat16_the_difference_is_measured_and_bounded(params):
    config = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    batch = rewarded.rollouts(config=config)(0, params)
    task = rewarded.task(lambda *_: batch, config=config)
    told = task.summary(jax.device_get(jax.jit(lambda p, b: task.loss(p, {}, b, None)[2])(params, batch)))
    assert told["sampler_trainer/mean"] <= told["sampler_trainer/max"] < 0.1  # differences by rounding


@pytest.mark.parametrize("base_dtype", ["float32", "int8"])
def test_an_adapter_is_part_of_the_policy(params, base_dtype):
    """The sampler merges the adapter into the weights. The trainer keeps it separate, and trains only the adapter."""
    lora = LoraConfig(rank=2, alpha=4.0, base_dtype=base_dtype)
    fresh = init_adapter(tiny.CONFIG, lora, jax.random.key(1))
    adapted = params | {"lora": jax.tree.map(lambda x: x + 0.05, fresh)}
    adapted = rewarded.task(None, lora=lora).selection(adapted).fixed(adapted, base_dtype)
    assert isinstance(adapted["layers"]["mlp"]["up"], Quantized) == (base_dtype == "int8")
    batch, without = rewarded.rollouts(lora=lora)(0, adapted), rewarded.rollouts()(0, params)
    assert (np.asarray(batch.sampled) != np.asarray(without.sampled)).any()
    task = rewarded.task(lambda *_: batch, lora=lora)
    mesh, key = rewarded.one(), jax.random.key(0)
    compute = jax.jit(lambda p, b: gradients(task, p, {}, b, key, accumulation=1, mesh=mesh)[1:])
    found, metrics = jax.device_get(compute(adapted, batch))
    told = task.summary(metrics)
    assert 0 < told["sampler_trainer/mean"] <= told["sampler_trainer/max"] <= 1e-5
    assert found.keys() == {"lora"} and max(np.abs(leaf).max() for leaf in jax.tree.leaves(found)) > 1e-4


@pytest.mark.exact
def test_killed_is_uninterrupted(whole, tmp_path):
    with pytest.raises(Killed):
        rewarded.run(tmp_path, dying(rewarded.rollouts(), at=5))
    same_bits(rewarded.run(tmp_path, rewarded.rollouts()), whole[1])


@pytest.mark.exact
@pytest.mark.slow
def test_a_drawing_of_several_steps_is_resumed_bit_for_bit(tmp_path):
    """The training has guidance and a reference. The checkpoint has the weights with which the training began."""
    policy = PolicyConfig(group_size=4, kl=0.1, epochs=2, minibatches=2, clip_high=0.28)

    def rollouts():
        return rewarded.rollouts(policy=policy, drawing=DrawingConfig(guidance=2.0, temperature=1.2))

    changes = dict(policy=policy, steps=24, checkpoint_every=4)
    expected = rewarded.run(tmp_path / "whole", rollouts(), **changes)
    with pytest.raises(Killed):
        rewarded.run(tmp_path / "killed", dying(rollouts(), at=22), **changes)
    same_bits(rewarded.run(tmp_path / "killed", rollouts(), **changes), expected)
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all(row["sampler_trainer/max"] <= 1e-5 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl"] > 1e-4
    assert max(row["clipped"] for row in rows) > 0
    first, last = (np.mean([row["reward"] for row in some]) for some in (rows[:8], rows[-8:]))
    assert last > first + 0.05  # the reward rises


def test_the_reference_of_an_adapter_is_an_adapter(params):
    """There is no second copy of arrays that no step changes, and the divergence is still from the whole first
    model."""
    lora = LoraConfig(rank=2)
    policy = PolicyConfig(group_size=4, kl=0.1)
    whole = params | {"lora": init_adapter(tiny.CONFIG, lora, jax.random.key(1))}
    batch = rewarded.rollouts(lora=lora)(0, whole)
    task = rewarded.task(lambda *_: batch, policy=policy, lora=lora)
    state = task.init_state(whole)
    assert state["reference"].keys() == {"lora"}
    axes = task.state_axes(whole, state)
    # Raises an error unless both trees have the same structure.
    jax.tree.map(lambda leaf, names: None, state, axes, is_leaf=lambda x: isinstance(x, tuple))
    moved = whole | {"lora": jax.tree.map(lambda x: x + 0.05, whole["lora"])}
    logp, first = (log_probabilities(tiny.CONFIG, 64, each, batch, lora) for each in (moved, whole))
    expected = float(np.mean(np.asarray(divergence(logp, first))[np.asarray(batch.drawn)]))
    found = task.summary(jax.device_get(task.loss(moved, state, batch, None)[2]))
    assert found["kl"] == pytest.approx(expected, rel=1e-5) and expected > 1e-4
    assert task.summary(jax.device_get(task.loss(whole, state, batch, None)[2]))["kl"] == 0


@pytest.mark.exact
@pytest.mark.slow
def test_loss_and_gradient_are_the_same_on_any_mesh(params):
    policy = PolicyConfig(group_size=4, kl=0.1)
    batch = jax.device_get(rewarded.rollouts(policy=policy, drawing=DrawingConfig(guidance=2.0))(0, params))
    task = PolicyTask(tiny.CONFIG, tiny.GRAMMARS["grid"].vocabulary, lambda *_: batch, chunk=64, policy=policy)
    found = []
    for axes in ({}, dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, context=2)):
        mesh = make_mesh(axes, jax.devices()[: 8 if axes else 1])
        state = {"reference": jax.tree.map(lambda x: x * 0.9, jax.device_get(params))}
        with jax.set_mesh(mesh):
            step = jax.jit(
                lambda p, s, b, mesh=mesh: gradients(task, p, s, b, jax.random.key(0), accumulation=1, mesh=mesh)
            )
            found.append(jax.device_get(step(jax.device_get(params), state, place_batch(mesh, batch))[:2]))
    for other in found[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), other, found[0])
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(found[0][1])) > 1e-3


def test_without_the_advantage_nothing_is_learned(params):
    """The gradient comes from the advantages: it is zero without them, and negated if they are negated."""
    batch = rewarded.rollouts()(0, params)
    task = rewarded.task(lambda *_: batch)

    def gradient(advantage):
        changed = dataclasses.replace(batch, advantage=advantage)
        return jax.grad(lambda p: task.loss(p, {}, changed, None)[0])(params)

    found, none, opposite = (
        jax.device_get(gradient(x)) for x in (batch.advantage, 0 * batch.advantage, -batch.advantage)
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(found)) > 1e-3
    assert not any(leaf.any() for leaf in jax.tree.leaves(none))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, -y, atol=1e-6), found, opposite)


def test_any_number_of_processes_draws_the_same_batch(params, monkeypatch):
    batch = rewarded.rollouts()(3, params)
    monkeypatch.setattr(module, "place_batch", lambda mesh, batch, part: batch)
    parts = []
    for index in range(2):
        monkeypatch.setattr(module, "batch_part", lambda mesh, rows, index=index: (index, 2))
        parts.append(rewarded.rollouts()(3, params))
    jax.tree.map(lambda x, a, b: np.testing.assert_array_equal(x, np.concatenate([a, b])), batch, *parts)
    with pytest.raises(ValueError, match=r"a multiple of 4 .* for each of 8 processes, found 16"):
        require_groups(rewarded.POLICY, 16, 8)


@pytest.mark.exact
@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The weights are divided over both processes, and each process' sampler gets all of them. Each draws its own
    groups."""
    policy = dataclasses.replace(rewarded.POLICY, epochs=2)
    rewarded.run(tmp_path / "one", rewarded.rollouts(policy=policy), policy, steps=4)
    address = f"localhost:{free_port()}"
    command = [sys.executable, rewarded.__file__, str(tmp_path / "two"), address, "2"]
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    both = [subprocess.Popen([*command, str(i)], env=environment(), **pipes) for i in range(2)]
    said = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for mine, theirs in zip(one, two, strict=True):
        for name in ("reward", "loss", "grad_norm", "entropy", "sampler_trainer/mean"):
            assert theirs[name] == pytest.approx(mine[name], rel=2e-2 if "trainer" in name else 1e-4, abs=1e-6), name
        assert theirs["sampler_trainer/max"] <= 1e-5


def test_a_guided_sample_has_its_image_in_the_same_columns_of_both_contexts(params):
    batch = jax.device_get(rewarded.rollouts(drawing=DrawingConfig(guidance=3.0))(0, params))
    image = np.repeat(batch.drawn[:, None], 2, axis=1)
    np.testing.assert_array_equal(batch.tokens[:, 0, 1:][image[:, 0, :-1]], batch.tokens[:, 1, 1:][image[:, 1, :-1]])
    assert (batch.mix.transpose(0, 2, 1)[batch.drawn] == [3.0, -2.0]).all()
    assert (batch.mix[:, 0][~batch.drawn] == 1).all() and not batch.mix[:, 1][~batch.drawn].any()


# ---- rewards that fail ------------------------------------------------------------------------------------------


def failing(prompt, answer):
    """A reward that raises for one prompt, hangs for another, and is not a number for a third."""
    number = prompt.meta["number"]
    if answer.meta["sample"] == 1:
        if number == 0:
            raise RuntimeError("no such thing")
        if number == 1:
            time.sleep(60)
        if number == 2:
            return float("nan")
    return rewarded.dark(prompt, answer)


def test_a_reward_that_raises_hangs_or_is_no_number_costs_its_group(params, tmp_path):
    lines, file = [], tmp_path / "failed.jsonl"
    settings = dict(batch_size=40, failed=file, say=lines.append, rewarding=RewardConfig(function="x", timeout=0.2))
    batch = jax.device_get(rewarded.rollouts(reward=failing, **settings)(0, params))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    reasons = {row["reason"] for row in rows}
    expected = {
        "RuntimeError: no such thing",
        "the function returned nothing within 0.2 s",
        "expected a finite number, found nan",
    }
    assert reasons == expected and {row["sample"] for row in rows} == {1}
    failed = ~batch.scored.reshape(10, 4)
    assert (failed == failed[:, :1]).all() and failed[:, 0].sum() == len(rows) >= 3
    assert not batch.advantage[~batch.scored].any() and batch.advantage[batch.scored].any()
    assert len(lines) == 1 and f"{len(rows)} of 40 answers have no reward; the first, sample 1 of prompt 'd" in lines[0]
    whole = jax.device_get(rewarded.rollouts(batch_size=40)(0, params))
    np.testing.assert_array_equal(whole.reward[batch.scored], batch.reward[batch.scored])  # nothing else was lost


def test_the_policy_stops_and_so_does_a_reward_that_never_answers(params):
    def broken(prompt, answer):
        raise OSError("the server is gone")

    stop = rewarded.rollouts(reward=broken, rewarding=RewardConfig(function="x", on_error="stop"))
    with pytest.raises(RewardFailed, match=r"step 0: 16 of 16 answers .*the server is gone.*on_error is 'stop'"):
        stop(0, params)
    skip = rewarded.rollouts(reward=broken)
    assert not jax.device_get(skip(0, params)).scored.any()
    skip(1, params)
    with pytest.raises(RewardFailed, match="In 3 rounds of sampling in a row"):
        skip(2, params)


def test_a_training_without_any_reward_ends_with_the_parameters_it_began_with(params, tmp_path):
    def broken(prompt, answer):
        raise OSError("the server is gone")

    lines = []
    still = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.0)
    batch = rewarded.rollouts(reward=broken)
    found = rewarded.run(tmp_path, batch, steps=2, optimizer=still, logger=lines.append)
    same_bits(found, jax.device_get(params))
    said = [line for line in lines if line.startswith("step ")]
    assert len(said) == 2 and all("no loss" in line for line in said)
    assert all("loss" not in row and row["groups/failed"] == 1 for row in read_metrics(tmp_path / "metrics.jsonl"))


def test_groups_without_signal_are_told_and_others_are_drawn_for_them(params):
    def easy(prompt, answer):
        return 1.0 if prompt.meta["number"] % 2 else rewarded.dark(prompt, answer)

    few = jax.device_get(rewarded.rollouts(reward=easy)(0, params))
    policy = dataclasses.replace(rewarded.POLICY, redraws=6)
    more = jax.device_get(rewarded.rollouts(reward=easy, policy=policy)(0, params))
    assert few.flat.sum() >= 4 and not few.advantage[few.flat].any()
    assert not more.flat.any() and more.scored.all()
    np.testing.assert_array_equal(more.tokens[~few.flat], few.tokens[~few.flat])


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(temperature=0.0), "temperature: expected more than 0"),
        (dict(guidance=2.0, mode="interleaved"), "guidance: expected 1 with mode 'interleaved', found 2.0"),
        (dict(mode="pictures"), "mode: expected one of"),
        (dict(max_tokens=-1), "max_tokens: expected 0"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        DrawingConfig(**change)


def test_the_experiment_takes_its_model_from_a_bundle(tmp_path):
    folder = bundles.write(tmp_path / "bundle").folder
    config = configs.load(str(ROOT / "experiments" / f"grpo.py:from={folder}"))
    check(config)
    assert config.training.objective == "reward" and config.model.n_layers == 1
    assert settings.policy(config).group_size * 8 == config.training.batch_size
    unseen = configs.load(str(ROOT / "experiments" / f"grpo.py:from={folder},unseen={tmp_path}"))
    check(unseen)
    asked, known = unseen.data.train
    assert asked.path == f"{tmp_path}/prompts.jsonl" and unseen.reward.mode == "image"
    assert (known.name, known.split) == ("shapes/captions", "train") and asked.weight + known.weight == 1.0
    assert (ROOT / unseen.data.train[0].made_by.split()[1]).is_file()
    (tested,) = unseen.data.tests.unseen_combinations
    assert tested.name == "shapes/captions" and tested.split == "unseen_combinations"
    with pytest.raises(UserError, match="needs a model"):
        configs.load(str(ROOT / "experiments" / "grpo.py"))
