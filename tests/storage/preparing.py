"""Jobs of several processes that prepare data in a store and share nothing else, for tests to kill.

PYTHONPATH=.:tokenizers python -m tests.storage.preparing FOLDER 20    kills jobs of 1, 2 and 4 processes, 20 times each
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
import uuid
from pathlib import Path

import s3fs  # noqa: F401 - imported once for all processes

from ar_unified.data.prepare import CLAIMS
from ar_unified.data.prepare.claims import Team
from ar_unified.storage import stores
from ar_unified.workdir import opened
from tests.data.preparing import files, make_set, prepare_set
from tests.moments import random_moments
from tests.stores import BUCKET, Store, objects, using

_processes = multiprocessing.get_context("forkserver")  # imports once what would take each process seconds
_processes.set_forkserver_preload([__name__])


def _process(folder: Path, url: str, team: Team, pause: float, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    with opened(url) as here:
        prepare_set(folder, here / "data" / "train", team, pause)


class Job:
    """Starts the processes of a job on `folder`, each with its own mirror. Claims of killed processes are removed."""

    def __init__(self, folder: Path, url: str, processes: int, pause: float | list[float] = 0.02, lease: float = 3.0):
        self.url = url
        for name in stores.found_under(f"{url}/data/train/{CLAIMS}"):
            stores.delete(f"{url}/data/train/{CLAIMS}/{name}")
        variables = {name: os.environ[name] for name in os.environ if name.startswith(("AWS_", "AR_UNIFIED_"))}
        pauses = pause if isinstance(pause, list) else [pause] * processes
        self.processes = [
            _processes.Process(
                target=_process, args=(folder, url, Team(i, processes, lease, alive=int), pauses[i], variables)
            )
            for i in range(processes)
        ]
        for process in self.processes:
            process.start()

    def until(self, shards: int, seconds: float = 200) -> None:
        """Waits until this many shards exist, or the job has ended."""
        deadline = time.monotonic() + seconds
        while shards_of(self.url) < shards and any(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline
            time.sleep(0.1)  # to keep load off the server

    def kill(self) -> bool:
        """Kills all processes, like a power failure. Returns whether one was still running."""
        alive = [process.is_alive() for process in self.processes]
        for process in self.processes:
            process.kill()
        self.end()
        return any(alive)

    def end(self, seconds: float = 300) -> list[int | None]:
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]


def shards_of(url: str) -> int:
    return sum(name.endswith(".array_record") for name in stores.found_under(f"{url}/data"))


def prepared(url: str) -> dict[str, bytes]:
    return {name: data for name, data in objects(f"{url}/data/train").items() if not name.startswith(CLAIMS)}


def under_fire(folder: Path, url: str, whole: dict[str, bytes], processes: int, kills: int, rng: random.Random) -> int:
    """Kills jobs at random moments and starts them again, at most five times before one may end. Compares the result
    with `whole`. Returns the number of kills."""
    killed = 0
    while killed < kills:
        run = f"{url}/{uuid.uuid4().hex[:8]}"
        for _ in range(min(5, kills - killed)):
            job = Job(folder, run, processes)
            job.until(min(shards_of(run) + rng.randrange(1, 5), 17))
            time.sleep(rng.uniform(0.0, 0.2))
            killed += job.kill()
        assert Job(folder, run, processes).end() == [0] * processes
        found = prepared(run)
        assert found == whole, sorted(name for name in found.keys() | whole if found.get(name) != whole.get(name))
        print(f"{time.strftime('%X')} {processes} processes: {killed} kills, the same bytes", flush=True)
    return killed


def main() -> None:
    root, rng, store = Path(sys.argv[1]), random_moments(), Store()
    folder = root / "set" if (root / "set").exists() else make_set(root / "set")
    prepare_set(folder, root / "whole" / "data")
    try:
        with using(store.variables() | {"AR_UNIFIED_CACHE": str(root / "cache")}):
            for processes in (1, 2, 4):
                under_fire(
                    folder, f"s3://{BUCKET}/fire", files(root / "whole" / "data"), processes, int(sys.argv[2]), rng
                )
    finally:
        store.close()


if __name__ == "__main__":
    main()
