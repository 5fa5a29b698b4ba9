"""A training that memorises its data says so once, and keeps the best step."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from ar_unified.checkpoint import Checkpoints, restore_params
from ar_unified.metrics import read_metrics
from tests.training import tiny

STEPS = 48
SETTINGS = dict(
    steps=STEPS, validate_every=6, log_every=3, checkpoint_every=20, keep=1,
    optimizer=dataclasses.replace(tiny.TRAINING.optimizer, learning_rate=3e-2),
)  # fmt: skip


class Killed(Exception):
    pass


def by_heart(dies=None):
    """Always the same rows; others are held out."""

    def batch(step, *part):
        if step == dies:
            raise Killed
        return tiny.packed(0, *part)

    small = dataclasses.replace(tiny.MODEL, n_layers=1)
    return tiny.task(batch=batch, config=small)


def same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    folder, lines, seen = tmp_path_factory.mktemp("learnt"), [], {}

    def preview(step, params):
        seen[step] = jax.device_get(params)

    params = tiny.run(folder, task=by_heart(), logger=lines.append, preview_every=6, preview=preview, **SETTINGS)
    return folder, jax.device_get(params), lines, seen


def validations(folder):
    found = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: row["validation/loss"] for row in found if "validation/loss" in row}


def test_it_says_so_once_and_at_the_end(learnt):
    folder, _, lines, _ = learnt
    losses = validations(folder)
    best = min(losses, key=losses.get)
    assert 6 <= best < STEPS - 12 and losses[STEPS] > 1.05 * losses[best], "this training was to turn"
    told = [line for line in lines if "memorises" in line]
    assert len(told) == 2, told
    for line in told:
        assert f"transformer: validation loss is lowest at step {best} ({losses[best]:.4g})" in line
        assert f"training.keep_best keeps step {best}" in line
    assert f"({losses[STEPS]:.4g} at step {STEPS}" in told[-1] and lines.index(told[-1]) >= len(lines) - 2


def test_the_best_step_is_kept_beside_the_last(learnt):
    folder, params, _, seen = learnt
    reader = Checkpoints(folder / "checkpoints", readonly=True)
    best, loss = reader.best() or (0, 0.0)
    assert reader.steps() == [best, STEPS] and loss == np.float32(min(validations(folder).values()))
    same_bits(restore_params(folder / "checkpoints", step=best), seen[best])
    same_bits(restore_params(folder / "checkpoints"), params)


def test_without_it_only_the_last_is_kept(tmp_path):
    tiny.run(tmp_path, task=by_heart(), **{**SETTINGS, "steps": 12, "keep_best": False})
    assert Checkpoints(tmp_path / "checkpoints", readonly=True).steps() == [12]


def test_killed_behind_the_turn_it_ends_with_the_same_two_steps(learnt, tmp_path):
    folder, params, _, seen = learnt
    best, _ = Checkpoints(folder / "checkpoints", readonly=True).best() or (0, 0.0)
    for dies in (best + 1, 44):
        with pytest.raises(Killed):
            tiny.run(tmp_path, task=by_heart(dies), **SETTINGS)
    lines = []
    same_bits(tiny.run(tmp_path, task=by_heart(), logger=lines.append, **SETTINGS), params)
    reader = Checkpoints(tmp_path / "checkpoints", readonly=True)
    assert reader.steps() == [best, STEPS] and validations(tmp_path) == validations(folder)
    same_bits(restore_params(tmp_path / "checkpoints", step=best), seen[best])
    assert f"lowest at step {best} " in next(line for line in lines if "memorises" in line)
