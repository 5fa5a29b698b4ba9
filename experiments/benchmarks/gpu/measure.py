"""Times on the device, the state of the device meanwhile, and the format of a result."""

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
_PER_SECOND = {"TFLOP/s": 1e9, "GB/s": 1e6}  # work by milliseconds


@dataclass(frozen=True)
class Row:
    """Contenders that are timed in turns on the same arrays.

    Attributes:
      work: FLOPs, or bytes, of the part that is useful.
      unit: "TFLOP/s", or "GB/s" where the work is bytes.
      arrays: makes the arguments of every contender.
      contenders: by name; "ours" is ours.
    """

    work: float
    unit: str
    arrays: Callable[[], tuple]
    contenders: dict[str, Callable]

    def measure(self, repeats: int) -> dict[str, Any]:
        """Milliseconds of every contender, `repeats` of each; for one that cannot do it, the reason, which is a result,
        too."""
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
    """By the device's own clock (CUPTI, the sum over the kernels of a call), or wall time where there is no CUPTI."""
    import jax
    import jax.numpy as jnp

    try:
        if device_milliseconds(jax.jit(lambda x: x + 1), (jnp.zeros(1024),)) is not None:
            return device_milliseconds
    except Exception as error:  # whatever CUPTI's absence looks like here, the run must go on
        print(f"no times by the device's clock: {type(error).__name__}: {error}"[:200], flush=True)
    return wall_milliseconds


def device_milliseconds(run: Callable, args: tuple) -> float | None:
    """Time of a call on the GPU, by the profiler of Mosaic GPU; None where it saw no kernel."""
    from jax.experimental.mosaic.gpu import profiler

    return profiler.measure(run)(*args)[1]


def wall_milliseconds(run: Callable, args: tuple, calls: int = 10) -> float:
    """Time of a call by the clock, the mean of several in a row."""
    import jax

    start = time.perf_counter()
    for _ in range(calls):
        out = run(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls * 1e3


def gpu() -> str | None:
    """The name of the first GPU, asked without taking any of its memory."""
    return _ask("name")


def clocks() -> str | None:
    """MHz of the multiprocessors and of memory, watts drawn and allowed, degrees, why it is slowed down."""
    return _ask("clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_throttle_reasons.active")


def _ask(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0].strip() if said else None


def line(result: dict[str, Any]) -> str:
    """A result for people."""
    cells = []
    for name, times in result.get("milliseconds", {}).items():
        median = statistics.median(times)
        rate = result["work"] / _PER_SECOND[result["unit"]] / median
        cells.append(f"{name} {median:.3f} ms {rate:.0f} {result['unit']}")
    cells += [f"{name} {value}" for name, value in result.get("figures", {}).items()]
    cells += [f"{name} failed: {why}" for name, why in result.get("failed", {}).items()]
    wrong = {True: "WRONG  ", False: "right  ", None: ""}[result.get("wrong")]
    return f"{wrong}{result['name']:44s} {' | '.join(cells)}"
