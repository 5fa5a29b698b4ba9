from __future__ import annotations

import json
import math

from ar_unified.training.telemetry import Meter, Telemetry, console_line, peak_flops, read_metrics, straggler


def test_resume_leaves_one_clean_curve(tmp_path):
    first = Telemetry(tmp_path, console=lambda line: None)
    for step in (1, 2, 3, 4):
        first.log(step, {"loss": 1.0 / step})
    first.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # the kill tore the line of step 4
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


def test_console_line_and_peak():
    values = {"loss": 2.5, "grad_norm": 0.5, "tokens_per_second": 12345.0, "step_seconds": 2.0, "mfu": 0.314}
    line = console_line(10, 100, values, "tokens")
    assert line == "step 10/100  loss 2.5000  grad 0.5  12.3k tokens/s  2 s/step  MFU 31.4%  ETA 3:00"
    peak, source = peak_flops()
    assert peak > 1e9 and "measured fp32 matmul on cpu" in source


def test_the_process_that_others_wait_for_is_named():
    assert straggler([0.1, 0.1, 0.13, 0.1], 1.0) == ""
    assert "process 2 of 4 keeps the others waiting: 0.9 s" in straggler([0.1, 0.1, 0.9, 0.1], 1.0)
