"""A workdir in a store works like one on disk: the same commands give the same results, from any machine, in spite of
faults."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ar_unified.checkpoint import Checkpoints
from ar_unified.cli.main import main
from tests.cli.test_prepare_on_two import end, shards, start, stopped
from tests.cli.test_text_alone import CONFIG
from tests.parallel.job import environment
from tests.stores import Disturbed, Store, objects, put_folder, using

pytestmark = pytest.mark.slow
STEPS = ["--config.training.steps=6", "--config.training.checkpoint_every=2", "--config.training.log_every=1"]


def set_up(root: Path, lines: int) -> list[str]:
    """A corpus and a config in `root`; returns the arguments without the workdir."""
    (root / "corpus").mkdir()
    text = (f"the red circle {i} stands left of the blue square {i * i} and smiles" for i in range(lines))
    (root / "corpus" / "a.txt").write_text("\n".join(text))
    (root / "config.py").write_text(CONFIG)
    return ["--config", f"{root / 'config.py'}:{root / 'corpus'}", *STEPS, "--workdir"]


def parameters(folder: str) -> list[np.ndarray]:
    found = Checkpoints(folder, readonly=True).restore(params=None, optimizer=None)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def same(a: str, b: str) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(parameters(a), parameters(b), strict=True))


def losses(rows: bytes) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in map(json.loads, rows.splitlines()) if "loss" in row]


def in_store(url: str) -> dict[str, bytes]:
    """The shards of a workdir in a store; `shards` gives those of a workdir on disk."""
    named = {f"data/{name}": data for name, data in objects(f"{url}/data").items()}
    return {name: data for name, data in named.items() if not name.startswith(("data/done", "data/started"))}


def test_a_run_in_a_store_is_that_on_disk_and_goes_on_from_any_machine(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, disk = set_up(tmp_path, 600), tmp_path / "disk"
    assert main(["run", *config, str(disk)]) == 0
    assert main(["run", *config, url]) == 0
    there = objects(url)
    assert in_store(url) == shards(disk)
    assert same(f"{url}/model/checkpoints", str(disk / "model" / "checkpoints"))
    assert losses(there["model/metrics.jsonl"]) == losses((disk / "model" / "metrics.jsonl").read_bytes())
    samples = (disk / "samples" / "samples.jsonl").read_bytes()
    assert sorted(there["samples/samples.jsonl"].splitlines()) == sorted(samples.splitlines())
    assert "report.html" in there and "evaluation.json" in there
    missing = {str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file()} - there.keys()
    assert not [name for name in missing if not re.match(r"\.locks|model/(checkpoints|tensorboard)", name)]

    shutil.rmtree(tmp_path / "cache")  # as on another machine
    capfd.readouterr()
    assert main(["run", *config, url]) == 0
    assert capfd.readouterr().out.count("done already") == 5
    assert objects(url).keys() == there.keys()

    shutil.rmtree(tmp_path / "cache")
    longer = [word.replace("steps=6", "steps=9") for word in config]
    assert main(["train", *longer, str(disk)]) == main(["train", *longer, url]) == 0
    assert same(f"{url}/model/checkpoints", str(disk / "model" / "checkpoints"))
    rows = objects(url)["model/metrics.jsonl"]
    assert losses(rows) == losses((disk / "model" / "metrics.jsonl").read_bytes()) and len(losses(rows)) >= 9
    assert main(["sample", *longer, str(disk)]) == main(["sample", *longer, url]) == 0
    assert any(name.startswith("samples.old-1/") for name in objects(url)), "what there was is set aside"
    assert main(["export", "--workdir", url, "--output", str(tmp_path / "bundle")]) == 0


def test_killed_in_training_it_goes_on_elsewhere_bit_for_bit(url: str, tmp_path: Path) -> None:
    config, disk = set_up(tmp_path, 600), tmp_path / "disk"
    config[2:2] = ["--config.training.steps=40", "--config.training.checkpoint_every=5"]
    config = [word for word in config if word not in STEPS[:2]]
    for verb in ("tokenizer", "prepare"):
        assert main([verb, *config, str(disk)]) == 0
    put_folder(disk, url)
    command = [sys.executable, "-m", "ar_unified.cli.main", "train", *config, url]
    kills = 0
    for step in (5, 15):
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while f"model/checkpoints/{step}/commit_success.txt" not in objects_named(url) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        kills += process.wait() == -9
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert kills
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    undisturbed = [*command[:-1], str(disk)]  # in a new process with one device, like the others
    assert subprocess.run(undisturbed, env=environment(), capture_output=True, timeout=300).returncode == 0
    assert same(f"{url}/model/checkpoints", str(disk / "model" / "checkpoints"))
    assert losses(objects(url)["model/metrics.jsonl"]) == losses((disk / "model" / "metrics.jsonl").read_bytes())


def objects_named(url: str) -> set[str]:
    from ar_unified.storage import stores

    return set(stores.found_under(url))


def test_failing_requests_change_nothing(url: str, store: Store, tmp_path: Path) -> None:
    config, disk = set_up(tmp_path, 600), tmp_path / "disk"
    kinds: dict[int, int | str] = {3: 503, 7: "torn", 11: 429, 17: "cut", 19: 500}
    between = Disturbed(store, lambda method, path, number: kinds.get(number % 23))
    try:
        with using(store.variables(between.port)):
            for verb in ("tokenizer", "prepare", "train"):
                assert main([verb, *config, str(disk)]) == main([verb, *config, url]) == 0
    finally:
        between.close()
    assert between.faults > 30 and in_store(url) == shards(disk)
    assert same(f"{url}/model/checkpoints", str(disk / "model" / "checkpoints"))


def test_a_store_that_is_gone_is_named(
    url: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = set_up(tmp_path, 600)
    assert main(["tokenizer", *config, url]) == 0
    monkeypatch.setenv("AR_UNIFIED_STORE_PATIENCE", "1")
    between = Disturbed(store, lambda method, path, number: 503 if method == "PUT" and "array_record" in path else None)
    try:
        with using(store.variables(between.port)):
            assert main(["prepare", *config, url]) == 3
    finally:
        between.close()
    said = capfd.readouterr().err
    assert "requests to write this failed" in said and "Traceback" not in said
    assert main(["prepare", *config, url]) == 0, "and it goes on from there"


def test_two_processes_prepare_and_train_under_a_store(url: str, tmp_path: Path) -> None:
    config, disk = set_up(tmp_path, 26_000), tmp_path / "disk"  # enough text for four shards
    assert main(["tokenizer", *config, str(disk)]) == 0
    put_folder(disk, url)

    def shards_there() -> int:
        return sum(name.endswith(".array_record") for name in objects_named(url))

    codes, said = stopped([*config, url], tmp_path / "hold", shards_there)
    assert codes == [143, 143], said
    assert "SIGTERM: stopped. Finished work is kept" in said[0] and "Traceback" not in said[0]
    written = shards_there()

    codes, said = end(start("prepare", [*config, url]))
    assert codes == [0, 0], said
    assert main(["prepare", *config, str(disk)]) == 0
    assert in_store(url) == shards(disk)
    assert 0 < written < sum(name.endswith(".array_record") for name in shards(disk))
    codes, said = end(start("train", [*config, url]))
    assert codes == [0, 0] and "step 6/6" in said[0], said
    codes, said = end(start("train", [*config, str(disk)]))
    assert codes == [0, 0], said
    assert same(f"{url}/model/checkpoints", str(disk / "model" / "checkpoints"))
    assert {"logs/process-0.log", "logs/process-1.log", "model/metrics.jsonl"} <= objects_named(url)


def test_either_of_two_processes_killed_in_training_goes_on_bit_for_bit(url: str, tmp_path: Path) -> None:
    config, disk = set_up(tmp_path, 600), tmp_path / "disk"
    longer = ["--config.training.steps=40", "--config.training.checkpoint_every=5"]
    config = [*config[:2], *longer, *(word for word in config[2:] if word not in STEPS[:2])]
    for verb in ("tokenizer", "prepare"):
        assert main([verb, *config, str(disk)]) == 0
    put_folder(disk, url)
    command = [*config, url]
    kills = []
    for killed, step in enumerate((5, 15)):
        job = start("train", [*command, "--heartbeat-timeout", "10"])  # the process that is not killed ends by itself
        while f"model/checkpoints/{step}/commit_success.txt" not in objects_named(url) and job[0].poll() is None:
            time.sleep(0.05)
        job[killed].kill()
        codes, said = end(job)
        kills.append(codes[killed])
        assert codes[1 - killed] != 0 or codes == [0, 0], said
        assert "Traceback" not in said[1 - killed], said
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # as if both continued on other machines
    assert -9 in kills
    codes, said = end(start("train", command))
    assert codes == [0, 0], said
    codes, said = end(start("train", [*config, str(disk)]))
    assert codes == [0, 0], said
    assert same(f"{url}/model/checkpoints", str(disk / "model" / "checkpoints"))
    assert losses(objects(url)["model/metrics.jsonl"]) == losses((disk / "model" / "metrics.jsonl").read_bytes())
