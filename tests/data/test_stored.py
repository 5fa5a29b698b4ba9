"""Arrays in files, read in parts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ar_unified.data import stored
from ar_unified.data.shards import INDEX, Lengths
from ar_unified.data.stored import Stored, take


@pytest.fixture
def array() -> np.ndarray:
    rows = np.zeros(5000, INDEX)
    rows["length"], rows["task"] = np.arange(5000) % 700 + 1, np.arange(5000) % 4
    return rows


@pytest.fixture
def file(array: np.ndarray, tmp_path: Path) -> Path:
    np.save(tmp_path / "index.npy", array)
    return tmp_path / "index.npy"


def test_stretches_and_single_elements_are_those_of_the_array(
    array: np.ndarray, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Stored(file)
    assert len(found) == 5000 and found.dtype == INDEX
    for stretch in (slice(0, 10), slice(4990, 6000), slice(7, 7), slice(None), slice(-3, None)):
        assert np.array_equal(found[stretch], array[stretch])
    indices = np.random.default_rng(0).integers(0, 5000, 999)  # in any order, some twice
    monkeypatch.setattr(stored, "_TOGETHER", 64)
    for some in (indices, indices[:1], indices[:0]):
        assert np.array_equal(take(found, some), array[some]) and np.array_equal(take(array, some), array[some])
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(each, array[indices]) for each in pool.map(take, [found] * 20, [indices] * 20))
    with pytest.raises(ValueError, match="steps of 2"):
        found[::2]


def test_nothing_of_the_file_is_mapped(file: Path) -> None:
    found = Stored(file)
    assert found[:].nbytes == 5000 * INDEX.itemsize
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(file) not in maps.read_text()


def test_a_file_that_is_cut_short_or_holds_something_else_is_refused(array: np.ndarray, file: Path) -> None:
    found, whole = Stored(file), file.read_bytes()
    with open(file, "r+b") as cut:
        cut.truncate(len(whole) - 5)
    with pytest.raises(ValueError, match=rf"expected {len(whole)} bytes, found {len(whole) - 5}"):
        Stored(file)
    with pytest.raises(OSError, match="the file was changed"):
        found[:]
    np.save(file, array["length"].reshape(2, -1))
    with pytest.raises(ValueError, match=r"expected one dimension of numbers, found the shape \(2, 2500\)"):
        Stored(file)
    np.save(file, np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="the dtype object"):
        Stored(file)


@pytest.mark.parametrize("answers", (1, 2))
def test_lengths_of_what_stands_together_are_added(array: np.ndarray, file: Path, answers: int) -> None:
    for index in (array, Stored(file)):
        lengths = Lengths(index, answers)
        expected = array["length"].reshape(-1, answers).sum(1)
        assert len(lengths) == len(expected) and np.array_equal(lengths[3:70], expected[3:70])
        assert lengths[:].dtype == np.int32 and np.array_equal(lengths[:], expected)
