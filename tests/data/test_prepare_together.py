"""Real processes share the shards of one folder. The bytes are equal to those of one process, whichever process is slow
or killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.preparing import Job, files, make_set, prepare_set, under_fire
from tests.moments import random_moments

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def whole(data: Path) -> dict[str, bytes]:
    prepare_set(data, data.parent / "whole" / "data")
    return files(data.parent / "whole" / "data")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_killed_at_random_moments_it_leaves_the_same_bytes(data: Path, tmp_path: Path, processes: int) -> None:
    assert under_fire(data, tmp_path, processes, 2, random_moments()) >= 2


def test_the_rest_finish_what_one_that_is_killed_for_good_had_begun(
    data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The process waits a quarter of an hour in its first batch, so it cannot finish before it is killed."""
    job = Job(data, out := tmp_path / "data", 4, pause=[900.0, 0.1, 0.1, 0.1], lease=1.0)
    job.until(4)
    job.processes[0].kill()
    assert job.end() == [-9, 0, 0, 0] and files(out) == whole


def test_who_hangs_is_not_waited_for(data: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    job = Job(data, out := tmp_path / "data", 2, pause=[1000.0, 0.0], lease=1.0)
    job.processes[1].join(200)
    assert job.processes[1].exitcode == 0 and files(out) == whole
    assert job.kill(), "it was still at its first batch"
