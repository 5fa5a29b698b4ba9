"""5,000 files for every reader, made by `broken`; a few hundred are broken, in every known way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ar_unified.data.prepare import folder_name, load_report
from ar_unified.data.shards import read_skipped, shard_path
from tests.data import broken

MOST = 420  # MiB of memory, of which a line needs 128, its bytes as read 128, and its unpacked bytes 128


@pytest.mark.slow
def test_the_good_come_through_and_every_bad_one_is_told(tmp_path: Path) -> None:
    parts = broken.make(tmp_path, files=5000, each=2)
    assert broken.count(tmp_path / "set") == 5000
    assert sum(len(part.bad) for part in parts.values()) >= 250
    assert len(set().union(*(part.ways for part in parts.values()))) >= 100
    for folder in ("home", "tmp", "cwd"):
        (tmp_path / folder).mkdir()
    before = _files(tmp_path)
    root = Path(broken.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-B", "-m", "tests.data.watched", str(tmp_path)],
        cwd=tmp_path / "cwd",
        env=os.environ | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"),
                          "PYTHONPATH": f"{root}:{root / 'tokenizers'}"},
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    told = json.loads(run.stdout)
    assert not told["outside"]
    assert told["most"] - told["before"] < MOST
    assert {name: at for name, at in _files(tmp_path).items() if not name.startswith("data/")} == before

    report = load_report(tmp_path / "data")
    for name, part in parts.items():
        counts, left = report.sources[name], tmp_path / "data" / folder_name(name)
        assert broken.found(tmp_path / "data", name) == part.good, name
        rows = [row for number in range(counts.shards) for row in read_skipped(shard_path(left, number))]
        bad = [(row["origin"].removeprefix(f"{tmp_path}/set/"), row["kind"]) for row in rows]
        assert bad == part.bad, name
        assert sum(counts.skipped.values()) == len(bad) and all(row["reason"].isprintable() for row in rows), name
    listed = (tmp_path / "data/skipped.jsonl").read_text().splitlines()
    assert len(listed) == sum(len(part.bad) for part in parts.values())


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """The size and the time of every file and folder below a folder."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = status.st_size, status.st_mtime_ns
    return {name: at for name, at in found.items() if name != "data"}
