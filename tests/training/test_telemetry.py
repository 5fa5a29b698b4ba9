from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from ar_unified.training.telemetry import (
    Meter,
    Telemetry,
    Warnings,
    console_line,
    peak_flops,
    read_metrics,
    straggler,
)

ROOT = Path(__file__).resolve().parents[2]


def test_resume_leaves_one_clean_curve(tmp_path):
    first = Telemetry(tmp_path, console=lambda line: None)
    for step in (1, 2, 3, 4):
        first.log(step, {"loss": 1.0 / step})
    first.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # the kill cut off the line of step 4
    second = Telemetry(tmp_path, resume_step=2, console=lambda line: None)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    second.log(3, {"loss": 0.25, "validation/loss": math.nan})
    second.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert json.loads(lines[2])["validation/loss"] is None
    assert list((tmp_path / "tensorboard").iterdir())


def test_meter_adds_sums_and_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ar_unified.training.telemetry.time.perf_counter", lambda: now[0])
    meter = Meter()
    for tokens in (10, 30):
        now[0] += 2.0
        meter.add({"loss": (tokens * 1.0, float(tokens)), "tokens": float(tokens)})
    paused, now[0] = now[0], now[0] + 50
    meter.skip(paused)
    assert meter.totals["loss"] == (40.0, 40.0)
    assert meter.rates("tokens", 80.0, 100.0) == {
        "step_seconds": 2.0, "input_seconds": 0.0, "tokens_per_second": 10.0, "mfu": 0.2,
    }  # fmt: skip


def test_units_of_each_kind_have_a_rate_of_their_own(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ar_unified.training.telemetry.time.perf_counter", lambda: now[0])
    meter = Meter()
    now[0] += 4.0
    meter.add({"tokens": 40.0, "tokens/text": 10.0, "tokens/image": 30.0, "tokens/size": 0.0, "token_ratio": 8.0})
    rates = {key: value for key, value in meter.rates("tokens", None, 1.0).items() if "per_second" in key}
    assert rates == {"tokens_per_second": 10.0, "tokens_per_second/text": 2.5, "tokens_per_second/image": 7.5}
    line = console_line(1, 2, {"loss": 1.0, "grad_norm": 1.0, "step_seconds": 1.0, **rates}, "tokens")
    assert "  10.0 tokens/s (image 7.5, text 2.5)  " in line


def test_console_line_and_peak():
    values = {"loss": 2.5, "grad_norm": 0.5, "tokens_per_second": 12345.0, "step_seconds": 2.0, "mfu": 0.314}
    line = console_line(10, 100, values, "tokens")
    assert line == "step 10/100  loss 2.5000  grad 0.5  12.3k tokens/s  2 s/step  MFU 31.4%  ETA 3:00"
    peak, source = peak_flops()
    assert peak > 1e9 and "measured fp32 matmul on cpu" in source


def test_the_process_that_others_wait_for_is_named():
    assert straggler([0.1, 0.1, 0.13, 0.1], 1.0) == {}
    found = straggler([0.1, 0.1, 0.9, 0.1], 1.0)
    assert list(found) == ["process 2"]
    assert "process 2 of 4 keeps the others waiting: its devices wait 0.9 s" in found["process 2"]


def test_a_warning_is_said_when_it_begins_and_when_it_comes_again():
    said = []
    warnings = Warnings(said.append)
    for line in range(6):
        warnings.update({"a": f"a{line}", "b": "b"} if line != 3 else {"b": "b"})  # does not end "a"
    assert said == ["a0", "b"]
    for _ in range(3):
        warnings.update({"b": "b"})
    warnings.update({"a": "a again", "b": "b"})
    assert said == ["a0", "b", "a again"]


# torch is installed but fails when it is imported, like one built for another CUDA.
BROKEN = "raise OSError('libcudart.so.11.0: cannot open shared object file')"
WRITE = """
import sys
from ar_unified.training.telemetry import Telemetry
assert "tensorboardX" not in sys.modules, "imported before anything is written"
telemetry = Telemetry(sys.argv[1])
telemetry.log(1, {"loss": 1.0})
telemetry.close()
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
try:
    import torch
except OSError:
    print("still broken, and nobody's business")
"""
READ = """
import importlib, sys
for verb in sys.argv[1:]:
    importlib.import_module(f"ar_unified.cli.{verb}")
assert not {"tensorboardX", "torch"} & set(sys.modules), sorted({"tensorboardX", "torch"} & set(sys.modules))
"""


def python(program, *arguments, torch):
    torch.mkdir(exist_ok=True)
    (torch / "__init__.py").write_text(BROKEN)
    paths = os.pathsep.join(map(str, (torch.parent, ROOT, ROOT / "tokenizers")))
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=True, capture_output=True, text=True)


def test_a_broken_torch_breaks_no_training(tmp_path):
    ended = python(WRITE, tmp_path / "run", torch=tmp_path / "torch")
    assert "still broken" in ended.stdout
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_no_verb_loads_tensorboard_or_torch_before_it_writes(tmp_path):
    from ar_unified.cli.arguments import module_of
    from ar_unified.cli.main import VERBS

    python(READ, *map(module_of, VERBS), torch=tmp_path / "torch")
