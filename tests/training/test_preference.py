"""Preference losses equal a transcription in NumPy, on any mesh, with any number of microbatches."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.evaluation.report import transformer_charts
from ar_unified.language.document import TASKS
from ar_unified.language.vocabulary import Role
from ar_unified.metrics import LOGPS, LOSS_OF_PAIRS, REWARDS, read_metrics
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch, shardings
from ar_unified.training.preference import PreferenceConfig, PreferenceTask, pair_losses, scores
from ar_unified.training.step import gradients
from tests.training import pairs, tiny
from tests.training.test_loop import same_bits
from tests.training.test_step import close

VARIANTS = {
    "dpo": PreferenceConfig(),
    "cdpo": PreferenceConfig(beta=0.3, label_smoothing=0.1),
    "normalised": PreferenceConfig(beta=2.0, length_normalised=True),
    "ipo": PreferenceConfig(loss="ipo", beta=0.2),
    "simpo": PreferenceConfig(loss="simpo", beta=2.5, gamma=1.4, label_smoothing=0.05),
    "sft": PreferenceConfig(beta=0.1, sft=0.7),
}


class Given(PreferenceTask):
    """The parameters directly give the model's log-probabilities of the targets."""

    def of_targets(self, params, batch, keys=None):
        return params["nll"], params["lse"]


