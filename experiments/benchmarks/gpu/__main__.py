"""Checks and measures one H100 or H200 in eight minutes, the most important things first: `make check-gpu`.

    parity      every case of the attention and decode kernels in bfloat16 against the reference, with gradients
    attention   dense causal rows of 4k, 8k and 32k tokens, and packed rows of 8 documents of 1k tokens: ours, cuDNN,
                stock Pallas
    decode      bytes per second of one step of attention over a bfloat16 and an int8 cache: ours, cuDNN, XLA
    training    steps of a 1B model and of some layers of a 7B model: tokens per second, MFU, peak memory
    sampling    images per second of a 7B model with guidance
    rings       decode attention with other sizes of its ring buffer

Each stage runs in its own process, because after a failed kernel nothing else works in that process. If a check ends
the process, a new process goes on with the next check. Every result is written at once, one JSON object per line, to
results/gpu_<device>_<time>.jsonl, with the clocks and the power that the device had before. Each stage has a share of
the time, and leaves unused time to the next stage; --seconds scales all shares.

Without an H100 or H200, everything runs on the CPU with tiny shapes and with XLA instead of our kernels, and results go
to .cache/check_gpu. This only shows that the check itself works. Exit status 1 means that a case was wrong or a check
failed.

Results of the first run: docs/benchmarks.md. For comparison, TFLOP/s of causal attention on H100 SXM at 4k / 8k / 16k
tokens, from tokamax's recorded autotuning data: forward, cuDNN 595 / 629 / 645, tokamax Mosaic GPU 568 / 620 / 636;
backward, tokamax 408 / 438 / 452.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from ar_unified.manifests import Json
from experiments.benchmarks.gpu.measure import clocks, gpu, line
from experiments.benchmarks.gpu.sizes import SIZES

ROOT = Path(__file__).resolve().parents[3]
# Stages in the order in which they run, and their seconds.
STAGES = {"parity": 80.0, "attention": 120.0, "decode": 20.0, "training": 120.0, "sampling": 110.0, "rings": 30.0}
_GRACE = 20.0  # extra seconds that a running check gets when the time of its stage is over
_BEGIN, _RESULT = "begin ", "result "


def main() -> int:
    """Runs all stages, each in its own process; returns 1 if a case was wrong or a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--seconds", type=float, default=sum(STAGES.values()), help="of all stages (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="the file of results")
    parser.add_argument("--worker", nargs=4, metavar=("STAGE", "FIRST", "SIZE", "UNTIL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        stage, first, size, until = arguments.worker
        return work(stage, int(first), size, float(until))

    device = gpu()
    size = "hopper" if device and any(name in device for name in ("H100", "H200")) else "tiny"
    if size == "tiny":
        print(f"no H100 or H200 here ({device or 'no GPU'}): tiny shapes on the CPU, so the numbers mean nothing")
    folder = ROOT / (".cache/check_gpu" if size == "tiny" else "experiments/benchmarks/results")
    name = f"gpu_{(device or 'cpu').replace(' ', '_')}_{time.strftime('%Y%m%d_%H%M%S')}.jsonl"
    path = arguments.output or folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    share = arguments.seconds / sum(STAGES[stage] for stage in arguments.stages)
    until, bad = time.time(), 0
    with open(path, "w", encoding="utf-8") as file:
        write(file, dict(device=device, when=time.strftime("%Y-%m-%dT%H:%M:%S"), commit=commit(), size=size))
        for stage in arguments.stages:
            until += STAGES[stage] * share
            bad += run(stage, size, until, file)
    print(f"{bad} checks were wrong or failed; the results are in {path}")
    return min(bad, 1)


def run(stage: str, size: str, until: float, file: TextIO) -> int:
    """Runs all checks of a stage, in as many processes as needed. Returns how many were wrong or failed."""
    bad, first = 0, 0
    print(f"---- {stage}", flush=True)
    while time.time() < until:
        command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--worker", stage, str(first), size, str(until)]
        worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        timer = threading.Timer(max(until - time.time(), 0) + _GRACE, worker.kill)
        timer.start()
        begun: dict[str, Any] | None = None
        assert worker.stdout is not None
        for text in worker.stdout:
            if text.startswith(_BEGIN):
                begun = json.loads(text.removeprefix(_BEGIN))
                first = begun["number"] + 1
            elif text.startswith(_RESULT):
                result, begun = json.loads(text.removeprefix(_RESULT)), None
                bad += said(result, file)
            else:
                print(text, end="", flush=True)
        status = worker.wait()
        timer.cancel()
        if begun is not None:  # a check was running and ended with its process
            why = "no time was left" if time.time() >= until else f"its process ended with status {status}"
            bad += said(dict(stage=stage, name=begun["name"], failed={"process": why}, clocks=clocks()), file)
        elif status != AGAIN:
            if status:  # before its first check, or between two checks
                bad += said(
                    dict(stage=stage, name="the stage", failed={"process": f"ended with status {status}"}), file
                )
            break
    return bad


AGAIN = 75  # a worker's exit status if it can no longer use the device


def work(stage: str, first: int, size: str, until: float) -> int:
    """Runs the checks of a stage in this process, from number `first` on."""
    checks = importlib.import_module(f"experiments.benchmarks.gpu.{stage}").checks(SIZES[size])
    for number, (name, check) in enumerate(checks):
        if number < first:
            continue
        if time.time() >= until:
            print(f"no time for {len(checks) - number} of {len(checks)} checks", flush=True)
            break
        print(_BEGIN + json.dumps(dict(number=number, name=name)), flush=True)
        began, before = time.time(), clocks()
        try:
            found = check()
        except Exception as error:  # the other checks may still work
            traceback.print_exc()
            found = dict(failed={"ours": f"{type(error).__name__}: {error}"[:500]})
        result = dict(stage=stage, name=name) | found | dict(clocks=before, seconds=round(time.time() - began, 1))
        print(_RESULT + json.dumps(result), flush=True)
        if "CUDA_ERROR" in json.dumps(found.get("failed", {})):
            return AGAIN
    return 0


def said(result: dict[str, Any], file: TextIO) -> bool:
    """Writes and prints a result. Returns whether it counts as an error: False if only another library failed."""
    write(file, result)
    print(line(result), flush=True)
    return bool(result.get("wrong")) or bool({"ours", "process"} & result.get("failed", {}).keys())


def write(file: TextIO, row: dict[str, Json]) -> None:
    """Appends a result to the file at once, so a crash loses none."""
    file.write(json.dumps(row) + "\n")
    file.flush()


def commit() -> str | None:
    """The revision of the repository, or None if git gives none."""
    try:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
