"""experiments/benchmarks/loader_scale.py measures the loader, and its memory is what docs/data_at_scale.md says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = 1_000_000


@pytest.mark.slow
def test_the_loader_has_little_in_memory(tmp_path: Path) -> None:
    script = ROOT / "experiments" / "benchmarks" / "loader_scale.py"
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").touch()
    command = [sys.executable, str(script), "--folder", str(tmp_path / "d"), "--documents", str(DOCUMENTS)]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tokenizers'}"}
    ran = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    planned, line = ran.stdout.splitlines()
    found = json.loads(line.removeprefix(f"{DOCUMENTS} "))
    assert planned.startswith("plan: ") and found["fill"] > 0.99
    assert found["mapped"] == 0 and found["own"] < 28, "MB: 16 and, were it held, an index of 14 bytes a document"
    assert [file.name for file in (tmp_path / "d").iterdir()] == ["mine.txt"], "its own files are removed, no others"
