"""What a run reports: JSONL, TensorBoard, lines on the console, and its speed."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ar_tokenizers.trees import Metrics, Totals

from ar_unified import storage
from ar_unified.metrics import read_metrics
from ar_unified.parallel.hardware import of_kind


@functools.cache
def peak_flops() -> tuple[float, str]:
    """Returns (FLOP/s of all devices together, the source of the number). On a CPU or unknown hardware, it is measured
    once.

    The measured peak is the best of a few fp32 products of 1024 x 1024 matrices on one device. Simulated CPU devices
    share one processor, so their peak is not multiplied by the number of devices.
    """
    device = jax.devices()[0]
    if (known := of_kind(device.device_kind)) is not None:
        return known.flops * jax.device_count(), f"{known.kind} data sheet, bf16"
    n = 1024
    matrix = jax.device_put(np.ones((n, n), np.float32), jax.local_devices()[0])
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    devices = 1 if device.platform == "cpu" else jax.device_count()
    return 2 * n**3 / best * devices, f"measured fp32 matmul on {device.device_kind}"


def device_memory() -> dict[str, float]:
    """GiB in use now, and the peak so far, on the fullest device of this process; {} if JAX does not say (CPU)."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    keys = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
    return {name: max(s[key] for s in stats) / 2**30 for name, key in keys.items() if stats and key in stats[0]}


def straggler(before: Sequence[float], step_seconds: float) -> dict[str, str]:
    """{"process I": a warning} if the others wait for process I; {} if there is no such process.

    All processes begin a step together, so one process with slow batches makes all devices idle.

    Args:
      before: for each process, the mean seconds that its devices waited for the batch of a step.
      step_seconds: the mean seconds of a step. A wait is reported if it exceeds the median wait by more than a tenth
        of a step.
    """
    slowest = int(np.argmax(before))
    usual = float(np.median(before))
    if before[slowest] - usual <= 0.1 * step_seconds:
        return {}
    said = (
        f"process {slowest} of {len(before)} keeps the others waiting: its devices wait {before[slowest]:.3g} s for "
        f"each batch, the devices of the others {usual:.3g} s, and a step takes {step_seconds:.3g} s; check the "
        f"storage, the memory and other jobs of the host of process {slowest}"
    )
    return {f"process {slowest}": said}


class Warnings:
    """Prints a warning when it becomes true, but does not repeat it at every log line while it stays true.

    If a warning is absent from `_GONE` calls in a row, it has ended, and is printed again if it returns. So a number
    that oscillates around a threshold causes only one warning.
    """

    _GONE = 3

    def __init__(self, say: Callable[[str], object]):
        self._say = say
        self._absent: dict[str, int] = {}  # by kind, calls since the warning was last true

    def update(self, found: Mapping[str, str]) -> None:
        """found: the warnings that are true now, by kind. Numbers in their text may change from call to call."""
        for kind, words in found.items():
            if kind not in self._absent:
                self._say(words)
        absent = {kind: n + 1 for kind, n in self._absent.items() if n + 1 < self._GONE}
        self._absent = absent | dict.fromkeys(found, 0)


class Meter:
    """Adds up the metric sums of the steps between two log lines, and the time they took."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts counting again from zero."""
        self.totals: Totals = {}
        self.steps = 0
        self.waited = 0.0  # seconds in which idle devices waited for a batch
        self.started = time.perf_counter()

    def add(self, values: Metrics) -> None:
        """Adds the metric sums of one step, on the host."""
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), values)  # float32 is not precise enough for long sums
        self.totals = jax.tree.map(np.add, self.totals, wide) if self.totals else wide
        self.steps += 1

    def skip(self, since: float) -> None:
        """Leaves out the time from `since` (of perf_counter) until now, which was spent on validation or previews."""
        self.started += time.perf_counter() - since

    def rates(self, unit: str, flops: float | None, peak: float) -> dict[str, float]:
        """Seconds per step, the part of this time spent waiting for input, units per second, and MFU = FLOPs the model
        needs / (time * peak).

        Plain sums named "UNIT/KIND" are parts of the units. Each sum above 0 has its own rate, "UNIT_per_second/KIND";
        the rates add up to the rate of all units.
        """
        seconds = max(time.perf_counter() - self.started, 1e-9)
        rates = {"step_seconds": seconds / self.steps, "input_seconds": self.waited / self.steps}
        for name, total in self.totals.items():
            if isinstance(total, tuple):
                continue
            if name == unit or (name.startswith(f"{unit}/") and total > 0):
                rates[f"{unit}_per_second{name.removeprefix(unit)}"] = float(total) / seconds
        return rates | ({"mfu": flops / seconds / peak} if flops is not None else {})


