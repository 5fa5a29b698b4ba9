"""A vocabulary in which the last rows have no probability, trained on a mesh and on one device, and scored; with one
softmax or two."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_unified.language.syntax import fixed_grid
from ar_unified.language.vocabulary import Role
from ar_unified.model.transformer import Transformer
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch, shardings
from ar_unified.sampling.score import forward
from ar_unified.training.step import TrainState, make_train_step
from tests.training import tiny

VOCABULARY = replace(tiny.VOCABULARY, rest=0)
SPLIT = fixed_grid(4, 4).split(VOCABULARY, "by_side")


@pytest.mark.parametrize("split", [None, pytest.param(SPLIT, marks=pytest.mark.slow)], ids=["joint", "by_side"])
def test_it_trains_on_a_mesh_as_alone_and_its_probabilities_add_up(params, split):
    used, config, tx = VOCABULARY.used, replace(tiny.MODEL, n_layers=1), optax.sgd(0.1)
    assert (used, VOCABULARY.size) == (111, 128)
    head = np.concatenate(
        [params["head"][:used], 9 * params["head"][: 128 - used]]
    )  # the last rows would have the largest logits
    params = params | {"head": head, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    task, losses = tiny.task(config=config, vocabulary=VOCABULARY, split=split), []
    for shape in ({}, dict(fsdp=2, tensor=2)):
        mesh = make_mesh(shape, jax.devices()[: max(1, 2 * len(shape))])
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, shardings(mesh, task.logical_axes(params), params))
            state = jax.tree.map(jnp.array, TrainState(jnp.int32(0), placed, tx.init(placed), {}))
            step = make_train_step(task, tx, mesh, seed=0, clip_norm=1.0)
            for number in range(2):
                state, report = step(state, place_batch(mesh, tiny.packed(number)))
                losses.append(float(report.loss))
        after = jax.device_get(state.params)
        np.testing.assert_array_equal(after["head"][used:], head[used:])
        assert (after["head"][:used] != head[:used]).any(axis=1).all()
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-5)
    following = np.concatenate([np.tile([3, 80, 7], (used, 1)), np.arange(used)[:, None]], axis=1).astype(np.int32)
    log_likelihood, greedy = jax.jit(forward, static_argnums=(0, 1, 2))(
        config, used, split, after, following, np.zeros(len(following), np.int32)
    )
    for side in (slice(None),) if split is None else (slice(split), slice(split, None)):
        np.testing.assert_allclose(np.exp(log_likelihood[side, -1]).sum(), 1, rtol=1e-5)
        assert greedy[side, -1].sum() == 1


def test_what_is_reported_of_two_softmaxes_is_of_each_targets_own(params):
    batch, reports = tiny.packed(0), {}
    hidden = Transformer.bind(tiny.MODEL, params)(batch.tokens, batch.positions, batch.doc_start)
    logits = np.asarray(hidden @ params["head"].T, np.float64)
    for split in (None, SPLIT):
        task = tiny.task(split=split)
        *loss, metrics = jax.jit(lambda p, task=task: task.loss(p, {}, batch, None))(params)
        reports[split] = jax.device_get((loss, metrics))
    sides = {"text": logits[..., :SPLIT], "image": logits[..., SPLIT:]}
    log_z = {name: np.log(np.exp(side).sum(-1)) for name, side in sides.items()}
    own = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    weight, total = np.asarray(tiny.task().weights(batch), np.float64), 0.0
    for name, role in (("text", Role.TEXT), ("image", Role.IMAGE)):
        where = (weight > 0) & (batch.roles == role)
        nll = log_z[name] - own
        total += (weight * (nll + 1e-3 * log_z[name] ** 2))[where].sum()
        for split, close in ((SPLIT, True), (None, False)):
            metrics = reports[split][1]
            found = [metrics[f"{key}/role/{name}"][0] for key in ("loss", "log_z")]
            assert np.allclose(found, [nll[where].sum(), log_z[name][where].sum()], rtol=1e-5) == close
    loss, weights = reports[SPLIT][0]
    np.testing.assert_allclose([loss, weights], [total, weight.sum()], rtol=1e-5)
