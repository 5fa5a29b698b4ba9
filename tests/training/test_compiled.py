"""The compiled step: what travels between devices, and how the memory of one falls as fsdp grows."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.experimental.topologies import get_topology_desc
from jax.sharding import NamedSharding

from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import batch_spec
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.step import abstract_state, gradients, make_train_step
from tests.kernels.topologies import needs_libtpu
from tests.training import tiny

TX = make_optimizer(OptimizerConfig(), 1000)
B, T, V, CHUNK = 32, 128, 1536, 512
# Sizes that tell apart, by their number of elements, a layer's matrix, its keys, a table and a chunk's logits.
MODEL = replace(
    tiny.MODEL, vocab_size=V, d_model=256, n_layers=3, head_dim=64, d_mlp=384, scan_layers=True,
    remat="full", dropout=0.1,
)  # fmt: skip


def batch_on(mesh, rows=B, length=T):
    return {
        name: jax.ShapeDtypeStruct(
            (rows, length), x.dtype, sharding=NamedSharding(mesh, batch_spec(mesh, (rows, length)))
        )
        for name, x in tiny.packed(0).items()
    }


def collectives(text):
    """(kind, elements of its largest array, whether it is in a loop) of each collective of an HLO module."""
    line = re.compile(
        r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)", re.M
    )
    for shapes, kind, rest in line.findall(text):
        sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w\[([\d,]*)\]", shapes)]
        yield kind, max(sizes), "while/body" in rest


@pytest.mark.parametrize(
    "shape, context, platform",
    [
        (dict(fsdp=2, tensor=2, context=2), "gather", "cpu"),
        pytest.param(dict(fsdp=8), "gather", "cpu", marks=pytest.mark.slow),
        pytest.param(dict(fsdp=2, tensor=2, context=2), "gather", "tpu", marks=[pytest.mark.slow, needs_libtpu]),
        pytest.param(dict(fsdp=2, tensor=2, context=2), "ring", "tpu", marks=[pytest.mark.slow, needs_libtpu]),
    ],
)
def test_no_table_and_no_logits_travel_whole(shape, context, platform):
    devices = get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices if platform == "tpu" else None
    mesh = make_mesh(shape, devices)
    task = tiny.task(config=replace(MODEL, context=context), chunk=CHUNK)
    step, state = make_train_step(task, TX, mesh, seed=0, clip_norm=1.0), abstract_state(task, TX, mesh)
    with jax.set_mesh(mesh):
        lowered = step.trace(state, batch_on(mesh)).lower(lowering_platforms=(platform,))
        options = {"xla_backend_optimization_level": 0} if platform == "cpu" else None
        found = list(collectives(lowered.compile(compiler_options=options).as_text()))
    ways = dict(mesh.shape)
    matrix = MODEL.d_model * max(MODEL.d_mlp, MODEL.n_heads * MODEL.head_dim) // ways["tensor"]
    rows = B // ways["fsdp"] * T
    keys = rows * MODEL.n_kv_heads * MODEL.head_dim // ways["tensor"] if ways["context"] > 1 else 0
    activations = rows * MODEL.d_model // ways["context"]
    head, logits = V * MODEL.d_model // ways["tensor"], CHUNK * V // ways["tensor"]
    assert max(matrix, keys) < rows * MODEL.d_model and activations < logits  # else the bounds would not tell

    gathered = {(elements, looped) for kind, elements, looped in found if kind == "all-gather"}
    assert gathered and max(elements for elements, looped in gathered if looped) <= max(matrix, keys)
    assert max(elements for elements, looped in gathered if not looped) <= head  # over fsdp, once, and not over tensor
    assert max(elements for _, elements, looped in found if looped) <= max(matrix, keys, activations)
    assert max(elements for _, elements, _ in found) < logits


@pytest.mark.slow
def test_memory_of_parameters_gradients_and_optimizer_falls_with_fsdp():
    task, sizes = tiny.task(config=replace(MODEL, dropout=0.0, n_layers=1, remat="none"), chunk=CHUNK), []
    for ways in (1, 2, 4, 8):
        mesh = make_mesh(dict(fsdp=ways), jax.devices()[:ways])
        state = abstract_state(task, TX, mesh)
        moments = sum(
            x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.optimizer)
        )
        compute = jax.jit(
            lambda p, b, mesh=mesh: gradients(task, p, b, jax.random.key(0), accumulation=2, mesh=mesh)[1]
        )
        with jax.set_mesh(mesh):
            lowered = compute.lower(state.params, batch_on(mesh, rows=16, length=16))
            memory = lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).memory_analysis()
        batch = sum(x.dtype.itemsize * 16 * 16 // ways for x in batch_on(mesh, 16, 16).values())
        sizes.append((memory.argument_size_in_bytes - batch, memory.output_size_in_bytes, moments))
    for ways, found in zip((1, 2, 4, 8), sizes, strict=True):
        np.testing.assert_allclose(np.array(found) * ways, sizes[0], rtol=0.15)
