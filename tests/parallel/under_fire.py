"""Checkpoints under fire: a job of two processes that saves all the time, killed at random moments.

PYTHONPATH=.:tokenizers python tests/parallel/under_fire.py FOLDER 20
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import jax

from ar_unified.checkpoint import Checkpoints, steps_in
from tests.moments import random_moments
from tests.parallel.job import Job


def under_fire(folder: Path, kills: int, rng: random.Random) -> list[int]:
    """Kills the job `kills` times and starts it again each time; returns the latest checkpoint after each.

    After each kill, every visible checkpoint must load completely, and the newest must not be older than the newest
    that was visible while the job ran. A checkpoint that is being written when the job dies may be lost. Saving is
    asynchronous, so the first job runs until it has one checkpoint.
    """
    latest = [0]
    for number in range(kills):
        job = Job(folder, 2, steps=1_000_000, log_every=1, checkpoint_every=3, keep=2, pause=0.01)
        job.until(latest[-1] + 4)
        job.wait(lambda: steps_in(folder / "checkpoints"))
        time.sleep(rng.uniform(0.0, 1.0))
        seen = max(steps_in(folder / "checkpoints"), default=0)
        job.kill(first=rng.randrange(2), gap=rng.choice([0.0, 0.0, rng.uniform(0.0, 0.3)]))

        checkpoints = Checkpoints(folder / "checkpoints", readonly=True)
        unfinished = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.isdigit()]
        for step in checkpoints.steps():
            found = checkpoints.restore(step, params=None, optimizer=None)
            assert found["optimizer"]["step"] == step == checkpoints.metadata(step)["step"]
            assert all(jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(found["params"]))
        assert max(checkpoints.steps(), default=0) >= max(seen, latest[-1])
        print(
            f"kill {number + 1}: checkpoints {checkpoints.steps()} load; unfinished, unseen: {unfinished}", flush=True
        )
        latest.append(max(checkpoints.steps(), default=0))
    return latest[1:]


if __name__ == "__main__":
    under_fire(Path(sys.argv[1]), int(sys.argv[2]), random_moments())
