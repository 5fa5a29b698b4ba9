from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_unified.training.optimizer import OptimizerConfig, is_decayed, learning_rate, make_optimizer
from tests.training import tiny


def curve(steps=100, **changes):
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=9, final_fraction=0.1, **changes), steps)
    return np.asarray(jax.jit(jax.vmap(rate))(np.arange(steps)))


def test_cosine_rises_then_falls_to_the_final_rate():
    rates = curve()
    np.testing.assert_allclose(rates[:9], np.arange(1, 10) / 10, rtol=1e-6)
    assert rates[9] > 0.999 and np.all(np.diff(rates[9:]) < 0)
    np.testing.assert_allclose([rates[54], rates[99]], [0.55, 0.1], atol=0.01)


@pytest.mark.parametrize("decay, middle", [("sqrt", 1 - 0.9 * np.sqrt(0.5)), ("linear", 0.55)])
def test_wsd_is_flat_then_falls(decay, middle):
    rates = curve(schedule="wsd", decay=decay, decay_fraction=0.2)
    np.testing.assert_allclose(rates[9:80], 1.0, rtol=1e-6)
    np.testing.assert_allclose([rates[89], rates[99]], [middle, 0.1], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_restart_begins_the_schedule_anew(schedule):
    rates = curve(100, schedule=schedule, restarts=(0.25, 0.6))
    parts = [curve(steps, schedule=schedule) for steps in (25, 35, 40)]
    np.testing.assert_allclose(rates, np.concatenate(parts), rtol=1e-6)


def test_restarts_out_of_order_are_refused():
    for wrong in ((0.0,), (0.5, 0.5), (0.6, 0.3), (1.0,)):
        with pytest.raises(ValueError, match="expected ascending fractions of the steps"):
            curve(100, restarts=wrong)


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="9 steps of warm-up and 8 of decay do not fit into 10"):
        curve(10, schedule="wsd", decay_fraction=0.8)
    with pytest.raises(ValueError, match="schedule: expected one of cosine, wsd; found 'step'"):
        curve(schedule="step")


def test_only_matrices_decay():
    params = {
        "embedding": jnp.ones((4, 4)),
        "norm": jnp.ones(4),
        "codebook": jnp.ones((4, 4)),
        "layers": {
            "mlp": {"gate": jnp.ones((2, 4, 4))},
            "query_norm": {"scale": jnp.ones((2, 3, 4))},
            "b": jnp.ones((2, 4)),
        },
    }
    decayed = jax.tree_util.tree_map_with_path(is_decayed, params)
    assert decayed["embedding"] and decayed["layers"]["mlp"]["gate"]
    assert not (decayed["norm"] or decayed["codebook"] or decayed["layers"]["b"])
    assert not decayed["layers"]["query_norm"]["scale"]
    tx = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5, final_fraction=1.0), 10)
    updates, _ = jax.jit(tx.update)(jax.tree.map(np.zeros_like, params), jax.jit(tx.init)(params), params)
    moved = optax.apply_updates(params, updates)
    assert moved["embedding"][0, 0] == 0.5 and moved["norm"][0] == 1.0


def test_muon_makes_the_steps_of_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    settings = dict(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, final_fraction=1.0)
    params = jax.device_get(tiny.task().init(jax.random.key(0)))
    grads = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), params)

    def step(optimizer):
        tx = make_optimizer(OptimizerConfig(optimizer=optimizer, **settings), 10)
        return jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)[0]

    muon, adamw = step("muon"), step("adamw")
    attention, mlp = muon["layers"]["attention"], muon["layers"]["mlp"]
    rows = {"query": 32, "key": 32, "value": 32, "output": 32, "gate": 32, "up": 32, "down": 64}
    for name, update in (attention | mlp).items():
        if name not in rows:
            continue
        weight = params["layers"]["attention" if name in attention else "mlp"][name]
        for layer in range(2):  # all heads of a layer form one matrix; layers are separate
            moved = np.asarray(update[layer] + 0.1 * 0.5 * weight[layer]).reshape(rows[name], -1)
            np.testing.assert_allclose(np.sqrt((moved**2).mean()), 0.1 * 0.2, rtol=0.25)
            # Newton-Schulz with Jordan's coefficients leaves singular values in 0.7 to 1.2; Gaussian ones would spread
            # from 0 for a square matrix
            size = np.linalg.svd(moved, compute_uv=False) / (0.1 * 0.2 * max(moved.shape) ** 0.5)
            assert 0.5 < size[: len(size) * 9 // 10].min() and size.max() < 1.3, (name, size)
    rest = [(muon[k], adamw[k]) for k in ("embedding", "head", "norm")]
    rest += [(attention[k], adamw["layers"]["attention"][k]) for k in ("norm", "query_norm", "key_norm")]
    jax.tree.map(np.testing.assert_array_equal, *zip(*rest, strict=True))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer: expected one of adamw, muon; found 'sgd'"):
        make_optimizer(OptimizerConfig(optimizer="sgd", warmup_steps=0), 10)
