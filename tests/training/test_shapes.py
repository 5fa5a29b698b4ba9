"""Batches whose rows get longer and fewer during a training: there is a program for each shape, and the result is the
same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_unified.data.batch import PackedBatch
from ar_unified.metrics import read_metrics
from ar_unified.parallel.mesh import make_mesh
from tests.training import tiny

SHAPES = [(16, 12)] * 3 + [(8, 24)] * 3 + [(16, 12)] * 2  # (rows, tokens) of each step


class Killed(Exception):
    pass


def growing(dies: int = -1) -> Any:
    def batch(step: int, index: int = 0, count: int = 1) -> PackedBatch:
        if step == dies:
            raise Killed
        rows, length = SHAPES[step]
        return tiny.packed(step, index, count, rows, length)

    return batch


def task(dies: int = -1) -> Any:
    """No other file has this z_loss, so its programs are compiled here, and the tests can see when."""
    return tiny.task(batch=growing(dies), z_loss=2e-3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str]]:
    folder, lines = tmp_path_factory.mktemp("whole"), []  # type: ignore[var-annotated]
    params = tiny.run(folder, task=task(), validate_every=4, logger=lines.append)
    return folder, jax.device_get(params), lines


def test_each_shape_is_compiled_once_and_the_account_says_when(whole: tuple[Path, Any, list[str]]) -> None:
    folder, _, lines = whole
    compiled = [line for line in lines if "compiled in" in line]
    assert len(compiled) == 2 and compiled[1].endswith("s for batches of 8 x 24")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:  # work is counted by real tokens
        taken = [growing()(step) for step in range(row["step"] - 2, row["step"])]
        tokens = sum(int((batch.segment_ids > 0).sum()) for batch in taken)
        assert row["tokens_per_second"] * row["step_seconds"] * 2 == pytest.approx(tokens)
        assert row["fill"] == pytest.approx(tokens / sum(batch.tokens.size for batch in taken))
    compiling = [row["time/compile"] for row in rows]
    said = [float(line.split("compiled in ")[1].split()[0]) for line in compiled]
    assert min(said) > 0 and all(each > 0 for each in compiling)
    assert rows[1]["step_seconds"] * 2 < said[1] or said[1] < 0.5, "a step is not slow because its program was made"


@pytest.mark.exact
@pytest.mark.parametrize("dies", (2, 5, 7))
def test_it_goes_on_bit_for_bit_in_each_phase(whole: tuple[Path, Any, list[str]], tmp_path: Path, dies: int) -> None:
    with pytest.raises(Killed):
        tiny.run(tmp_path, task=task(dies), validate_every=4, checkpoint_every=2)
    found = tiny.run(tmp_path, task=task(), validate_every=4)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), found, whole[1])


@pytest.mark.exact
@pytest.mark.slow
def test_another_mesh_gives_the_same(whole: tuple[Path, Any, list[str]], tmp_path: Path) -> None:
    """Losses are within 1e-5; after eight steps of Adam, parameters have a looser bound."""
    found = tiny.run(tmp_path, task=task(), mesh=make_mesh(dict(data=2, fsdp=2, tensor=2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, atol=1e-4), found, whole[1])
    losses = [
        [row["loss"] for row in read_metrics(each / "metrics.jsonl") if "loss" in row] for each in (tmp_path, whole[0])
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
