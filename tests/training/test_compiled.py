"""The compiled step: what is sent between devices, and a device's memory for growing fsdp."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from ar_unified.data.batch import PackedBatch
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import batch_shardings, on_mesh
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.step import abstract_state, gradients, make_train_step
from tests.training import tiny
from tests.training.travel import assert_nothing_travels_whole

TX = make_optimizer(OptimizerConfig(), 1000)
B, T, V, CHUNK = 32, 128, 1536, 512
# Sizes for which a layer's matrix, its keys, a table and a chunk's logits have different numbers of elements.
MODEL = replace(
    tiny.MODEL, vocab_size=V, d_model=256, n_layers=3, head_dim=64, d_mlp=384, scan_layers=True,
    remat="full", dropout=0.1,
)  # fmt: skip


VOCABULARY = replace(tiny.VOCABULARY, text_size=V - 100)  # V with padding


def batch_on(mesh, rows=B, length=T):
    shapes = PackedBatch.shapes(rows, length)
    return on_mesh(shapes, batch_shardings(mesh, shapes))


@pytest.mark.parametrize(
    "shape", [dict(fsdp=2, tensor=2, context=2), pytest.param(dict(fsdp=8), marks=pytest.mark.slow)], ids=str
)
def test_no_table_and_no_logits_travel_whole(shape):
    mesh, task = make_mesh(shape), tiny.task(config=MODEL, vocabulary=VOCABULARY, chunk=CHUNK)
    step, state = make_train_step(task, TX, mesh, seed=0, clip_norm=1.0), abstract_state(task, TX, mesh)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, batch_on(mesh)).compile(compiler_options={"xla_backend_optimization_level": 0})
    assert_nothing_travels_whole(compiled.as_text(), MODEL, mesh, B, T, CHUNK)


@pytest.mark.slow
def test_memory_of_parameters_gradients_and_optimizer_falls_with_fsdp():
    config = replace(MODEL, dropout=0.0, n_layers=1, remat="none")
    task, sizes = tiny.task(config=config, vocabulary=VOCABULARY, chunk=CHUNK), []
    for ways in (1, 2, 4, 8):
        mesh = make_mesh(dict(fsdp=ways), jax.devices()[:ways])
        state = abstract_state(task, TX, mesh)
        moments = sum(
            x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.optimizer)
        )
        compute = jax.jit(
            lambda p, b, mesh=mesh: gradients(task, p, {}, b, jax.random.key(0), accumulation=2, mesh=mesh)[1]
        )
        with jax.set_mesh(mesh):
            lowered = compute.lower(state.params, batch_on(mesh, rows=16, length=16))
            memory = lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).memory_analysis()
        batch = sum(x.dtype.itemsize * 16 * 16 // ways for x in jax.tree.leaves(batch_on(mesh, 16, 16)))
        sizes.append((memory.argument_size_in_bytes - batch, memory.output_size_in_bytes, moments))
    for ways, found in zip((1, 2, 4, 8), sizes, strict=True):
        np.testing.assert_allclose(np.array(found) * ways, sizes[0], rtol=0.15)
