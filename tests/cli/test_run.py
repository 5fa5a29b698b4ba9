"""All stages of `run`, with and without kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ar_unified.checkpoint import Checkpoints
from ar_unified.cli.main import main
from ar_unified.experiment import config as configs
from ar_unified.experiment.experiment import Experiment
from ar_unified.workdir import Workdir, read_json, write_json
from tests.cli.conftest import ROOT, command, refused
from tests.moments import random_moments


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a `run` that was not interrupted."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert main(command("run", folder, workdir)) == 0
    return workdir


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """Every trained parameter of both networks."""
    config = json.loads((workdir / "config.json").read_text())
    found = load_file(workdir / "image_tokenizer" / "weights.safetensors")
    argv = command("run", Path(config["data"]["train"][0]["path"]), workdir)
    experiment = Experiment(configs.load(argv[2], argv[5:]), Workdir(workdir))
    flat = {}

    def walk(tree, name):
        for key, value in tree.items():
            walk(value, f"{name}.{key}") if isinstance(value, dict) else flat.__setitem__(f"{name}.{key}", value)

    walk(experiment.params, "model")
    return {**found, **{name: np.asarray(value) for name, value in flat.items()}}


@pytest.mark.slow
def test_a_run_leaves_everything_and_is_not_redone(finished, folder, capsys):
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["parse_rate"] == 1.0
    assert evaluation["validation"]["loss"] > 0
    assert evaluation["tokenizer"]["validation"]["psnr"] > 0 and (finished / "tokenizer_evaluation").is_dir()
    assert "</html>" in (finished / "report.html").read_text()
    rows = [json.loads(line) for line in (finished / "samples" / "samples.jsonl").read_text().splitlines()]
    assert rows and not [row for row in rows if "error" in row]
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert main(command("run", folder, finished)) == 0
    assert capsys.readouterr().out.count("done already") == 7
    changed = [path for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert changed == []


@pytest.mark.slow
def test_another_config_is_refused_not_mixed_in(finished, folder):
    refused(command("run", folder, finished, image_tokenizer__width=16), "image_tokenizer.width")


@pytest.mark.exact
@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_parameters(finished, folder, tmp_path):
    workdir = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tokenizers'}"}
    program = [sys.executable, "-m", "ar_unified.cli.main", *command("run", folder, workdir)]
    random = random_moments()
    # Moments in different stages, on a machine of any speed: a random time after a certain file appears.
    moments = [
        workdir / "image_tokenizer" / "metrics.jsonl",
        workdir / "data" / "started.json",
        workdir / "model" / "metrics.jsonl",
    ]
    for moment in moments:
        process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while not moment.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(random.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert moment.exists(), "the run was to be killed after this file appeared"
    assert not (workdir / "evaluation.json").exists()
    subprocess.run(program, env=environment, check=True, stdout=subprocess.DEVNULL)

    expected, found = parameters(finished), parameters(workdir)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert Checkpoints(workdir / "model" / "checkpoints", readonly=True).latest() == 24


def test_a_refused_start_writes_nothing(folder, tmp_path):
    work = tmp_path / "work"
    refused(command("run", folder, work, evaluation__protocol="exactly"), "config.evaluation.protocol: .*mean 'exact'")
    refused(command("run", folder, work, data__tests="ConfigDict"), "config.data.tests")
    refused(command("run", tmp_path / "none", work), r"config.data.train\[0\]: .*none")
    assert not work.exists()
    work.mkdir()
    write_json(work / "config.json", {"name": "before"})
    refused(command("run", folder, work, training__batch_size=6), "config.training.batch_size")
    assert [path.name for path in work.iterdir()] == ["config.json"]
    assert read_json(work / "config.json") == {"name": "before"}
