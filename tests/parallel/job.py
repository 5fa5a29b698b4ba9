"""Jobs of several processes on this machine, for tests to disturb; as a script, one process of such a job.

A job trains a bigram model of 3,000 parameters, sharded over processes with one faked device each.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ar_unified.parallel import runtime
from ar_unified.parallel.mesh import make_mesh
from ar_unified.training.step import Stateless
from ar_unified.training.tasks import ratios
from tests.training import tiny

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """The environment of a process that runs from source on one faked device."""
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tokenizers'}", "JAX_PLATFORMS": "cpu"}
    return os.environ | paths | {"JAX_NUM_CPU_DEVICES": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


class Job:
    """Starts the processes of a training in `folder`; `settings` are for TrainingConfig, `pause` is seconds per step.

    absent: processes that are never started.
    """

    def __init__(
        self,
        folder: Path,
        processes: int,
        *,
        heartbeat: int = 10,
        start: int = 120,
        pause: float = 0.0,
        absent: Sequence[int] = (),
        **settings: Any,
    ):
        self.folder, self.before = folder, [0] * processes
        self.before = [len(self.log(i)) for i in range(processes)]
        shared = dict(folder=str(folder), coordinator=f"localhost:{free_port()}", processes=processes)
        shared |= dict(heartbeat=heartbeat, start=start, pause=pause, settings=settings)
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(shared | {"process": i})],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(processes)
            if i not in absent
        ]

    def until(self, step: int) -> None:
        """Waits until this job has said the loss of a step."""
        self.wait(lambda: (self.folder / "logs").exists() and f" step {step}/" in self.log(0))

    def wait(self, reached: Callable[[], object], seconds: float = 400) -> None:
        """Waits until the condition holds, which must happen while all processes run."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline and self.running(), self.end()
            time.sleep(0.01)

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def send(self, process: int, number: signal.Signals) -> None:
        self.processes[process].send_signal(number)

    def kill(self, first: int = 0, gap: float = 0.0) -> None:
        """Kills all processes, like a power failure, one of them `gap` seconds before the others."""
        self.processes[first].kill()
        time.sleep(gap)
        for process in self.processes:
            process.kill()
        self.end()

    def end(self, seconds: float = 400) -> list[tuple[int, str]]:
        """(return code, terminal output) of every process, when all have ended."""
        found = []
        for process in self.processes:
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                output = f"{process.communicate()[0]}\n(did not end within {seconds} s)"
            found.append((process.returncode, output))
        return found

    def log(self, process: int) -> str:
        """What a process of this job has written to its log, without the lines of earlier jobs."""
        path = self.folder / "logs" / f"process-{process}.log"
        return path.read_text()[self.before[process] :] if path.exists() else ""


@dataclass(frozen=True, eq=False)
class Bigram(Stateless):
    """The smallest model that learns: the next token from the embedding of this one. It compiles very quickly."""

    batch: Any
    validation: Any = ()
    name: str = "bigram"
    unit: str = "tokens"

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        embed = 0.1 * jax.random.normal(key, (tiny.VOCABULARY.size, 16))
        return {"embed": embed, "head": jnp.zeros((16, tiny.VOCABULARY.size))}

    def logical_axes(self, params: Any) -> dict[str, tuple[str, str]]:
        return {"embed": ("vocab", "embed"), "head": ("embed", "vocab")}

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        logits = params["embed"][batch.tokens] @ params["head"]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        trained = (batch.targets != tiny.VOCABULARY.pad).astype(jnp.float32)
        loss, weight = jnp.sum(nll * trained), jnp.sum(trained)
        return loss, weight, {"loss": (loss, weight), "tokens": weight}

    def summary(self, totals: Any) -> dict[str, float]:
        return ratios(totals)

    def flops(self, totals: Any) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"kind": self.name}


def train(folder: Path | str, mesh: Any, pause: float = 0.0, **settings: Any) -> None:
    """What each process of a job does, on `mesh`."""

    def batch(step: int, *part: int) -> Any:
        time.sleep(pause)
        return tiny.packed(step, *part)

    validation = [tiny.packed(10_000)] if settings.get("validate_every") else ()
    tiny.run(folder, task=Bigram(batch, validation), mesh=mesh, logger=runtime.say, **settings)


def main() -> None:
    job = json.loads(sys.argv[1])
    with runtime.ending():
        runtime.start(
            job["coordinator"],
            job["processes"],
            job["process"],
            logs=f"{job['folder']}/logs",
            start_timeout=job["start"],
            heartbeat_timeout=job["heartbeat"],
        )
        train(job["folder"], make_mesh(dict(fsdp=-1)), job["pause"], **job["settings"])


if __name__ == "__main__":
    main()
