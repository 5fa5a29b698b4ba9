"""`make check-gpu` without a GPU runs to its end, even if a check ends its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.cases import CASES

ROOT = Path(__file__).resolve().parents[1]
# Python runs sitecustomize before anything else. FEW_PACKAGES hides packages that a GPU machine does not have.
FEW_PACKAGES = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ml_collections", "tensorflow_datasets", "grain", "array_record"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
A_STAGE = """
import os, sys, types

def checks(size):
    def wrong():
        return dict(wrong=True)
    def fault():
        raise ValueError("of ours")
    def poisoned():
        return dict(failed={"cudnn": "CUDA_ERROR_ILLEGAL_ADDRESS"})
    right = lambda: dict(wrong=False, process=os.getpid())
    ends = lambda: os._exit(9)
    found = dict(first=right, ends=ends, second=right, wrong=wrong, fault=fault, poisoned=poisoned, third=right)
    return list(found.items())

sys.modules["experiments.benchmarks.gpu.parity"] = types.SimpleNamespace(checks=checks)
"""


def check_gpu(folder: Path, before: str, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status and the rows after the first. The code in `before` runs at the start of every process."""
    (folder / "sitecustomize.py").write_text(before)
    paths = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "tokenizers")])
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--output", str(folder / "found.jsonl"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    header, *rows = map(json.loads, (folder / "found.jsonl").read_text().splitlines())
    assert header["size"] == "tiny", done.stderr
    return done.returncode, rows


def test_a_check_that_ends_its_process_ends_no_other(tmp_path: Path) -> None:
    status, rows = check_gpu(tmp_path, A_STAGE, "--stages", "parity")
    assert status == 1
    assert [row["name"] for row in rows] == ["first", "ends", "second", "wrong", "fault", "poisoned", "third"]
    found = {row["name"]: row for row in rows}
    assert "status 9" in found["ends"]["failed"]["process"] and "of ours" in found["fault"]["failed"]["ours"]
    assert len({found[name]["process"] for name in ("first", "second", "third")}) == 3


def test_nothing_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    assert check_gpu(tmp_path, A_STAGE, "--stages", "parity", "--seconds", "0") == (0, [])


@pytest.mark.slow
def test_it_runs_to_its_end_with_what_a_gpu_machine_has(tmp_path: Path) -> None:
    status, rows = check_gpu(tmp_path, FEW_PACKAGES, "--seconds", "3000")
    assert status == 0, rows
    counts = {stage: sum(row["stage"] == stage for row in rows) for stage in {row["stage"] for row in rows}}
    assert counts.pop("parity") > len(CASES)  # all cases of attention, and some of decoding
    assert counts == {"attention": 14, "decode": 2, "training": 2, "sampling": 2, "rings": 2}
    assert not any({"ours", "process"} & row.get("failed", {}).keys() for row in rows)
    assert all(row["milliseconds"]["ours"] for row in rows if row["stage"] in ("attention", "decode"))
    assert all(len(row["milliseconds"]) == 2 for row in rows if row["stage"] == "rings")
