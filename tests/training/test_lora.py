"""LoRA in training: its first step by hand, on any mesh, with other trained parameters, and resumed."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_unified.checkpoint import Checkpoints
from ar_unified.model import transformer
from ar_unified.model.leaves import named
from ar_unified.model.lora import MATRICES, LoraConfig, merged
from ar_unified.model.transformer import Transformer
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch, shardings
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.step import gradients, make_state, make_train_step
from tests.training import tiny
from tests.training.test_step import close

LORA = LoraConfig(rank=4, alpha=8.0)
DROPPED = dataclasses.replace(LORA, dropout=0.3, rslora=True, targets=("attention.query", "attention.output", "mlp.*"))


def adapted(lora: LoraConfig, seed: int = 0, spread: float = 0.05):
    """Fresh parameters with an adapter that is not zero."""
    params = jax.jit(tiny.task(lora=lora).init)(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, spread, x.shape).astype(np.float32), params["lora"])
    return jax.device_get(params) | {"lora": moved}


def forward(lora, config=tiny.MODEL):
    """hidden states of the tiny batch, jitted."""
    batch = tiny.packed(0)

    def run(params):
        model = Transformer.bind(config, params, lora if "lora" in params else None)
        return model(jnp.asarray(batch.tokens), jnp.asarray(batch.positions), jnp.asarray(batch.doc_start))

    return jax.jit(run)


def test_the_first_step_is_what_full_tuning_projects_to() -> None:
    """B is 0, so its gradient is scale A' dW, and a step with rate n moves W by - n scale^2 A A' dW. A does not
    change."""
    mesh, batch, key, rate = make_mesh({}, jax.devices()[:1]), tiny.packed(0), jax.random.key(0), 0.5
    task, full = tiny.task(lora=LORA), tiny.task()
    params = jax.jit(task.init)(jax.random.key(1))
    base = {name: leaf for name, leaf in params.items() if name != "lora"}
    whole = jax.jit(lambda p: gradients(full, p, {}, batch, key, accumulation=1, mesh=mesh)[1])(base)
    own = jax.jit(lambda p: gradients(task, p, {}, batch, key, accumulation=1, mesh=mesh)[1])(params)
    assert own.keys() == {"lora"}
    step = make_train_step(task, optax.sgd(rate), mesh, seed=0)  # uses the same gradients
    before = jax.device_get(params)
    after, _ = step(make_state(task, optax.sgd(rate), 0, params), batch)
    new = merged(LORA, jax.device_get(after.params))
    for path in MATRICES:
        group, name = path.split(".")
        pair = jax.tree.map(lambda x: np.asarray(x, np.float64), before["lora"][group][name])
        assert not np.asarray(own["lora"][group][name]["a"]).any(), "A has a gradient although B is 0"
        shape = (tiny.MODEL.n_layers, pair["a"].shape[1], pair["b"].shape[-1])
        gradient = np.asarray(whole["layers"][group][name], np.float64).reshape(shape)
        expected = 2.0 * pair["a"].swapaxes(1, 2) @ gradient  # alpha / rank is 2
        np.testing.assert_allclose(own["lora"][group][name]["b"], expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
        moved = np.asarray(new["layers"][group][name], np.float64) - np.asarray(before["layers"][group][name])
        by_hand = -rate * 4.0 * pair["a"] @ pair["a"].swapaxes(1, 2) @ gradient
        assert np.abs(moved.reshape(shape) - by_hand).max() < 1e-5 * max(abs(by_hand).max(), 0.1), path
        np.testing.assert_array_equal(after.params["layers"][group][name], before["layers"][group][name])


MIXED = dataclasses.replace(LORA, ranks=("mlp=2", "mlp.up=6"), alphas=("attention=3",))


@pytest.mark.parametrize("lora", [LORA, dataclasses.replace(DROPPED, dropout=0.0), MIXED])
def test_the_model_with_an_adapter_is_the_merged_model(lora: LoraConfig) -> None:
    params = adapted(lora)
    beside = forward(lora)(params)
    inside = forward(lora)(merged(lora, params))
    base = forward(lora)({name: leaf for name, leaf in params.items() if name != "lora"})
    np.testing.assert_allclose(beside, inside, atol=1e-5)
    assert np.abs(beside - base).max() > 0.1, "the adapter does nothing"


def test_scanned_and_made_again_layers_have_theirs() -> None:
    params, scanned = adapted(LORA), dataclasses.replace(tiny.MODEL, scan_layers=True, remat="dots")
    np.testing.assert_allclose(forward(LORA, scanned)(params), forward(LORA)(params), atol=1e-5)


def computed(shape, devices, accumulation=1, **options):
    task = tiny.task(lora=DROPPED, only=("head[image]",), config=dataclasses.replace(tiny.MODEL, **options))
    mesh, params = make_mesh(shape, jax.devices()[:devices]), adapted(DROPPED)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, task.logical_axes(params), params))
        run = partial(gradients, task, accumulation=accumulation, mesh=mesh)
        compute = jax.jit(lambda p, b: run(p, {}, b, jax.random.key(3)))
        return jax.device_get(compute(placed, place_batch(mesh, tiny.packed(0))))[:2]


FEATURES = dict(scan_layers=True, remat="full", dropout=0.1)


@pytest.mark.parametrize(
    "shape, accumulation, context",
    [
        pytest.param(dict(fsdp=2, tensor=2, context=2), 2, "gather", marks=pytest.mark.exact),
        pytest.param(dict(fsdp=2, context=4), 1, "ring", marks=[pytest.mark.slow, pytest.mark.exact]),
        pytest.param(dict(data=2, tensor=4), 1, "gather", marks=[pytest.mark.slow, pytest.mark.exact_later]),
        pytest.param(dict(fsdp=8), 1, "gather", marks=[pytest.mark.slow, pytest.mark.exact_later]),
    ],
)
def test_neither_mesh_nor_microbatches_change_anything(shape, accumulation, context) -> None:
    alone = computed({}, 1, **FEATURES)
    close(computed(shape, math.prod(shape.values()), accumulation, context=context, **FEATURES), alone, 1e-5)


def test_the_adapter_alone_is_trained_and_what_is_named_beside_it() -> None:
    mesh, config = (
        make_mesh({}, jax.devices()[:1]),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=0, optimizer="muon"),
    )
    lora = dataclasses.replace(LORA, targets=("attention.query", "mlp"), base_dtype="bfloat16")
    task, tx = tiny.task(lora=lora, only=("head[image]",)), make_optimizer(config, 10)
    state = jax.jit(lambda: make_state(task, tx, 0))()
    before = jax.device_get(named(state.params))
    step = make_train_step(task, tx, mesh, seed=0, clip_norm=1.0)
    for i in range(3):
        state, report = step(state, tiny.packed(i))
    assert bool(report.finite) and {"lora.mlp.up.a", "head"} <= report.finite_leaves.keys()
    assert report.finite_leaves["lora.mlp.up.a"].shape == (2,), "the guard does not say of which layer"
    after = jax.device_get(named(state.params))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    pairs = {f"lora.{path}.{side}" for path in lora.matrices for side in "ab"}
    assert moved == pairs | {"head"} and len(pairs) == 8
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim} - {(3,)}  # Muon's coefficients
    assert shapes == {before[name].shape for name in pairs} | {(60, 32)}, "state of something that is not trained"
    dtypes = {name: str(leaf.dtype) for name, leaf in after.items()}
    assert dtypes["layers.mlp.up"] == dtypes["embedding"] == "bfloat16", "the base is not kept in bfloat16"
    assert dtypes["head"] == dtypes["layers.mlp.norm"] == dtypes["lora.mlp.up.a"] == "float32"
    told = task.selection(state.params).told(state.params)
    assert told.startswith("trains 60 of 128 rows of head, lora: 4,736 of 29,632 ")


def test_a_run_goes_on_to_the_same_bits_from_checkpoints_without_the_base(tmp_path) -> None:
    task, base = tiny.task(lora=DROPPED), jax.device_get(jax.jit(tiny.task().init)(jax.random.key(5)))
    reads = []

    def begin(abstract):
        reads.append(1)
        fresh = jax.jit(lambda: task.init(jax.random.key(0))["lora"])()
        return jax.tree.map(jnp.asarray, base) | {"lora": fresh}

    def run(folder, **more):
        config = dataclasses.replace(tiny.TRAINING, **{k: more.pop(k) for k in ("steps", "preview_every") if k in more})
        mesh = make_mesh({}, jax.devices()[:1])
        options = dict(mesh=mesh, begin=begin, kept_elsewhere=True, logger=lambda line: None)
        return jax.device_get(tiny.fit(task, config, folder, **options, **more))

    whole = run(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(step, params):
        raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "parts", preview_every=5, preview=stop)
    parts = run(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    jax.tree.map(np.testing.assert_array_equal, {name: whole[name] for name in base}, base)
    assert np.abs(whole["lora"]["mlp"]["up"]["b"]).max() > 0
    stored = Checkpoints(tmp_path / "parts" / "checkpoints", readonly=True).restore(params=None)["params"]
    assert stored.keys() == {"lora"}, "the base was written again"
    again = run(tmp_path / "parts")  # finished already
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert len(reads) == 4


def test_flops_count_the_adapter_and_no_gradient_of_what_rests() -> None:
    totals, c = {"tokens": 10, "attended": 30}, tiny.MODEL
    layers, head = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64), 32 * c.vocab_size
    own = 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)  # a and b of each matrix
    attention = 12 * c.n_layers * c.n_heads * c.head_dim * 30
    expected = 2 * 10 * (2 * (layers + head) + 3 * own) + attention
    assert tiny.task(lora=LORA).flops(totals) == expected < tiny.task().flops(totals)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(rank=-1), "rank: expected at least 0, found -1"),
        (dict(alpha=0.0), "alpha: expected more than 0, found 0"),
        (dict(dropout=1.0), r"dropout: expected a number in \[0, 1\), found 1.0"),
        (dict(targets=()), "targets: expected at least one of attention.query, .*mlp.down; found none"),
        (dict(targets=("mlp.uo",)), "targets: 'mlp.uo' matches no matrix of a layer .* did you mean 'mlp.up'"),
        (dict(ranks=("mlp",)), "ranks: expected PLACE=NUMBER, such as mlp=8; found 'mlp'"),
        (dict(ranks=("mlp.uo=2",)), "ranks: 'mlp.uo' matches no matrix of a layer"),
        (dict(ranks=("mlp=2.5",)), "ranks: 'mlp=2.5': expected a whole number of at least 1, found 2.5"),
        (dict(alphas=("mlp=0",)), "alphas: 'mlp=0': expected a number above 0, found 0"),
        (
            dict(targets=("mlp",), alphas=("attention=1",)),
            "alphas: 'attention=1': no matrix of 'attention' has an adapter; add one to `targets`",
        ),
        (dict(rank=0, ranks=("mlp=2",)), "ranks: expected none, because no matrix has an adapter with rank 0"),
        (dict(base_dtype="int4"), "base_dtype: expected one of float32, bfloat16, int8; found 'int4'"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_its_name(changes, said) -> None:
    with pytest.raises(ValueError, match=said):
        LoraConfig(**dict(rank=4) | changes)


def test_an_adapter_without_its_settings_is_no_model() -> None:
    """Otherwise a loss that forgot them would train nothing, without an error."""
    params = adapted(LORA)
    with pytest.raises(ValueError, match=r"expected a LoraConfig and params\['lora'\], or neither"):
        Transformer.bind(tiny.MODEL, params)
    assert tiny.task(lora=LoraConfig()).lora is None and "lora" not in tiny.task(lora=LoraConfig()).init(
        jax.random.key(0)
    )
    assert transformer.logical_axes(params)["lora"]["attention"]["key"]["b"] == ("layers", None, "kv_heads")
