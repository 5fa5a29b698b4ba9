"""Real processes on this machine: losses equal those of one process, all stop together, and messages name a lost
process."""

from __future__ import annotations

import functools
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from ar_unified.checkpoint import Checkpoints
from ar_unified.metrics import read_metrics
from ar_unified.parallel.mesh import make_mesh
from tests.moments import random_moments
from tests.parallel.job import Job, train
from tests.parallel.under_fire import under_fire

pytestmark = pytest.mark.slow
STEPS = 40
SETTINGS = dict(steps=STEPS, log_every=1, checkpoint_every=4)
AGAIN = "the same command, started again, continues from the last checkpoint"


def losses(folder: Path) -> list[float]:
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def finish(folder: Path, processes: int) -> list[float]:
    """Trains to the end from the state in the folder; returns the whole loss curve."""
    if processes == 1:
        train(folder, make_mesh({}, jax.devices()[:1]), **SETTINGS)
    else:
        ended = Job(folder, processes, **SETTINGS).end()
        assert [code for code, _ in ended] == [0] * processes, ended
        assert not ended[1][1]  # only process 0 prints to the terminal
    return losses(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[float]]:
    """whole(processes): the loss curve of a training without interruption."""
    return functools.cache(lambda processes: finish(tmp_path_factory.mktemp(f"whole{processes}"), processes))


@pytest.mark.exact
def test_the_losses_are_those_of_one_process(whole):
    assert whole(1)[-1] < whole(1)[0]
    for processes in (2, 4):
        np.testing.assert_allclose(whole(processes), whole(1), rtol=1e-6)


@pytest.mark.parametrize("number, others", [(signal.SIGTERM, 4), (signal.SIGINT, 1)])
def test_a_signal_to_one_stops_all_at_one_step_with_a_checkpoint(whole, tmp_path, number, others):
    """Another number of processes continues from that checkpoint."""
    job = Job(tmp_path, 2, pause=0.1, **SETTINGS)
    job.until(step=2)
    job.send(1, number)
    assert [code for code, _ in job.end()] == [143, 143]
    stops = [re.findall(r"SIGTERM, stopped after step (\d+) with a checkpoint", job.log(i)) for i in range(2)]
    latest = Checkpoints(tmp_path / "checkpoints", readonly=True).latest()
    assert stops[0] == stops[1] == [str(latest)] and latest is not None and latest < STEPS
    np.testing.assert_allclose(finish(tmp_path, others), whole(1), rtol=1e-6)


@pytest.mark.exact
def test_sigkill_to_one_stops_the_other_with_its_name_and_nothing_is_lost(whole, tmp_path):
    job = Job(tmp_path, 2, heartbeat=8, pause=0.1, **SETTINGS)
    job.until(step=10)
    job.send(1, signal.SIGKILL)
    killed = time.monotonic()
    (code, output), _ = job.end()
    assert code not in (0, 143) and time.monotonic() - killed < 8 + 10
    assert "process 0 of 2 was stopped by JAX: process 1 is gone" in output and AGAIN in output
    assert AGAIN in job.log(0) and "process 1 of 2 was killed from outside" in job.log(1)
    assert finish(tmp_path, 2) == whole(2)  # bit for bit


def test_all_processes_save_where_the_validation_loss_is_lowest(tmp_path):
    """Only the last checkpoint is due at its step; those before were saved because a validation was the best so far."""
    settings = dict(steps=12, log_every=1, validate_every=4, checkpoint_every=0, keep=9)
    ended = Job(tmp_path / "two", 2, **settings).end()
    assert [code for code, _ in ended] == [0, 0], ended
    train(tmp_path / "one", make_mesh({}, jax.devices()[:1]), **settings)
    two, one = (Checkpoints(tmp_path / name / "checkpoints", readonly=True) for name in ("two", "one"))
    assert two.steps() == one.steps() == [4, 8, 12]
    best, alone = two.best(), one.best()
    assert best and alone and best[0] == alone[0] and best[1] == pytest.approx(alone[1], rel=1e-6)


def test_who_does_not_come_is_named(tmp_path):
    [(code, output)] = Job(tmp_path, 2, start=4, absent=[1], **SETTINGS).end()
    assert code and "gave up at the start: process 1 did not connect to localhost:" in output
    [(code, _)] = (job := Job(tmp_path, 2, start=4, absent=[0], **SETTINGS)).end()
    assert code and "gave up at the start: process 0 did not connect to localhost:" in job.log(1)


def test_no_checkpoint_is_lost_under_fire(tmp_path):
    assert len(under_fire(tmp_path, 3, random_moments())) == 3
