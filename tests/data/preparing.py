"""Jobs of several processes that prepare data on this machine, for tests to kill.

PYTHONPATH=.:tokenizers python -m tests.data.preparing FOLDER 20     kills jobs of 1, 2 and 4 processes, 20 times each
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified import workdir
from ar_unified.data.prepare import CLAIMS, Report, prepare
from ar_unified.data.prepare.claims import Team
from ar_unified.data.prepare.encoder import Tokenizers
from ar_unified.data.prepare.image_codes import ImageCodes
from ar_unified.data.sources import open_source
from ar_unified.language.syntax import fixed_grid
from tests.data.conftest import Kit, PatchMeans
from tests.moments import random_moments


class Slow(PatchMeans):
    """Takes `pause` seconds per batch, like a network."""

    def __init__(self, pause: float):
        super().__init__()
        self.pause = pause

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        time.sleep(self.pause)
        return super().encode(pixels)


def make_set(root: Path) -> Path:
    """A folder of 100 items and a few bad ones, which make 17 shards."""
    folder = Kit.folder(root, captions=60, questions=30, docs=10)
    Kit.spoil(folder)
    return folder


def prepare_set(folder: Path, out: Path, team: Team | None = None, pause: float = 0.0) -> Report:
    """What each process of a job does. The codes of images from earlier jobs are in a folder beside `out`."""
    sources = [open_source(dict(kind="folder", path=folder, files=files)) for files in (["captions", "docs"], ["vqa"])]
    sources[1].name = "questions"
    tokenizer = Slow(pause)
    codes = ImageCodes(out.parent / "codes", tokenizer.hash, tokenizer.codebook_size)
    options: dict[str, Any] = dict(max_tokens=512, batch_size=4, shard_items=7, show_progress=False)
    options |= dict(tokenizers=Tokenizers([tokenizer], codes), team=team)
    return prepare(sources, Kit.grammar(fixed_grid(4, 4)), tokenizer, out, **options)


def files(folder: Path) -> dict[str, bytes]:
    """The finished files of `prepare`, without those that a killed process was writing."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith("~")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def shards_of(out: Path) -> int:
    # No glob, because the folder of claims may disappear during the search.
    return sum(name.endswith(".array_record") for _, _, names in os.walk(out) for name in names)


_processes = multiprocessing.get_context("forkserver")  # imports once what would take each process seconds
_processes.set_forkserver_preload([__name__])


def _process(folder: Path, out: Path, team: Team, pause: float) -> None:
    prepare_set(folder, out, team, pause)


class Job:
    """Starts the processes of a job on `folder` into `out`; `pause`: seconds per batch, for each process or for all.

    Unfinished files of killed jobs are removed first, as in `ar-unified prepare`.
    """

    def __init__(self, folder: Path, out: Path, processes: int, pause: float | list[float] = 0.02, lease: float = 2.0):
        self.out = out
        workdir.clean(out)
        shutil.rmtree(out / CLAIMS, ignore_errors=True)
        pauses = pause if isinstance(pause, list) else [pause] * processes
        self.processes = [
            _processes.Process(target=_process, args=(folder, out, Team(i, processes, lease, alive=int), pauses[i]))
            for i in range(processes)
        ]
        for process in self.processes:
            process.start()

    def until(self, shards: int, seconds: float = 200) -> None:
        """Waits until this many shards exist, or the job has ended."""
        deadline = time.monotonic() + seconds
        while shards_of(self.out) < shards and any(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill(self) -> bool:
        """Ends all processes at once, like a power failure. Returns whether one was still running."""
        alive = [process.is_alive() for process in self.processes]
        for process in self.processes:
            process.kill()
        self.end()
        return any(alive)

    def end(self, seconds: float = 200) -> list[int | None]:
        """Waits until all processes have ended; returns their exit codes."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]


def under_fire(folder: Path, out: Path, processes: int, kills: int, rng: random.Random) -> int:
    """Kills jobs at random moments and starts them again until they are done, with and without the codes of earlier
    jobs. Compares the result with that of one undisturbed process. Returns the number of kills."""
    shutil.rmtree(out, ignore_errors=True)
    prepare_set(folder, out / "whole" / "data")
    whole, killed = files(out / "whole" / "data"), 0
    while killed < kills:
        shutil.rmtree(out / "disturbed", ignore_errors=True)
        data = out / "disturbed" / "data"
        while True:
            job = Job(folder, data, processes)
            job.until(min(shards_of(data) + rng.randrange(4), len(whole)))
            time.sleep(rng.uniform(0.0, 0.1))
            if not job.kill():
                break
            killed += 1
        assert Job(folder, data, processes).end() == [0] * processes
        assert files(data) == whole
        print(f"{processes} processes: {killed} kills, the same bytes", flush=True)
    return killed


def main() -> None:
    root, rng = Path(sys.argv[1]), random_moments()
    folder = root / "set" if (root / "set").exists() else make_set(root / "set")
    for processes in (1, 2, 4):
        under_fire(folder, root / str(processes), processes, int(sys.argv[2]), rng)


if __name__ == "__main__":
    main()
