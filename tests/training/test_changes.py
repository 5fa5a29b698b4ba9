"""A run that is changed on the way: settings of cost do not change its curve, and more steps continue from the last
one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from ar_unified.checkpoint import Checkpoints, adopt
from ar_unified.metrics import read_metrics
from ar_unified.training.loop import TrainingConfig
from ar_unified.training.optimizer import OptimizerConfig, learning_rate
from tests.parallel.job import Bigram
from tests.training import tiny
from tests.training.test_loop import Killed, dying, same_bits

WSD = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, schedule="wsd", decay_fraction=0.25, final_fraction=0.0)

BIGRAM = Bigram(tiny.packed)


def curve(folder, key="loss"):
    """The values of a metric by step."""
    return {row["step"]: row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row}


@pytest.mark.slow
def test_out_of_memory_at_step_30_costs_no_more_than_time(tmp_path):
    """Dropout is drawn by row and position, so neither microbatches nor recomputation changes it."""
    model = dataclasses.replace(tiny.MODEL, dropout=0.1)
    settings = dict(steps=40, log_every=1, checkpoint_every=8)

    def out_of_memory(step, *part):
        if step == 30:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return tiny.packed(step, *part)

    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        tiny.run(tmp_path / "changed", task=tiny.task(config=model, batch=out_of_memory), **settings)
    smaller = dataclasses.replace(model, remat="full", scan_layers=True, attention="reference")
    changed = tiny.run(tmp_path / "changed", task=tiny.task(config=smaller, chunk=16), accumulation=4, **settings)
    undisturbed = tiny.run(tmp_path / "whole", task=tiny.task(config=model), **settings)

    ours, theirs = curve(tmp_path / "changed"), curve(tmp_path / "whole")
    assert list(ours) == list(theirs) == list(range(1, 41))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), changed, undisturbed)


def test_more_steps_before_the_decay_are_the_longer_run(tmp_path):
    """At a constant rate, an interrupted run does not depend on its planned number of steps."""
    with pytest.raises(Killed):
        tiny.run(tmp_path / "longer", task=Bigram(dying(5)), optimizer=WSD, steps=8)
    longer = tiny.run(tmp_path / "longer", task=BIGRAM, optimizer=WSD, steps=12)
    same_bits(longer, tiny.run(tmp_path / "whole", task=BIGRAM, optimizer=WSD, steps=12))


def test_a_finished_run_goes_on_at_the_rate_of_the_longer_schedule(tmp_path):
    tiny.run(tmp_path, task=BIGRAM, steps=8, log_every=1)
    tiny.run(tmp_path, task=BIGRAM, steps=12, log_every=1)
    rates = curve(tmp_path, "learning_rate")
    optimizer = tiny.TRAINING.optimizer
    expected = [float(learning_rate(optimizer, 8 if step < 8 else 12)(step)) for step in range(12)]
    np.testing.assert_allclose([rates[step] for step in range(1, 13)], expected, rtol=1e-6)
    assert rates[9] > 2 * rates[8]  # a cosine that was at its end rises again
    assert "time/down" not in read_metrics(tmp_path / "metrics.jsonl")[-1]  # nothing waited for the second run


def test_a_decay_is_branched_from_the_middle(tmp_path):
    """One run has a constant rate up to step 12. A branch from its step 6 with a decay equals a run of 8 steps."""
    constant = dataclasses.replace(WSD, decay_fraction=0.0)
    tiny.run(tmp_path / "constant", task=BIGRAM, optimizer=constant, steps=12, keep=1, keep_every=6)
    kept = Checkpoints(tmp_path / "constant/checkpoints", readonly=True)
    assert kept.steps() == [6, 12]
    adopt(kept.folder, 6, tmp_path / "branch/checkpoints")
    branch = tiny.run(tmp_path / "branch", task=BIGRAM, optimizer=WSD, steps=8)
    same_bits(branch, tiny.run(tmp_path / "whole", task=BIGRAM, optimizer=WSD, steps=8))
    assert kept.steps() == [6, 12]


@pytest.mark.parametrize("wrong", [dict(keep_every=5), dict(keep_every=6, checkpoint_every=0), dict(keep=0)])
def test_checkpoints_that_could_not_survive_are_refused(wrong):
    with pytest.raises(ValueError, match="keep"):
        TrainingConfig(**dict(steps=8, checkpoint_every=3) | wrong)
