"""`ar-unified prepare` on two real processes is stopped in the middle; then both train on the prepared data."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ar_unified.cli.main import main
from tests.cli.held import HOLD
from tests.cli.test_text_alone import CONFIG
from tests.parallel.job import environment, free_port

pytestmark = pytest.mark.slow
LINES = 26_000  # enough for four shards


def start(verb: str, arguments: list[str], hold: Path | None = None) -> list[subprocess.Popen[str]]:
    """Starts two processes. hold: while this file exists, `prepare` makes only the first shards (`held`)."""
    job = ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process"]
    command = [sys.executable, "-m", "tests.cli.held" if hold else "ar_unified.cli.main", verb, *arguments, *job]
    variables = environment() | {HOLD: str(hold)}
    return [
        subprocess.Popen([*command, str(i)], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)
    ]


def stopped(arguments: list[str], hold: Path, shard: Callable[[], object]) -> tuple[list[int], list[str]]:
    """Runs `prepare` on two processes that cannot finish. One gets SIGTERM when `shard` says that a shard exists.
    Returns exit statuses and outputs.
    """
    hold.touch()
    job = start("prepare", arguments, hold)
    while not shard():
        assert all(process.poll() is None for process in job), end(job)
        time.sleep(0.05)
    job[1].send_signal(signal.SIGTERM)
    found = end(job)
    hold.unlink()
    return found


def end(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    said = [process.communicate(timeout=400)[0] for process in processes]
    return [process.returncode for process in processes], said


def shards(workdir: Path) -> dict[str, bytes]:
    paths = [path for path in sorted((workdir / "data").rglob("*")) if path.is_file()]
    named = {str(path.relative_to(workdir)): path.read_bytes() for path in paths}
    return {name: data for name, data in named.items() if not name.startswith(("data/done", "data/started"))}


def test_sigterm_to_one_stops_both_and_the_next_start_goes_on_and_trains(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    lines = (f"the red circle {i} stands left of the blue square {i * i} and smiles" for i in range(LINES))
    (tmp_path / "corpus" / "a.txt").write_text("\n".join(lines))
    (tmp_path / "config.py").write_text(CONFIG)
    two, one = tmp_path / "two", tmp_path / "one"
    config = ["--config", f"{tmp_path / 'config.py'}:{tmp_path / 'corpus'}", "--config.training.steps=2", "--workdir"]
    assert main(["tokenizer", *config, str(two)]) == 0
    shutil.copytree(two, one)

    codes, said = stopped([*config, str(two)], tmp_path / "hold", lambda: list(two.rglob("*.array_record")))
    assert codes == [143, 143], said
    assert "SIGTERM: stopped. Finished work is kept" in said[0] and "Traceback" not in said[0]
    written = {path.relative_to(two): path.stat().st_mtime_ns for path in two.rglob("*.array_record")}
    assert not list((two / "data").rglob("*~")) and not (two / "data" / "done.json").exists()

    codes, said = end(start("prepare", [*config, str(two)]))
    assert codes == [0, 0], said
    assert main(["prepare", *config, str(one)]) == 0
    assert shards(two) == shards(one)
    assert len(written) < len(list(one.rglob("*.array_record")))
    assert all((two / name).stat().st_mtime_ns == when for name, when in written.items()), (
        "what was there is not redone"
    )
    codes, said = end(start("train", [*config, str(two)]))
    assert codes == [0, 0] and "step 2/2" in said[0], said


def test_filters_on_two_leave_out_what_they_leave_out_on_one(tmp_path: Path) -> None:
    """Process 0 compares all items, and both processes leave out the duplicates it finds: every tenth line repeats an
    earlier one."""
    (tmp_path / "corpus").mkdir()
    lines = [f"the red circle {i} stands left of the blue square {i * i} and smiles" for i in range(20_000)]
    lines[9::10] = [line.upper() for line in lines[::10]]
    (tmp_path / "corpus" / "a.txt").write_text("\n".join(lines))
    (tmp_path / "config.py").write_text(CONFIG)
    two, one = tmp_path / "two", tmp_path / "one"
    config = ["--config", f"{tmp_path / 'config.py'}:{tmp_path / 'corpus'}", "--config.data.filters.held_out=True"]
    config += ["--config.data.filters.duplicates=documents", "--config.data.filters.max_characters=70", "--workdir"]
    assert main(["tokenizer", *config, str(two)]) == 0
    shutil.copytree(two, one)
    codes, said = end(start("prepare", [*config, str(two)]))
    assert codes == [0, 0], said
    assert main(["prepare", *config, str(one)]) == 0
    found = shards(two)
    assert found == shards(one) and "data/filters.json" in found
    kinds = Counter(json.loads(row)["kind"] for row in found["data/train/skipped.jsonl"].splitlines())
    assert kinds.keys() >= {"filtered_duplicate", "filtered_length"} and kinds["filtered_duplicate"] > 500, kinds
    assert said[0].count("compare:") >= 1 and "compare:" not in said[1], "one of them compares"
