"""A training that learns its data by heart says so, once, and keeps the step before it did."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from ar_unified.checkpoint import Checkpoints, restore_params
from ar_unified.training.telemetry import read_metrics
from ar_unified.training.turning import turned
from tests.training import tiny


def rows(validation, training=None):
    """Rows as metrics.jsonl has them: a validation every 100 steps, the training loss just before each."""
    training = training or [5.0 / (i + 1) for i in range(len(validation))]
    pairs = zip(validation, training, strict=True)
    for step, (held_out, loss) in enumerate(pairs, 1):
        yield {"step": 100 * step, "loss": loss, "grad_norm": 1.0}
        yield {"step": 100 * step, "validation/loss": held_out}


def words(*args, finished=False):
    return turned(list(rows(*args)), finished=finished)


def test_it_is_told_with_its_numbers():
    said = words([6.5, 6.1, 6.6, 7.05])
    assert "lowest at step 200 (6.1) and has risen since (7.05 at step 400; training loss " in said


def test_one_rise_may_be_a_chance_but_not_at_the_end():
    assert not words([6.5, 6.1, 6.6]) and words([6.5, 6.1, 6.6], finished=True)


@pytest.mark.parametrize(
    "losses",
    [
        ([6.5, 6.1, 6.6, 6.0],),  # it fell again
        ([6.5, 6.1, 6.12, 6.13],),  # less than one per cent
        ([6.5, 6.1, 7.0, 8.0], [4.0, 3.0, 5.0, 6.0]),  # both rise: another matter
        ([6.5],),
        ([],),
        ([6.5, None, None, None],),
    ],
)
def test_no_turn_where_there_is_none(losses):
    assert not words(*losses, finished=True)


# ---- the loop ------------------------------------------------------------------------------------------------------

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
    return tiny.task(batch=batch, config=small, attention_share=False)


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
    told = [line for line in lines if "by heart" in line]
    assert len(told) == 2, told
    for line in told:
        assert f"transformer: validation loss is lowest at step {best} ({losses[best]:.4g})" in line
        assert f"training.keep_best keeps step {best}" in line
    assert f"({losses[STEPS]:.4g} at step {STEPS}" in told[-1] and lines.index(told[-1]) >= len(lines) - 2


def test_the_best_step_is_kept_beside_the_last(learnt):
    folder, params, _, seen = learnt
    reader = Checkpoints(folder / "checkpoints", readonly=True)
    best, loss = reader.best()
    assert reader.steps() == [best, STEPS] and loss == np.float32(min(validations(folder).values()))
    same_bits(restore_params(folder / "checkpoints", step=best), seen[best])
    same_bits(restore_params(folder / "checkpoints"), params)


def test_without_it_only_the_last_is_kept(tmp_path):
    tiny.run(tmp_path, task=by_heart(), **{**SETTINGS, "steps": 12, "keep_best": False})
    assert Checkpoints(tmp_path / "checkpoints", readonly=True).steps() == [12]


def test_killed_behind_the_turn_it_ends_with_the_same_two_steps(learnt, tmp_path):
    folder, params, _, seen = learnt
    best, _ = Checkpoints(folder / "checkpoints", readonly=True).best()
    for dies in (best + 1, 44):
        with pytest.raises(Killed):
            tiny.run(tmp_path, task=by_heart(dies), **SETTINGS)
    lines = []
    same_bits(tiny.run(tmp_path, task=by_heart(), logger=lines.append, **SETTINGS), params)
    reader = Checkpoints(tmp_path / "checkpoints", readonly=True)
    assert reader.steps() == [best, STEPS] and validations(tmp_path) == validations(folder)
    same_bits(restore_params(tmp_path / "checkpoints", step=best), seen[best])
    assert f"lowest at step {best} " in next(line for line in lines if "by heart" in line)
