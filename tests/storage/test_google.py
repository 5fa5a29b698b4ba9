"""gs:// with a server that has Google's API (gcp-storage-emulator): sources, a workdir, and Orbax's checkpoints.

The emulator does not know `ifGenerationMatch`, so races for a claim are only tested with the S3 server.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ar_unified.cli.main import main
from tests.cli.test_prepare_on_two import shards
from tests.parallel.job import free_port
from tests.storage.test_workdir import in_store, losses, same, set_up
from tests.stores import objects, put_folder, using

pytestmark = pytest.mark.slow


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    more = ["--in-memory", "--default-bucket=bucket"]
    server = subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # gcsfs asks for a bucket's kind with gRPC, which the emulator does not have. It reads this variable on import.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    here = f"http://127.0.0.1:{port}"
    variables = {"STORAGE_EMULATOR_HOST": here, "TENSORSTORE_GCS_HTTP_URL": here}
    with using(variables | {"AR_UNIFIED_CACHE": str(tmp_path / "cache"), "AR_UNIFIED_STORE_PATIENCE": "30"}):
        time.sleep(2)
        try:
            yield "gs://bucket/run"
        finally:
            server.kill()
            server.wait()


def test_a_training_in_googles_store_is_that_on_disk_and_goes_on_from_any_machine(url: str, tmp_path: Path) -> None:
    config, disk = set_up(tmp_path, 600), tmp_path / "disk"
    put_folder(tmp_path / "corpus", "gs://bucket/corpus")
    there = [word.replace(str(tmp_path / "corpus"), "gs://bucket/corpus") for word in config]
    for verb in ("tokenizer", "prepare", "train"):
        assert main([verb, *config, str(disk)]) == main([verb, *there, url]) == 0
        shutil.rmtree(tmp_path / "cache")  # as on another machine
    assert in_store(url) == shards(disk)
    longer = [[word.replace("steps=6", "steps=9") for word in each] for each in (config, there)]
    assert main(["train", *longer[0], str(disk)]) == main(["train", *longer[1], url]) == 0
    assert same(f"{url}/model/checkpoints", str(disk / "model" / "checkpoints"))
    rows = objects(url)["model/metrics.jsonl"]
    assert losses(rows) == losses((disk / "model" / "metrics.jsonl").read_bytes()) and len(losses(rows)) >= 9
