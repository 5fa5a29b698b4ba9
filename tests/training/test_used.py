"""A vocabulary whose last rows have no probability: trained on a mesh and alone, and scored."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch, shardings
from ar_unified.sampling.score import forward
from ar_unified.training.step import TrainState, make_train_step
from tests.training import tiny

VOCABULARY = replace(tiny.VOCABULARY, rest=0)


def test_it_trains_on_a_mesh_as_alone_and_its_probabilities_add_up(params):
    used, config, tx = VOCABULARY.used, replace(tiny.MODEL, n_layers=1), optax.sgd(0.1)
    assert (used, VOCABULARY.size) == (111, 128)
    head = np.concatenate([params["head"][:used], 9 * params["head"][: 128 - used]])  # the last rows would win
    params = params | {"head": head, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    task, losses = tiny.task(config=config, vocabulary=VOCABULARY), []
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
    log_likelihood, greedy = jax.jit(forward, static_argnums=(0, 1))(config, used, after, following)
    np.testing.assert_allclose(np.exp(log_likelihood[:, -1]).sum(), 1, rtol=1e-5)
    assert greedy[:, -1].sum() == 1
