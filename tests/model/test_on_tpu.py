"""The model, compiled with libtpu for an absent TPU, trains and decodes with the kernels."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.topologies import get_topology_desc
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ar_unified.data.batch import PackedBatch
from ar_unified.model.cache import init_cache
from ar_unified.model.config import config_from, offloaded_bytes
from ar_unified.model.transformer import Transformer, init, logical_axes
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import batch_shardings, on_mesh, shardings
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.step import abstract_state, make_train_step
from tests.kernels.topologies import TPUS, needs_libtpu
from tests.training import tiny
from tests.training.travel import assert_nothing_travels_whole

MODEL = replace(
    config_from("debug", 4096, qk_norm="rmsnorm", dtype="bfloat16", scan_layers=True, remat="full"),
    d_model=512, n_heads=8, n_kv_heads=2, head_dim=128, d_mlp=512,
)  # fmt: skip
LENGTH = 256  # tokens per row; longer rows have larger attention blocks, which take most of the time to compile
pytestmark = [needs_libtpu, pytest.mark.slow]


def kernels(compiled) -> Counter[str]:
    """How often each kernel is called, by name."""
    called = r'custom_call_target="tpu_custom_call".*?op_name="[^"]*?(\w+)/pallas_call"'
    return Counter(re.findall(called, compiled.as_text()))


@pytest.mark.parametrize(
    "shape, rows, options, calls",
    [
        (dict(fsdp=2, tensor=2), 16, dict(remat="dots"), 1),
        (dict(fsdp=4), 32, dict(remat="offload_attention"), 1),
        (dict(fsdp=2, context=2), 16, {}, 2),
        (dict(fsdp=2, context=2), 16, dict(context="ring", remat="offload"), 3),
    ],
)
def test_the_train_step_runs_the_kernels(shape, rows, options, calls):
    config = replace(MODEL, **options)
    task, tx = tiny.task(config=config, chunk=1024), make_optimizer(OptimizerConfig(), 1000)
    mesh = make_mesh(shape, get_topology_desc(platform="tpu", topology_name=TPUS["v5e"]).devices)
    shapes = PackedBatch.shapes(rows, LENGTH)
    batch = on_mesh(shapes, batch_shardings(mesh, shapes))
    # Operations that run eagerly while a program is traced must not use the mesh, because nothing can run on it.
    step, state = make_train_step(task, tx, mesh, seed=0, clip_norm=1.0), abstract_state(task, tx, mesh)
    with jax.set_mesh(mesh):
        compiled = step.trace(state, batch).lower(lowering_platforms=("tpu",)).compile()
    # The scanned layer has, for each pair of pieces, forward and backward once. libtpu unrolls a loop that exchanges
    # data with the host twice, to overlap one iteration's transfer with the other's work.
    offloaded = config.remat.startswith("offload")
    times = calls * (2 if offloaded else 1)
    assert kernels(compiled) == dict(attention_forward=times, attention_backward=times)
    assert_nothing_travels_whole(compiled.as_text(), config, mesh, rows, LENGTH, 1024)
    there, found = rows * LENGTH * offloaded_bytes(config) // 4, compiled.memory_analysis().host_temp_size_in_bytes
    assert (there > 0) == offloaded  # `there` is for one of four devices
    if config.remat == "offload_attention":  # keys and values too, for two heads stored as eight
        assert there <= found <= 1.5 * there
    else:
        assert found == there


def test_prefill_and_decode_run_the_kernels():
    mesh = make_mesh(dict(data=2, tensor=2), get_topology_desc(platform="tpu", topology_name=TPUS["v5e"]).devices)
    config, rows, whole = MODEL, P("data"), P()
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    cache = jax.eval_shape(lambda: init_cache(config, 4, 1024, config.dtype))

    def place(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            params,
            shardings(mesh, logical_axes(params), params),
        )
        cache = jax.tree.map(lambda x: place(x.shape, x.dtype, P("data", "tensor")), cache)
        # XLA writes a whole prompt into an empty cache; in a step, a kernel adds one slot per row.
        for tokens, called in ((128, {"attention_forward"}), (1, {"cache_write", "decode_attention"})):
            args = place((4, tokens), jnp.int32, rows), cache, place((4,), jnp.int32, whole)
            extend = jax.jit(lambda params, *args: Transformer.bind(config, params).extend(*args))
            compiled = extend.trace(params, *args).lower(lowering_platforms=("tpu",)).compile()
            assert kernels(compiled) == dict.fromkeys(called, config.n_layers)
