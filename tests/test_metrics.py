"""Summaries of the rows of metrics.jsonl."""

from __future__ import annotations

import pytest

from ar_unified.metrics import last_validation, turned


def rows(validation, training=None):
    """Rows like those of metrics.jsonl: a validation every 100 steps, and the training loss just before each."""
    training = training or [5.0 / (i + 1) for i in range(len(validation))]
    pairs = zip(validation, training, strict=True)
    for step, (held_out, loss) in enumerate(pairs, 1):
        yield {"step": 100 * step, "loss": loss, "grad_norm": 1.0}
        yield {"step": 100 * step, "validation/loss": held_out}


def words(*args, finished=False):
    return turned(list(rows(*args)), finished=finished)


def test_it_is_told_with_its_numbers():
    said = words([6.5, 6.1, 6.6, 7.05])
    assert "lowest at step 200 (6.1) and has risen since (7.05 at step 400; training loss 2.604, the mean of" in said


@pytest.mark.parametrize("count, steps", [(4, "1 to 400"), (5, "1 to 500"), (8, "301 to 800")])
def test_the_training_loss_is_told_with_the_steps_it_is_a_mean_of(count, steps):
    """A line is the mean of the steps since the line before it, and the sentence has the mean of five lines."""
    assert f", the mean of steps {steps})" in words([6.1, *[7.0] * (count - 1)])


def test_one_rise_may_be_a_chance_but_not_at_the_end():
    assert not words([6.5, 6.1, 6.6]) and words([6.5, 6.1, 6.6], finished=True)


@pytest.mark.parametrize(
    "losses",
    [
        ([6.5, 6.1, 6.6, 6.0],),  # the validation loss fell again
        ([6.5, 6.1, 6.12, 6.13],),  # the loss rose by less than one per cent
        ([6.5, 6.1, 7.0, 8.0], [4.0, 3.0, 5.0, 6.0]),  # both losses rise, which is not overfitting
        ([6.5],),
        ([],),
        ([6.5, None, None, None],),
    ],
)
def test_no_turn_where_there_is_none(losses):
    assert not words(*losses, finished=True)


def test_the_last_validation_is_told_without_its_prefix():
    assert last_validation([*rows([6.5, 6.1]), {"step": 210, "loss": 1.0}]) == {"loss": 6.1}
    assert last_validation([{"step": 1, "loss": 1.0}]) == {}
