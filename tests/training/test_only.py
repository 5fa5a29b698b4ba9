"""Only a part of the parameters is trained. It changes as in a full training, and all other parameters stay the
same."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model import transformer
from ar_unified.model.leaves import named
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.selection import select
from ar_unified.training.step import abstract_state, gradients, make_state, make_train_step
from tests.training import tiny

CODES = slice(tiny.VOCABULARY.image_offset, tiny.VOCABULARY.rest_offset)
AXES = transformer.logical_axes(transformer.abstract_params(tiny.MODEL))


def steps(only, count=3, mesh=None, accumulation=1, **optimizer):
    """Parameters, as numpy by path, before and after some steps, and the last state."""
    mesh = mesh or make_mesh({}, jax.devices()[:1])
    task = tiny.task(only=only)
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.5, **optimizer)
    tx = make_optimizer(config, 10)
    placement = jax.tree.map(lambda x: x.sharding, abstract_state(task, tx, mesh))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: make_state(task, tx, 0), out_shardings=placement)()
        before = jax.device_get(named(state.params))
        step = make_train_step(task, tx, mesh, seed=0, clip_norm=config.clip_norm, accumulation=accumulation)
        for i in range(count):
            state, report = step(state, place_batch(mesh, tiny.packed(i)))
    assert bool(report.finite)
    return before, jax.device_get(named(state.params)), state


def moved(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_not_selected_keeps_its_bits_and_has_no_state(optimizer):
    only = ("head[image]", "layers.mlp", "*.query_norm")
    before, after, state = steps(only, optimizer=optimizer)
    mlp = {f"layers.mlp.{name}" for name in ("norm", "gate", "up", "down")}
    assert moved(before, after) == {"head", "layers.attention.query_norm.scale"} | mlp
    head = np.ones(len(before["head"]), bool)
    head[CODES] = False
    assert np.array_equal(before["head"][head], after["head"][head])
    assert (before["head"][CODES] != after["head"][CODES]).all()
    held = {leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim} - {(3,)}  # Muon's coefficients
    trained = {after[name].shape for name in moved(before, after) - {"head"}} | {(60, 32)}
    assert held == trained, "moments of something else"


def test_its_gradient_is_the_part_of_the_whole_one_and_passes_through_nothing_below():
    mesh, batch, key = make_mesh({}, jax.devices()[:1]), tiny.packed(0), jax.random.key(0)
    params = jax.jit(tiny.task().init)(jax.random.key(1))

    def of(only):
        task = tiny.task(only=only)
        found = jax.jit(lambda p: gradients(task, p, {}, batch, key, accumulation=1, mesh=mesh)[:2])
        costs: Any = found.lower(params).compile().cost_analysis()
        return costs["flops"], named(found(params)[1])

    whole_cost, whole = of(())
    for only in (("head[image]",), ("embedding[text]", "embedding[image]"), ("layers.attention",)):
        cost, part = of(only)
        for name, leaf in part.items():
            rows = {"head": [CODES], "embedding": [slice(0, 40), CODES]}.get(name, [slice(None)])
            expected = np.concatenate([whole[name][each] for each in rows])
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-7, err_msg=name)
        assert len(part) == {"head[image]": 1, "embedding[text]": 1}.get(only[0], 7)
    assert of(("head[image]",))[0] < 0.6 * whole_cost


def test_the_first_step_is_that_of_full_training_on_those_rows():
    """Adam's first step does not depend on the size of a gradient, so clipping by another norm does not change it."""
    settings = dict(count=1, eps=1e-12)
    *_, whole = steps((), **settings)
    *_, part = steps(("head[image]",), **settings)
    np.testing.assert_allclose(part.params["head"][CODES], whole.params["head"][CODES], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, tensor=2), dict(data=4, context=2)])
def test_it_is_the_same_on_a_mesh_and_in_microbatches(axes):
    only = ("head[image]", "layers.attention.output")
    before, alone, _ = steps(only)
    _, spread, state = steps(only, mesh=make_mesh(axes), accumulation=2)
    for name, leaf in alone.items():
        np.testing.assert_allclose(spread[name], leaf, atol=2e-5, err_msg=name)
    assert moved(before, spread) == {"head", "layers.attention.output"}
    assert (
        state.params["head"].sharding
        == abstract_state(tiny.task(only=only), make_optimizer(OptimizerConfig(), 200), make_mesh(axes))
        .params["head"]
        .sharding
    )


def test_a_run_that_is_stopped_goes_on_to_the_same_bits_and_says_what_it_trains(tmp_path):
    said = []
    task = tiny.task(only=("head[image]", "norm"))
    whole = tiny.run(tmp_path / "whole", task=task, logger=said.append)
    assert any("trains 60 of 128 rows of head, norm: 1,952 of" in line for line in said), said

    class Stop(Exception):
        pass

    def stop(step, params):
        raise Stop

    with pytest.raises(Stop):
        tiny.run(tmp_path / "parts", task=task, preview_every=5, preview=stop)
    parts = tiny.run(tmp_path / "parts", task=task, preview_every=5)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


@pytest.mark.parametrize(
    "place, said",
    [
        ("heads", "'heads' matches no parameter of this model.*did you mean 'head'"),
        ("layers.mlp.uo", "did you mean 'layers.mlp.up'"),
        ("head[images]", r"'head\[images\]': expected one of text, control, size, image, new; found 'images'.*'image'"),
        ("layers.mlp[image]", "layers.mlp.down does not have a row for each id"),
        ("head[image", r"'head\[image' matches no parameter"),
        ("", "'' matches no parameter"),
    ],
)
def test_a_place_that_names_nothing_is_refused_by_its_name(place, said):
    with pytest.raises(ValueError, match=said):
        tiny.task(only=("norm", place))


def test_rows_that_a_vocabulary_or_a_tied_model_has_not_are_refused():
    with pytest.raises(ValueError, match=r"'head\[size\]': this vocabulary has no size tokens"):
        select(("head[size]",), AXES, Vocabulary(40, 60))
    tied = dataclasses.replace(tiny.MODEL, tie_embeddings=True)
    with pytest.raises(ValueError, match="its head is its embedding"):
        tiny.task(config=tied, only=("head[image]",))


def test_rows_side_by_side_are_one_run_and_a_whole_leaf_outweighs_its_rows():
    v = tiny.VOCABULARY
    assert select(("head[image]", "head[size]"), AXES, v).parts == {"head": ((v.size_offset, v.rest_offset),)}
    assert (
        select(("head[image]", "head"), AXES, v).parts == select(("head", "head[text]"), AXES, v).parts == {"head": ()}
    )


def test_flops_count_what_backward_needs():
    totals = {"tokens": 10, "attended": 30}
    c, layers, head = tiny.MODEL, 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64), 32 * tiny.MODEL.vocab_size

    def flops(*only):
        return tiny.task(only=only).flops(totals)

    attention = c.n_layers * c.n_heads * c.head_dim * 30
    assert flops("embedding", "layers", "norm", "head") == flops()
    assert flops("head[image]") == 2 * 10 * (layers + head + 60 * 32) + 4 * attention
    assert flops("norm") == 2 * 10 * (layers + 2 * head) + 4 * attention
    assert flops("embedding[text]") == 2 * 10 * 2 * (layers + head) + 12 * attention
    assert flops("layers.mlp.up") == 2 * 10 * (2 * (layers + head) + 2 * 32 * 64) + 12 * attention
    assert jnp.isfinite(flops())
