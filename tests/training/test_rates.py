"""Learning rates for parts of the parameters, and phases that train only some of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.experiment.config import defaults
from ar_unified.experiment.settings import moving, phases, state_of, tokenizer_rates
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.leaves import named
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.rates import make_rates
from ar_unified.training.selection import EVERYTHING
from ar_unified.training.step import abstract_state, make_state, make_train_step
from tests.training import tiny

CODES = slice(tiny.VOCABULARY.image_offset, tiny.VOCABULARY.rest_offset)
NEW = tuple(range(CODES.start - 2, CODES.stop))


@functools.cache
def steps(count=1, mesh=None, accumulation=1, optimizer="adamw", clip=1.0, **task):
    """Parameters, as numpy by path, before the first step and after each step."""
    mesh = mesh or make_mesh({}, jax.devices()[:1])
    made = tiny.task(**task)
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.5, optimizer=optimizer)
    tx = make_optimizer(config, 10)
    placement = jax.tree.map(lambda x: x.sharding, abstract_state(made, tx, mesh))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: make_state(made, tx, 0), out_shardings=placement)()
        found = [jax.device_get(named(state.params))]
        step = make_train_step(made, tx, mesh, seed=0, clip_norm=clip, accumulation=accumulation)
        for i in range(count):
            state, report = step(state, place_batch(mesh, tiny.packed(i)))
            found.append(jax.device_get(named(state.params)))
    assert bool(report.finite)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_rate_is_on_the_whole_step_of_what_it_names(optimizer):
    before, alike = steps(optimizer=optimizer)
    _, apart = steps(optimizer=optimizer, rates=("layers=0.25", "layers.mlp=2", "head[image]=0.5"))
    for name, old in before.items():
        factor: Any = 2.0 if ".mlp." in name else 0.25 if name.startswith("layers") else np.ones(1)
        if name == "head":
            factor = np.ones((len(old), 1))
            factor[CODES] = 0.5
        np.testing.assert_allclose(apart[name] - old, factor * (alike[name] - old), atol=1e-6, err_msg=name)
        assert np.abs(alike[name] - old).max() > 1e-4


def test_rates_of_a_part_that_is_trained_are_those_of_its_rows():
    only = ("head[image]", "head[size]", "norm")
    before, alike = steps(only=only)
    _, apart = steps(only=only, rates=("head=0.5", "head[size]=2", "norm=3"))
    factor = np.full((len(before["head"]), 1), 0.5)
    factor[CODES.start - tiny.VOCABULARY.size_tokens : CODES.start] = 2
    np.testing.assert_allclose(apart["head"] - before["head"], factor * (alike["head"] - before["head"]), atol=1e-6)
    np.testing.assert_allclose(apart["norm"] - before["norm"], 3 * (alike["norm"] - before["norm"]), atol=1e-6)


def test_an_adversary_of_the_image_tokenizer_has_a_rate_of_its_own():
    config = defaults()
    assert tokenizer_rates(config) == ()
    config.image_tokenizer.learning_rate, config.image_tokenizer.adversary.learning_rate = 4e-3, 1e-3
    params = {"autoencoder": {"kernel": jnp.ones((2, 2))}, "discriminator": {"bias": jnp.ones(3)}}
    axes = {"autoencoder": {"kernel": (None, "channels")}, "discriminator": {"bias": (None,)}}
    rates = make_rates(tokenizer_rates(config), (), axes, params, Vocabulary(1, 0), EVERYTHING)
    scaled = rates.scaled(params, jnp.int32(7))
    np.testing.assert_array_equal(scaled["autoencoder"]["kernel"], 1)
    np.testing.assert_array_equal(scaled["discriminator"]["bias"], 0.25)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_rests_in_a_phase_keeps_its_bits_and_moves_in_the_next(optimizer):
    only = ("embedding[new]", "head[new]")
    found = steps(4, optimizer=optimizer, phases=((0, only), (2, ())), new=NEW)
    for early in (1, 2):
        for name, old in found[early - 1].items():
            moved = (found[early][name] != old).reshape(len(old), -1).any(axis=1)
            expected = NEW if name in ("embedding", "head") else ()
            assert set(np.flatnonzero(moved)) <= set(expected) and (len(expected) == 0 or moved[CODES].all())
    assert all((found[3][name] != old).any() for name, old in found[2].items()), "from the third step all move"


def test_a_phase_is_clipped_by_the_norm_of_what_moves():
    """Otherwise an unused gradient would influence the size of the steps."""
    rows = dict(clip=1e-4, new=NEW)
    part = steps(1, only=("head[new]",), **rows)[1]
    phase = steps(1, phases=((0, ("head[new]",)), (5, ())), **rows)[1]
    np.testing.assert_allclose(phase["head"], part["head"], atol=1e-7)


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, tensor=2), dict(data=4, context=2)])
def test_it_is_the_same_on_a_mesh_and_in_microbatches(axes):
    task = dict(rates=("layers=0.1", "embedding[image]=2"), phases=((0, ("embedding", "head[new]")), (2, ())), new=NEW)
    alone = steps(3, **task)[-1]
    spread = steps(3, mesh=make_mesh(axes), accumulation=2, **task)[-1]
    for name, leaf in alone.items():
        np.testing.assert_allclose(spread[name], leaf, atol=2e-5, err_msg=name)


def test_a_run_that_is_stopped_in_a_phase_goes_on_to_the_same_bits(tmp_path):
    task = tiny.task(rates=("layers=0.1",), phases=((0, ("head[new]",)), (4, ())), new=NEW)
    whole = tiny.run(tmp_path / "whole", task=task)

    class Stop(Exception):
        pass

    def stop(step, params):
        raise Stop

    with pytest.raises(Stop):
        tiny.run(tmp_path / "parts", task=task, preview_every=5, preview=stop)
    parts = tiny.run(tmp_path / "parts", task=task, preview_every=5)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


@pytest.mark.parametrize(
    "task, said",
    [
        (dict(rates=("layer=0.1",)), "rates: 'layer' matches no parameter of this model.*did you mean 'layers'"),
        (dict(rates=("layers",)), "rates: expected PLACE=FACTOR, as in layers=0.1.*found 'layers'"),
        (dict(rates=("layers=0",)), "with a factor above 0; found 'layers=0'"),
        (dict(rates=("layers=nan",)), "with a factor above 0; found 'layers=nan'"),
        (dict(rates=("=2",)), "found '=2'"),
        (dict(rates=("head[text]=2",), only=("head[image]",)), "'head\\[text\\]': these parameters are not trained"),
        (dict(rates=("head[new]=2",)), "'head\\[new\\]': no ids are new, because this training does not"),
        (dict(phases=((0, ("heads",)), (2, ()))), "'heads' matches no parameter"),
    ],
)
def test_a_rate_that_says_nothing_is_refused_by_its_name(task, said):
    with pytest.raises(ValueError, match=said):
        tiny.task(**task)


def test_phases_of_a_config_say_what_moves_from_which_step():
    config = defaults()
    config.training.steps, config.training.only = 10, ("embedding[new]",)
    assert moving(config.training) == ()
    config.training.phases = (dict(begin=0.15, only=()), dict(begin=0.5, flip_pairs=0.0))
    assert moving(config.training) == ((0, ("embedding[new]",)), (2, ()))
    assert [phase.from_step for phase in phases(config.training, {})] == [0, 2, 5]
    config.training.phases = (dict(begin=0.15, only="head"),)
    with pytest.raises(ValueError, match=r"phases\[0\]: only: expected a tuple of texts, found 'head'"):
        phases(config.training, {})


def test_what_has_optimizer_state_is_said_where_phases_make_it_more():
    """The stage's fingerprint names the trained parts, because a training may continue with other phases, but not with
    another state."""
    config = defaults().training
    assert state_of(config) == {}
    config.only = ("head",)
    config.phases = (dict(begin=0.5, only=("norm",)), dict(begin=0.8, only=("head",)))
    assert state_of(config) == {"trains": ["head", "norm"]}
    config.phases = (dict(begin=0.5, only=()),)
    assert state_of(config) == {"trains": ["everything"]}
    config.only = ()
    assert state_of(config) == {}
