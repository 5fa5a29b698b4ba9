"""Measures times on the device and the device's state, and formats results."""

from __future__ import annotations

import functools
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ar_unified.manifests import Json

Check = tuple[str, Callable[[], dict[str, Json]]]
_PER_SECOND = {"TFLOP/s": 1e9, "GB/s": 1e6}  # unit -> the divisor of work / milliseconds


@dataclass(frozen=True)
class Row:
    """Contenders that are timed in turns on the same arrays.

    Attributes:
      work: the useful FLOPs or bytes of one call.
      unit: "TFLOP/s", or "GB/s" if the work is bytes.
      arrays: makes the arguments of every contender.
      contenders: functions by name; "ours" is this project's kernel.
    """

    work: float
    unit: str
    arrays: Callable[[], tuple]
    contenders: dict[str, Callable]

    def measure(self, repeats: int) -> dict[str, Any]:
        """The milliseconds of every contender, `repeats` numbers for each, or the reason why a contender failed."""
        import jax

        args, milliseconds = self.arrays(), timer()
        found: dict[str, Any] = dict(
            work=self.work, unit=self.unit, timer=milliseconds.__name__, milliseconds={}, failed={}
        )
        ready = {}
        for name, run in self.contenders.items():
            try:
                jax.block_until_ready(run(*args))
                milliseconds(run, args)
                ready[name] = run
            except Exception as error:
                found["failed"][name] = f"{type(error).__name__}: {error}"[:300]
        for _ in range(repeats):
            for name, run in ready.items():
                found["milliseconds"].setdefault(name, []).append(milliseconds(run, args))
        return found


@functools.cache
def timer() -> Callable[[Callable, tuple], float | None]:
    """A timer that uses the device's clock (CUPTI, the sum over the kernels of a call), or wall time if there is no
    CUPTI."""
    import jax
    import jax.numpy as jnp

    try:
        if device_milliseconds(jax.jit(lambda x: x + 1), (jnp.zeros(1024),)) is not None:
            return device_milliseconds
    except Exception as error:  # a missing CUPTI may raise anything, and the run must go on
        print(f"no times by the device's clock: {type(error).__name__}: {error}"[:200], flush=True)
    return wall_milliseconds


def device_milliseconds(run: Callable, args: tuple) -> float | None:
    """Time of a call on the GPU, from the profiler of Mosaic GPU, or None if it saw no kernel."""
    from jax.experimental.mosaic.gpu import profiler

    return profiler.measure(run)(*args)[1]


def wall_milliseconds(run: Callable, args: tuple, calls: int = 10) -> float:
    """Wall time of a call, the mean of several calls in a row."""
    import jax

    start = time.perf_counter()
    for _ in range(calls):
        out = run(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls * 1e3


def gpu() -> str | None:
    """The name of the first GPU. Asking for it takes none of the GPU's memory."""
    return _ask("name")


def clocks() -> str | None:
    """Clocks of multiprocessors and memory in MHz, power and its limit in watts, temperature, and reasons for
    throttling."""
    return _ask("clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_throttle_reasons.active")


def _ask(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0].strip() if said else None


def line(result: dict[str, Any]) -> str:
    """A result as a readable line."""
    cells = []
    for name, times in result.get("milliseconds", {}).items():
        median = statistics.median(times)
        rate = result["work"] / _PER_SECOND[result["unit"]] / median
        cells.append(f"{name} {median:.3f} ms {rate:.0f} {result['unit']}")
    cells += [f"{name} {value}" for name, value in result.get("figures", {}).items()]
    cells += [f"{name} failed: {why}" for name, why in result.get("failed", {}).items()]
    wrong = {True: "WRONG  ", False: "right  ", None: ""}[result.get("wrong")]
    return f"{wrong}{result['name']:44s} {' | '.join(cells)}"
