"""Runs many processes as one program. This is the only module that uses `jax.distributed`.

Every process of a job runs the same command. `start` joins them, from flags or the cluster's environment; `barrier`
lets them wait for each other; `ending` ends them together. A single process is the usual case and costs nothing:
nothing is started, and every function returns at once.

JAX's coordination service watches over the processes: if one is gone, it ends the others within the heartbeat time-out,
even those that wait inside a collective. `last_words.py` then says what happened.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

# These imports are private, because no public API can do three things. It cannot find the cluster before anything
# starts (jax.distributed.initialize tells only after the start). It cannot set the time-out of the service, which names
# missing processes (initialize does not pass its own on). It cannot send a message to all processes without a device.
from jax._src import clusters, distributed
from jax._src.lib import _jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import multihost  # barriers of the coordination service; JAX's public ones are device collectives

from ar_unified import errors, interrupts, storage
from ar_unified.errors import RunError, UserError
from ar_unified.parallel import last_words

_TICK = 0.5  # seconds between two calls of `preempted` in `apart`
_LATE = 20  # most ticks by which two processes may differ after a barrier
ALONE = 14 * 86400.0  # seconds; in practice no time-out
_GRACE = 3.0  # seconds that process 0 waits before it ends, so that others write their messages: its end stops them
# Errors of collectives that lost a peer, from gloo, NCCL and the coordination service.
_PEER_LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection (reset|closed|refused)|heartbeat")


class ProcessesMissing(RunError):
    """Other processes did not reach a barrier in time; the message names them. `processes`: their numbers, if known."""

    def __init__(self, message: str, processes: list[int]):
        super().__init__(message)
        self.processes = processes


class _Log:
    """The log of this process, and the reader that receives its stderr. It exists only if there are several
    processes."""

    def __init__(self, folder: Path, process: int, processes: int, coordinator: str, heartbeat_timeout: int):
        self.heartbeat_timeout = heartbeat_timeout
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"process-{process}.log"
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        facts = [str(path), str(process), str(processes), coordinator]
        command = [sys.executable, "-I", "-S", last_words.__file__, *facts]
        self.reader = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert self.reader.stdin is not None
        self.streams = {2: os.dup(2)} | ({1: os.dup(1)} if process else {})
        for stream in self.streams:
            os.dup2(self.reader.stdin.fileno(), stream)
        self.reader.stdin.close()

    def write(self, line: str) -> None:
        os.write(self.file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())

    def close(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(2, f"{last_words.FAREWELL}\n".encode())
        for stream, terminal in self.streams.items():  # closes the pipe, unless a child of ours still has it
            os.dup2(terminal, stream)
        self.reader.wait(timeout=10)


_log: _Log | None = None
_asked = 0


# ---- start and end --------------------------------------------------------------------------------------------------


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    logs: str | Path,
    start_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the processes of this job, before the first JAX computation.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: the number of processes.
      process: the index of this one, from 0. Give all three or none. With none, JAX reads the environment (SLURM, GKE,
          TPU metadata, Open MPI, Kubernetes); if it names no job, or a job of one process, nothing is started.
          `processes=1` alone: nothing is started.
      logs: folder for `process-<i>.log`, on storage that all processes share; not touched by a single process.
      start_timeout: seconds within which all processes must join.
      heartbeat_timeout: seconds of silence after which a process counts as dead.

    Raises UserError for flags that do not fit together. A time-out ends the process; its last message names who is
    missing.
    """
    global _log
    given = [value is not None for value in (coordinator, processes, process)]
    if processes == 1 and not (coordinator or process):
        return
    if not any(given):
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        where = os.environ.get("JAX_COORDINATOR_ADDRESS")
        coordinator, processes, process, _ = detect(where, None, None, None, None, start_timeout)
        if processes is None or processes == 1:
            return
    if coordinator is None or processes is None or process is None:
        found = f"coordinator={coordinator}, processes={processes}, process={process}"
        raise UserError(f"expected --coordinator HOST:PORT, --processes N and --process I, all three; found {found}")
    if not 0 <= process < processes or not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            f"expected --coordinator HOST:PORT and 0 <= --process < --processes; found {coordinator}, "
            f"process {process} of {processes}"
        )
    _log = _Log(Path(logs), process, processes, coordinator, heartbeat_timeout)
    _log.write(
        f"process {process} of {processes}, coordinator {coordinator}, pid {os.getpid()} on {os.uname().nodename}"
    )
    # The service times out first, and tells all present clients which processes are missing. The clients' own time-out
    # is for a service that does not answer.
    service = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = partial(service, cluster_register_timeout=start_timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=start_timeout + 5,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    finally:
        _jax.get_distributed_runtime_service = service
    interrupts.forward_to_sigterm()  # the one signal that JAX lets all processes agree on
    # By default, Orbax's manager waits with device collectives, which would mix with those of the step.
    flags.FLAGS["experimental_orbax_use_distributed_barrier"].value = True
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """A context for a whole program. All processes end together, but one that fails ends at once and says why."""
    try:
        yield
    except Exception as error:
        if _log is not None:
            _fail(error)
        raise
    except BaseException:  # such as SystemExit, which all processes raise at the same place
        _stop()
        raise
    _stop()


def _stop() -> None:
    global _log
    if _log is None:
        return
    jax.distributed.shutdown()  # waits for the others
    log, _log = _log, None
    log.close()


def _fail(error: Exception) -> None:
    """Reports the error and ends this process. It does not wait for the others, because they may be waiting for this
    one."""
    assert _log is not None
    explained = errors.explain(error)
    try:
        _explain(error, None if explained is None else explained[0])
        _log.close()
    finally:
        os._exit(errors.FAULT if explained is None else explained[1])


def _explain(error: Exception, explained: str | None) -> None:
    assert _log is not None
    lost = _PEER_LOST.search(str(error)) and not isinstance(error, ProcessesMissing)
    if explained is not None:
        print(f"ar-unified: {explained}", file=sys.stderr, flush=True)
    elif lost:  # the connection failed, not this process
        _log.write("".join(traceback.format_exception(error)))
    else:
        traceback.print_exception(error)
    if lost:
        print(
            "ar-unified: a connection broke (the log of this process has the error). JAX names the lost process within "
            "the heartbeat time-out",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_log.heartbeat_timeout + 10)  # JAX ends this process meanwhile, and names the lost process
    if jax.process_index() == 0:
        time.sleep(_GRACE)


# ---- while it runs --------------------------------------------------------------------------------------------------


def first() -> bool:
    """Whether this is process 0, which writes everything that is written only once."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line for people. Only process 0 prints to the terminal; with several processes, each writes the line to
    its log."""
    if first():
        try:
            print(line, flush=True)
        except OSError:  # the terminal or the pipe was closed; the log continues
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if _log is not None:
        _log.write(line)


def barrier(name: str, timeout: float = 600.0) -> None:
    """Waits until every process is at the barrier of this name. It uses the coordination service and no device.

    After the barrier, this process sees what the others wrote into the workdir before the barrier, even if the workdir
    is in an object store.

    Raises ProcessesMissing after `timeout` seconds, naming those that did not arrive.
    """
    if jax.process_count() == 1:
        return
    try:
        multihost.get_barrier_sync_fn()(key=f"ar_unified/{name}", timeout_ms=int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        lost = last_words.missing(str(error))
        who = last_words.gone(lost) if lost else f"the coordination service says: {str(error)[:500]}"
        where = f"waited {timeout:g} s at the barrier {name!r}"
        raise ProcessesMissing(f"{where}: {who}. {last_words.AGAIN}", lost) from error
    storage.refresh()


def preempted() -> bool:
    """Whether all processes stop now, because one of them received SIGTERM and all have agreed to stop at this call.

    All processes must call it equally often, at the end of every step. It needs JAX's own handler of SIGTERM, so no
    other handler may be installed. Always False for a single process.
    """
    global _asked
    if _log is None:
        return False
    # It counts calls, not steps: a second training in this process starts at step 0 again, which is before the step on
    # which the processes may have agreed.
    _asked += 1
    return multihost_utils.reached_preemption_sync_point(_asked)


@contextlib.contextmanager
def apart() -> Iterator[Callable[[], None]]:
    """A context for work that each process does at its own pace. It yields a function that each process calls
    repeatedly. About a second after a SIGTERM to one process, this function raises Preempted in all processes. All
    processes leave the block together.

    `preempted` must be called equally often in all processes. Here the processes share nothing but the clock, so it is
    called once per tick of the clock.
    """
    barrier("apart", timeout=ALONE)
    asked, began, stop = _asked, time.monotonic(), None

    def until(calls: int) -> None:
        while _log is not None and _asked < calls:
            if preempted():
                say("SIGTERM: stopped. Finished work is kept, and the same command continues from there")
                raise interrupts.Preempted(signal.SIGTERM)

    try:
        yield lambda: until(asked + int((time.monotonic() - began) / _TICK))
    except interrupts.Preempted as raised:
        stop = raised
    barrier("together", timeout=ALONE)
    if stop is None:  # a finished process may not know yet that the others were stopped
        until(_told(f"ticks {asked}", _asked + _LATE))
    else:
        _told(f"ticks {asked}", _asked + _LATE)
        raise stop


def _told(name: str, number: int) -> int:
    """Sends process 0's `number` to all processes."""
    client = distributed.global_state.client
    if client is None:
        return number
    if first():
        client.key_value_set(f"ar_unified/{name}", str(number))
    return int(client.blocking_key_value_get(f"ar_unified/{name}", 600_000))


def to_host(tree: Any) -> Any:
    """Copies arrays on any mesh to numpy arrays on process 0; other processes get None. All processes must call it.

    It copies leaf by leaf; each leaf is briefly whole on every device.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def one(x: Any) -> np.ndarray | None:
        whole = jax.jit(_same, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)
        return np.asarray(whole.addressable_data(0)) if first() else None

    host = jax.tree.map(one, tree)
    return host if first() else None


def _same(x: jax.Array) -> jax.Array:
    return x
