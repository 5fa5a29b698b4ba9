"""One step: accumulation equals the full batch, any mesh equals one device; the RNG, the guard, and the metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_unified.data.batch import PackedBatch
from ar_unified.model import transformer
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch, shardings
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.step import (
    TrainState,
    abstract_state,
    gradients,
    make_eval_step,
    make_inspection,
    make_state,
    make_train_step,
    split_microbatches,
)
from ar_unified.training.tasks import TransformerTask
from tests.training import tiny


def close(a, b, tolerance):
    """Each leaf agrees within `tolerance` of its largest element, as gradients of different leaves differ by orders of
    magnitude."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        error = np.abs(x - y).max() / max(np.abs(y).max(), 1e-12)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"


ONE = {}, 1  # a mesh of one device


def loss_and_gradients(params, shape, devices=8, accumulation=1, batch=None, mean_split=None, **options):
    """`options` are for the model. Interpreted kernels are compiled without optimisation, which would take too long."""
    task = tiny.task(config=replace(tiny.MODEL, **options), mean_split=mean_split)
    mesh = make_mesh(shape, jax.devices()[:devices])
    compiler = {"xla_backend_optimization_level": 0} if options.get("attention") == "tpu_interpret" else None
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, task.logical_axes(params), params))
        compute = jax.jit(
            lambda p, b: gradients(task, p, {}, b, jax.random.key(0), accumulation=accumulation, mesh=mesh),
            compiler_options=compiler,
        )
        return jax.device_get(compute(placed, place_batch(mesh, batch or tiny.packed(0))))


# With QK-norm, grouped queries, untied tables, weights by role and task, z-loss, several documents per row and padding.
FEATURES = dict(dropout=0.3, scan_layers=True, remat="full")


@pytest.fixture(scope="module")
def reference(params):
    return loss_and_gradients(params, *ONE, **FEATURES)


@pytest.mark.parametrize(
    "shape, accumulation, context",
    [
        *(
            pytest.param(*case, marks=pytest.mark.exact)
            for case in [
                ({}, 4, "gather"),
                (dict(fsdp=2, tensor=2, context=2), 2, "gather"),
                (dict(fsdp=2, context=4), 1, "ring"),
            ]
        ),
        pytest.param({}, 2, "gather", marks=[pytest.mark.slow, pytest.mark.exact_later, pytest.mark.exhaustive]),
        *(
            pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.exact_later])
            for case in [
                (dict(data=8), 1, "gather"),
                (dict(fsdp=8), 1, "gather"),
                (dict(data=2, tensor=4), 4, "gather"),  # more devices than KV heads
                (dict(fsdp=2, context=4), 1, "gather"),
                (dict(tensor=2, context=3), 2, "ring"),
            ]
        ),
    ],
)
def test_neither_mesh_nor_accumulation_changes_anything(params, reference, shape, accumulation, context):
    devices = math.prod(shape.values())
    close(loss_and_gradients(params, shape, devices, accumulation, context=context, **FEATURES), reference, 1e-5)


WIDE = dict(d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64)  # a head dim that the kernels take


def unpacked(batch):
    """Each document in its own row, followed by padding."""
    alone = {name: [] for name in vars(batch)}
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            here = batch.segment_ids[row] == segment
            for name, values in vars(batch).items():
                empty = {"doc_start": values.shape[1], "tokens": tiny.VOCABULARY.pad, "targets": tiny.VOCABULARY.pad}
                rest = np.full((~here).sum(), empty.get(name, 0), values.dtype)
                first = np.zeros_like(values[row][here]) if name == "doc_start" else values[row][here]
                alone[name].append(np.concatenate([first, rest]))
    return PackedBatch(**{name: np.stack(rows) for name, rows in alone.items()})


@pytest.mark.slow
def test_packed_rows_through_the_kernel_train_like_documents_alone():
    params = transformer.init(replace(tiny.MODEL, **WIDE), jax.random.key(1))
    batch = tiny.packed(0)
    alone = unpacked(batch)
    assert len(alone.tokens) == 2 * len(batch.tokens)
    expected = loss_and_gradients(params, *ONE, batch=alone, **WIDE, attention="reference")[:2]
    packed = loss_and_gradients(params, *ONE, batch=batch, **WIDE, attention="tpu_interpret")[:2]
    close(packed, expected, 1e-5)
    for shape in (dict(data=8), dict(data=2, tensor=4), dict(fsdp=2, tensor=2, context=2)):
        close(loss_and_gradients(params, shape, batch=batch, **WIDE, attention="tpu_interpret")[:2], expected, 1e-5)
    ring = loss_and_gradients(
        params, dict(context=4), 4, batch=batch, **WIDE, attention="tpu_interpret", context="ring"
    )
    close(ring[:2], expected, 1e-5)


def test_rows_that_do_not_split_into_pairs_of_pieces_are_refused(params):
    with pytest.raises(ValueError, match=r"rows of 20 tokens .* 2 x context = 8 .*multiple of 8"):
        loss_and_gradients(params, dict(fsdp=2, context=4), batch=tiny.packed(0, length=20))