class Telemetry:
    """Writes `<folder>/metrics.jsonl` and `<folder>/tensorboard`; only the first process of a run writes.

    A line is one JSON object with "step" (steps taken) and numbers. Validation has separate lines with keys
    "validation/...". A number that is not finite is written as null, because NaN is not JSON.

    Args:
      folder: the folder of the run.
      resume_step: the step from which the run starts. Lines of later steps, and an incomplete last line, are dropped,
        so that a killed and resumed run has the same curve as an uninterrupted one.
      console: receives the lines for people.
    """

    def __init__(self, folder: str | Path, *, resume_step: int = 0, console: Callable[[str], object] = print):
        self.active = jax.process_index() == 0
        self.console = console
        if not self.active:
            return
        self._folder = Path(folder)
        path = self._folder / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            temporary = path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in read_metrics(path, until=resume_step)))
            temporary.replace(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._board = _summary_writer()(str(Path(folder) / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one whole line in one write, and the same numbers to TensorBoard."""
        if not self.active:
            return
        row = {"step": step} | {key: value if math.isfinite(value) else None for key, value in values.items()}
        os.write(self._file, (json.dumps(row) + "\n").encode())
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images, uint8 [H, W, 3] by name, to TensorBoard."""
        if self.active:
            for name, pixels in images.items():
                self._board.add_image(name, np.asarray(pixels), step, dataformats="HWC")

    def keep(self) -> None:
        """Uploads everything written so far, if the run is in an object store."""
        if self.active:
            self._board.flush()
            storage.push(self._folder)

    def say(self, line: str) -> None:
        """Prints a line, if this process prints."""
        self.console(line)

    def close(self) -> None:
        """Closes metrics.jsonl and TensorBoard's file."""
        if self.active:
            os.close(self._file)
            self._board.close()


def _summary_writer() -> Any:
    """tensorboardX's SummaryWriter, imported only by the process that writes.

    If torch is installed, tensorboardX imports it for a type annotation. This takes seconds, or ends the run if torch
    is broken. tensorboardX works without torch, so torch is hidden during this import unless it is already loaded.
    """
    if "torch" in sys.modules:
        from tensorboardX import SummaryWriter
    else:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ImportError
        try:
            from tensorboardX import SummaryWriter
        finally:
            sys.modules.pop("torch")
    return SummaryWriter


def console_line(step: int, steps: int, values: Mapping[str, float], unit: str) -> str:
    """A line such as:

    step 200/1000  loss 3.1416  grad 0.52  12.3k tokens/s (image 9k, text 3.3k)  0.2 s/step  MFU 31.4%  ETA 2:48
    """
    rate = f"{unit}_per_second"
    kinds = {key.removeprefix(f"{rate}/"): value for key, value in values.items() if key.startswith(f"{rate}/")}
    parted = ", ".join(f"{kind} {_short(v)}" for kind, v in sorted(kinds.items(), key=lambda item: -item[1]))
    seconds = values["step_seconds"]
    left = round((steps - step) * seconds)
    hours, minutes = divmod(left // 60, 60)
    parts = [
        f"step {step}/{steps}",
        f"loss {values['loss']:.4f}" if "loss" in values else "no loss",  # if no token of a batch is trained
        *([f"reward {values['reward']:.4f}"] if "reward" in values else ()),
        f"grad {values['grad_norm']:.3g}",
        f"{_short(values[rate])} {unit}/s" + (f" ({parted})" if len(kinds) > 1 else ""),
        f"{seconds:.3g} s/step",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    return "  ".join([*parts, f"ETA {f'{hours}:{minutes:02}' if hours else minutes}:{left % 60:02}"])


def _short(rate: float) -> str:
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.1f}"
