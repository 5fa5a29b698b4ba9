"""`prepare` in a store by real processes that share only the store gives the same bytes, whichever process is slow or
killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.preparing import files, make_set, prepare_set
from tests.moments import random_moments
from tests.storage.preparing import Job, prepared, under_fire

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def whole(data: Path) -> dict[str, bytes]:
    prepare_set(data, data.parent / "whole" / "data")
    return files(data.parent / "whole" / "data")


@pytest.mark.parametrize("processes", [1, 2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments_it_leaves_the_same_bytes(
    data: Path, whole: dict[str, bytes], url: str, processes: int
) -> None:
    assert under_fire(data, url, whole, processes, 2, random_moments()) >= 2


def test_the_rest_finish_what_one_that_is_killed_for_good_had_begun(
    data: Path, whole: dict[str, bytes], url: str
) -> None:
    """The process that is killed waits a quarter of an hour in its first batch, so it cannot finish before."""
    job = Job(data, url, 4, pause=[900.0, 0.2, 0.2, 0.2], lease=2.0)
    job.until(4)
    job.processes[0].kill()
    assert job.end() == [-9, 0, 0, 0] and prepared(url) == whole