def transcribed(config, batch, nll, lse, task):
    """(sum of weight * loss, sum of weight, reward of every answer), one pair at a time, by the papers' formulas."""
    rows, total, weights, rewards = batch.documents, 0.0, 0.0, []
    of_role = {role: task.role_weights.get(role.name.lower(), 1.0) for role in Role}
    for row in range(len(nll)):
        for pair in range(rows.segment_ids[row].max() // 2):
            score, length, mean = [], [], []
            for answer in (0, 1):
                where = np.flatnonzero(
                    (rows.segment_ids[row] == 2 * pair + answer + 1) & ~rows.prompt[row] & (rows.roles[row] > 0)
                )
                role = [Role(r) for r in rows.roles[row, where]]
                weight = np.array([of_role[r] for r in role])
                logp = -(weight * nll[row, where]).sum()
                reference = sum(of_role[r] * float(batch.reference[row, pair, answer, r]) for r in Role if r > 0)
                length.append(weight.sum())
                mean.append((weight * (nll[row, where] + task.z_loss * lse[row, where] ** 2)).sum() / weight.sum())
                if config.loss == "simpo":
                    score.append(logp / length[-1])
                else:
                    score.append((logp - reference) / (length[-1] if config.length_normalised else 1.0))
            margin = score[0] - score[1]
            if config.loss == "ipo":
                loss = (margin - 1 / (2 * config.beta)) ** 2
            else:
                z = config.beta * margin - (config.gamma if config.loss == "simpo" else 0)
                wrong = config.label_smoothing
                loss = (1 - wrong) * math.log1p(math.exp(-z)) + wrong * math.log1p(math.exp(z))
            chosen = np.flatnonzero(rows.segment_ids[row] == 2 * pair + 1)[0]
            weight = task.task_weights.get(TASKS[rows.tasks[row, chosen]], 1.0)
            total += weight * (loss + config.sft * mean[0])
            weights += weight
            rewards.append([config.beta * s for s in score])
    return total, weights, np.array(rewards)


@pytest.fixture(scope="module")
def said():
    """A batch, and possible log-probabilities of its targets: float64 [B, T]."""
    rng = np.random.default_rng(0)
    shape = (pairs.ROWS, pairs.LENGTH)
    batch = pairs.packed(0)
    # the reference is zero for roles that an answer does not have
    zeroed = batch.reference.copy()
    for row in range(pairs.ROWS):
        for pair in range(pairs.PAIRS):
            for answer in (0, 1):
                here = batch.documents.segment_ids[row] == 2 * pair + answer + 1
                there = set(batch.documents.roles[row][here & ~batch.documents.prompt[row]].tolist())
                zeroed[row, pair, answer, [r for r in Role if r not in there or r == Role.PAD]] = 0
    return replace(batch, reference=zeroed), rng.gamma(2.0, 1.0, shape), rng.normal(3, 1, shape)


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_those_of_the_papers(said, name):
    batch, nll, lse = said
    task = pairs.task(VARIANTS[name], Given)
    with jax.enable_x64(True):
        given = {"nll": jnp.asarray(nll), "lse": jnp.asarray(lse)}

        def loss(params):
            total, weight, metrics = task.loss(params, {}, batch, None)
            return total, (weight, metrics)

        (total, (weight, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(given)
        grads, metrics = jax.device_get((grads, metrics))
    expected, weights, rewards = transcribed(VARIANTS[name], batch, nll, lse, task)
    assert float(total) == pytest.approx(expected, rel=1e-6) and float(weight) == pytest.approx(weights, rel=1e-6)
    for which, values in {"chosen": rewards[:, 0], "rejected": rewards[:, 1]}.items():
        found, count = metrics[REWARDS + which]
        assert count == len(rewards) and found / count == pytest.approx(values.mean(), rel=1e-6)
    margins = rewards[:, 0] - rewards[:, 1]
    assert metrics[f"{REWARDS}margins"][0] == pytest.approx(margins.sum(), rel=1e-6)
    assert metrics[f"{REWARDS}accuracies"][0] == (margins > 0).sum()

    def differences(which, values, at):
        moved = []
        for delta in (1e-5, -1e-5):
            changed = {"nll": nll, "lse": lse} | {which: values.copy()}
            changed[which][at] += delta
            moved.append(transcribed(VARIANTS[name], batch, changed["nll"], changed["lse"], task)[0])
        return (moved[0] - moved[1]) / 2e-5

    rng = np.random.default_rng(1)
    for at in [tuple(rng.integers(0, n) for n in nll.shape) for _ in range(60)]:
        assert grads["nll"][at] == pytest.approx(differences("nll", nll, at), abs=1e-6)
        assert grads["lse"][at] == pytest.approx(differences("lse", lse, at), abs=1e-6)
    trained = ~batch.documents.prompt & (batch.documents.roles > 0)
    assert np.all(grads["nll"][~trained] == 0) and np.count_nonzero(grads["nll"][trained]) > 30


# What TRL 1.16 computes (DPOTrainer._compute_loss and CPOTrainer.cpo_loss, in float64) of three pairs with these sums
# of log-probabilities and these numbers of tokens: its loss types sigmoid, sigmoid_norm, ipo and simpo.
LOGPS_OF = [[-8.45, -9.16], [-7.6, -4.19], [-4.98, -9.0]]
REFERENCE_OF = [[-6.59, -3.36], [-7.1, -1.67], [-4.1, -9.38]]
TOKENS_OF = [[4, 5], [6, 2], [3, 6]]


@pytest.mark.parametrize(
    "config, expected",
    [
        (PreferenceConfig(beta=0.1), 0.6235989514704888),
        (PreferenceConfig(beta=0.5), 0.49936469517025217),
        (PreferenceConfig(beta=2.0, length_normalised=True), 0.4751066938437068),
        (PreferenceConfig(loss="ipo", beta=0.2, length_normalised=True), 4.389926851851852),
        (
            PreferenceConfig(loss="simpo", beta=2.0, gamma=0.5, label_smoothing=0.1),
            np.mean([1.2521186006384812, 0.38914804359605354, 1.1029428287424454]),
        ),
    ],
)
def test_losses_are_those_of_trl(config, expected):
    with jax.enable_x64(True):
        scored = scores(config, *map(jnp.asarray, (LOGPS_OF, REFERENCE_OF, TOKENS_OF)))
        assert float(pair_losses(config, scored).mean()) == pytest.approx(expected, rel=1e-6)


def test_parts_by_modality_add_up(said):
    batch, nll, lse = said
    task = pairs.task(VARIANTS["dpo"], Given)
    params = {"nll": jnp.asarray(nll, jnp.float32), "lse": jnp.asarray(lse, jnp.float32)}
    metrics = jax.device_get(jax.jit(lambda params: task.loss(params, {}, batch, None)[2])(params))
    for key in (f"{LOGPS}chosen", f"{LOGPS}rejected", f"{REWARDS}chosen", f"{REWARDS}rejected", f"{REWARDS}margins"):
        parts = [metrics[f"{key}/{part}"][0] for part in ("text", "image")]  # the answers have no other roles
        assert metrics[key][0] == pytest.approx(sum(parts), rel=1e-5)
    assert 0 < metrics[f"{REWARDS}margins/image"][1] < metrics[f"{REWARDS}margins"][1]


def test_a_wide_margin_costs_nothing_and_a_wrong_one_much():
    scored = jnp.array([[300.0, -300.0], [-300.0, 300.0], [0.0, 0.0]])
    losses = pair_losses(PreferenceConfig(), scored)
    assert losses.tolist() == pytest.approx([0.0, 60.0, math.log(2)], abs=1e-6)


def test_only_simpo_needs_no_reference():
    logps, reference, tokens = jnp.array([-4.0, -10.0]), jnp.array([-1.0, -2.0]), jnp.array([2.0, 5.0])
    assert scores(PreferenceConfig(loss="simpo"), logps, reference, tokens).tolist() == [-2.0, -2.0]
    assert scores(PreferenceConfig(), logps, reference, tokens).tolist() == [-3.0, -8.0]
    assert scores(PreferenceConfig(length_normalised=True), logps, reference, tokens).tolist() == [
        -1.5,
        pytest.approx(-1.6),
    ]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(loss="orpo"), "loss: expected one of dpo, ipo, simpo; found 'orpo'"),
        (dict(beta=0.0), "beta: expected more than 0"),
        (dict(label_smoothing=0.5), r"label_smoothing: expected a number in \[0, 0.5\)"),
        (dict(loss="ipo", label_smoothing=0.1), "label_smoothing: expected 0 with loss 'ipo'"),
        (dict(sft=-1.0), "sft: expected at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        PreferenceConfig(**change)


def loss_and_gradients(params, shape, devices=8, accumulation=1, preference=VARIANTS["sft"], **options):
    task = pairs.task(preference, config=replace(tiny.MODEL, **options))
    mesh = make_mesh(shape, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, task.logical_axes(params), params))
        compute = jax.jit(
            lambda p, b: gradients(task, p, {}, b, jax.random.key(0), accumulation=accumulation, mesh=mesh)
        )
        return jax.device_get(compute(placed, place_batch(mesh, pairs.packed(0))))


FEATURES = dict(dropout=0.3, scan_layers=True, remat="full")


@pytest.fixture(scope="module")
def reference(params):
    return loss_and_gradients(params, {}, 1, **FEATURES)


@pytest.mark.parametrize(
    "shape, accumulation",
    [
        pytest.param({}, 4, marks=pytest.mark.exact),
        pytest.param(dict(fsdp=2, tensor=2, context=2), 2, marks=pytest.mark.exact),
        pytest.param(dict(data=8), 1, marks=[pytest.mark.slow, pytest.mark.exact_later]),
        pytest.param(dict(data=2, context=4), 1, marks=[pytest.mark.slow, pytest.mark.exact_later]),
    ],
)
def test_neither_mesh_nor_accumulation_changes_anything(params, reference, shape, accumulation):
    close(loss_and_gradients(params, shape, math.prod(shape.values()), accumulation, **FEATURES), reference, 1e-5)


def test_the_reference_gives_its_own_answers_no_reward(params):
    """The loss compares with the results of `answers` for the initial weights, so rewards begin at 0."""
    task, batch = pairs.task(), pairs.packed(0)
    reference = jax.jit(task.answers, static_argnums=2)(params, batch.documents, pairs.PAIRS)
    loss = jax.jit(lambda params, batch: task.loss(params, {}, batch, None)[2])
    metrics = jax.device_get(loss(params, replace(batch, reference=np.asarray(reference))))
    for which in ("chosen", "rejected", "margins"):
        assert metrics[REWARDS + which][0] == pytest.approx(0, abs=1e-4)
    assert metrics[LOSS_OF_PAIRS][0] / metrics[LOSS_OF_PAIRS][1] == pytest.approx(math.log(2), abs=1e-5)
    assert float(np.abs(reference).sum()) > 0


def same_batch(step, index=0, count=1):
    return pairs.packed(0, index, count)


def run(folder, batch=same_batch):
    task = pairs.task(PreferenceConfig(beta=1.0, sft=0.1), batch=batch)
    return tiny.run(folder, task=task, validate_every=4, log_every=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return jax.device_get(run(folder)), read_metrics(folder / "metrics.jsonl")


def test_a_run_widens_margins_and_says_so(whole):
    rows = [row for row in whole[1] if f"{REWARDS}margins" in row]
    assert rows[-1][f"{REWARDS}margins"] > rows[0][f"{REWARDS}margins"] + 1
    assert rows[-1][LOSS_OF_PAIRS] < rows[0][LOSS_OF_PAIRS] and rows[-1]["loss"] < rows[0]["loss"]
    assert any(f"validation/{REWARDS}accuracies/image" in row for row in whole[1])


@pytest.mark.exact
def test_killed_is_uninterrupted(whole, tmp_path):
    def dying(step, index=0, count=1):
        if step == 5:
            raise KeyboardInterrupt
        return same_batch(step, index, count)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, dying)
    same_bits(run(tmp_path), whole[0])


def test_the_report_draws_every_chart_of_what_is_written(whole):
    written = {key for row in whole[1] for key in row}
    charts = {title: metrics for title, _, metrics, _ in transformer_charts(whole[1])}
    for title, metrics in charts.items():
        assert title == "Text" or (metrics and set(metrics) <= written), title  # bits per byte need a tokenizer
    assert set(charts["Margin of rewards"]) == {f"{REWARDS}margins{part}" for part in ("", "/image", "/text")}