def test_microbatches_are_strided_and_keep_every_row():
    mesh = make_mesh(dict(data=4), jax.devices()[:4])
    rows = np.arange(8)[:, None] * np.ones((1, 3), np.int32)
    parts = jax.jit(lambda b: split_microbatches(b, 2, mesh))(place_batch(mesh, {"x": rows}))["x"]
    assert np.asarray(parts)[..., 0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert parts.addressable_shards[0].data.shape == (2, 1, 3)  # every device has rows of both microbatches
    with pytest.raises(ValueError, match="8 rows does not split into 3"):
        split_microbatches({"x": rows}, 3, mesh)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_stays_where_the_rules_put_it(params, optimizer):
    task, mesh = tiny.task(), make_mesh(dict(data=2, fsdp=2, tensor=2))
    tx = make_optimizer(replace(tiny.TRAINING.optimizer, optimizer=optimizer), tiny.TRAINING.steps)
    abstract = abstract_state(task, tx, mesh)
    placement = jax.tree.map(lambda x: x.sharding, abstract)
    assert placement.params["layers"]["mlp"]["gate"].spec == jax.P(None, "fsdp", "tensor")
    coefficients = (3,)  # muon's own state in addition to its momentum
    moments = [x.sharding for x in jax.tree.leaves(abstract.optimizer) if x.shape not in ((), coefficients)]
    if optimizer == "adamw":
        assert moments == jax.tree.leaves(placement.params) * 2
    else:  # one momentum, and AdamW's two for other parameters
        matrices = {"query", "key", "value", "output", "gate", "up", "down"}
        count = {path: 1 if path[-1].key in matrices else 2 for path, _ in jax.tree.leaves_with_path(placement.params)}
        expected = [s for path, s in jax.tree.leaves_with_path(placement.params) for _ in range(count[path])]
        assert sorted(map(str, moments)) == sorted(map(str, expected))
    with jax.set_mesh(mesh):
        state = TrainState(jnp.int32(0), params, tx.init(params), {})
        compiled = make_train_step(task, tx, mesh, seed=0, clip_norm=1.0).lower(
            jax.device_put(state, placement), place_batch(mesh, tiny.packed(0))
        )
    after, _ = compiled.compile().output_shardings
    same = jax.tree.map(lambda x, y, z: x.is_equivalent_to(y, z.ndim), after, placement, abstract)
    assert all(jax.tree.leaves(same))


def test_dropout_is_keyed_by_step_and_repeats(params):
    task = tiny.task(config=replace(tiny.MODEL, dropout=0.5, n_layers=1))
    params = params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    mesh = make_mesh({}, jax.devices()[:1])
    tx = make_optimizer(OptimizerConfig(learning_rate=0.0), 200)
    step = make_train_step(task, tx, mesh, seed=3)
    losses = []
    with jax.set_mesh(mesh):
        for number in (0, 1, 0):
            state = jax.tree.map(jnp.array, TrainState(jnp.int32(number), params, tx.init(params), {}))
            losses.append(float(step(state, place_batch(mesh, tiny.packed(0)))[1].loss))
    assert losses[0] == losses[2] != losses[1]


def test_every_row_of_a_global_batch_has_a_key_of_its_own(params):
    class Telling(TransformerTask):
        def loss(self, params, model_state, batch, keys):
            told = {"keys": jax.random.key_data(keys)}
            return jnp.float32(0) * params["norm"][0], jnp.float32(1), told

    task, mesh = Telling(tiny.MODEL, tiny.VOCABULARY, tiny.packed), make_mesh({}, jax.devices()[:1])
    told = [
        np.asarray(
            gradients(task, params, {}, tiny.packed(0), jax.random.key(seed), accumulation=1, mesh=mesh)[2]["keys"]
        )
        for seed in (0, 1)
    ]
    assert len(np.unique(np.concatenate(told), axis=0)) == 2 * tiny.ROWS


def test_long_gradients_are_clipped_and_short_ones_left(params):
    task, mesh, tx = tiny.task(), make_mesh({}, jax.devices()[:1]), optax.sgd(1.0)
    moved = {}
    for largest in (0.01, 1e6):
        with jax.set_mesh(mesh):
            state = jax.tree.map(jnp.array, TrainState(jnp.int32(0), params, tx.init(params), {}))
            step = make_train_step(task, tx, mesh, seed=0, clip_norm=largest)
            after, report = step(state, place_batch(mesh, tiny.packed(0)))
        change = jax.tree.map(lambda new, old: np.asarray(new) - old, after.params, params)
        moved[largest] = float(optax.global_norm(change))
    norm = float(report.grad_norm)  # before clipping
    assert 0.05 < norm < 1e6
    np.testing.assert_allclose([moved[0.01], moved[1e6]], [0.01, norm], rtol=1e-3)


def test_metrics_are_what_they_are_called(params):
    task = tiny.task()
    batch = tiny.packed(3)
    loss_sum, weight, metrics = jax.device_get(jax.jit(lambda p, b: task.loss(p, {}, b, None))(params, batch))
    role = tiny.VOCABULARY.role(batch.targets)
    assert {0, 1, 4} <= set(role.ravel())
    expected = np.where(role == 4, 0.5, 1.0) * np.where(batch.tasks == 3, 2.0, 1.0)
    expected = expected * np.where(batch.prompt, 0.25, 1.0) * (role != 0)
    np.testing.assert_allclose(weight, expected.sum(), rtol=1e-6)
    assert metrics["loss/role/image"][1] == (role == 4).sum()
    assert metrics["loss/role/text"][1] == (role == 1).sum()
    assert metrics["bits_per_text_byte"][1] == (batch.targets[role == 1] + 1).sum()
    numbers = task.summary(metrics)
    np.testing.assert_allclose(numbers["bits_per_image_token"], numbers["loss/role/image"] / np.log(2), rtol=1e-6)
    np.testing.assert_allclose(numbers["fill"], (batch.segment_ids > 0).mean(), rtol=1e-6)
    by_task = sum(metrics[f"loss/task/{name}"][0] for name in ("text", "text_to_image", "image_to_text", "interleaved"))
    by_role = sum(metrics[f"loss/role/{name}"][0] for name in ("text", "control", "size", "image"))
    np.testing.assert_allclose(by_task, by_role, rtol=1e-5)
    assert loss_sum > metrics["loss"][0]  # z-loss is part of the minimised loss, not of the reported cross-entropy


def test_half_the_loss_is_the_mean_of_text_and_half_that_of_images(params):
    """LWM's loss in NumPy, for any numbers of both kinds of targets. If only one kind is there, the loss is half of its
    mean."""
    split = tiny.VOCABULARY.image_offset
    task, batch = tiny.task(mean_split=split, z_loss=0.0), tiny.packed(3)
    compute = jax.jit(lambda p, b: task.loss(p, {}, b, None))
    hidden = transformer.Transformer.bind(tiny.MODEL, params)(batch.tokens, batch.positions, batch.doc_start)
    logits = np.asarray(hidden @ params["head"].T, np.float64)[..., : tiny.VOCABULARY.used]
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    images = batch.targets >= split
    for kept in (images, ~images, np.ones_like(images)):
        roles = np.where(kept, batch.roles, 0).astype(batch.roles.dtype)
        part = replace(batch, roles=roles)
        weight = np.asarray(task.weights(part), np.float64)
        sides = [np.average(nll, weights=weight * side) for side in (images, ~images) if (weight * side).any()]
        total, count, metrics = jax.device_get(compute(params, part))
        np.testing.assert_allclose(total / count, 0.5 * sum(sides), rtol=1e-5)
        np.testing.assert_allclose(np.divide(*metrics["loss"]), total / count, rtol=1e-6)
    assert len(sides) == 2 and abs(np.average(nll, weights=weight) - 0.5 * sum(sides)) > 1e-3, "another mean"


@pytest.mark.parametrize(
    "shape, accumulation",
    [
        pytest.param({}, 4, marks=pytest.mark.exact),
        pytest.param(dict(fsdp=2, context=2), 2, marks=[pytest.mark.slow, pytest.mark.exact_later]),
    ],
)
def test_means_by_side_are_of_the_whole_batch(params, shape, accumulation):
    """Each microbatch is divided by the counts of the whole batch, not by its own."""
    more = dict(mean_split=tiny.VOCABULARY.image_offset)
    expected = loss_and_gradients(params, *ONE, **more)
    close(loss_and_gradients(params, shape, math.prod(shape.values()), accumulation, **more), expected, 1e-5)
    assert abs(expected[0] - loss_and_gradients(params, *ONE)[0]) > 1e-3


@pytest.mark.parametrize("parts", [4, 6])
def test_a_validation_in_parts_measures_the_same(params, parts):
    """Also if the parts do not divide the rows, and if each side has its own mean."""
    task = tiny.task(mean_split=tiny.VOCABULARY.image_offset, attention_share=True)
    mesh, batch = make_mesh({}, jax.devices()[:1]), tiny.packed(0)

    def measured(*accumulation):
        with jax.set_mesh(mesh):
            both = [make(task, mesh, *accumulation) for make in (make_eval_step, make_inspection)]
            return [jax.device_get(measure(params, {}, batch)) for measure in both]

    for found, expected in zip(measured(parts), measured(), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="unknown .*images.*known: text, control, size, image"):
        tiny.task(role_weights={"images": 1.0})


def test_flops_of_one_document_are_the_textbook_formula():
    task = tiny.task()
    c, T = tiny.MODEL, 100
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    matmul = 2 * per_layer + 32 * c.vocab_size
    flops = task.flops({"tokens": T, "attended": T * (T + 1) / 2})
    assert flops == 6 * matmul * T + 12 * 2 * 32 * T * (T + 1) / 2


def test_a_fresh_state_has_the_types_of_a_step_s_so_that_one_program_does_for_both() -> None:
    """A weakly typed number, as from `jnp.full(shape, 1.0)`, returns from a step with a strong type, which would
    compile another program."""
    task, tx = tiny.task(), make_optimizer(OptimizerConfig(warmup_steps=2), 10)
    state = jax.eval_shape(lambda: make_state(task, tx, 0))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert not [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.weak_type]
