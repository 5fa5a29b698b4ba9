"""Handles Ctrl-C, SIGTERM and a closed terminal (SIGHUP): work stops at a point where nothing is lost, and one line
reports this.

A signal that the process was told to ignore (`nohup`, a job in the background) stays ignored. In a job of many
processes JAX chooses the step at which all stop, and it listens only to SIGTERM. `forward_to_sigterm` turns the other
signals into SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Interrupted(SystemExit):
    """A signal ended the work. The exit status is 128 + its number, as if the signal had killed the process. `name`:
    the signal's usual name."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__(128 + number)
        self.name = _NAMES.get(signal.Signals(number), signal.Signals(number).name)


class Preempted(Interrupted):
    """A signal stopped a training between two steps, and a checkpoint was saved. The training has already reported
    this."""


@contextmanager
def raised() -> Iterator[None]:
    """A context for a whole program: a signal raises Interrupted in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handling(stop):
        yield


@contextmanager
def noted() -> Iterator[Callable[[], int]]:
    """A context for work in steps. It yields a function that returns the number of the signal that has arrived, or 0 if
    there is none. A second signal raises Interrupted.

    Call the function after every step. Outside the main thread no signal is noticed.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise Interrupted(number)
        came.append(number)
        line = f"{Interrupted(number).name}: stopping after this step with a checkpoint; repeat to stop at once\n"
        os.write(2, line.encode())  # print is not safe inside a handler

    with _handling(note):
        yield lambda: came[0] if came else 0


@contextmanager
def at_once(say: Callable[[Interrupted], object]) -> Iterator[None]:
    """A context for long calls into compiled code: a signal calls `say` and ends the process, without waiting for the
    call to return. Python runs its own handlers only after that.

    Nothing is cleaned up, so the work must have written nothing yet. The compiled code must release the GIL, as XLA's
    compilers do. Outside the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in _SIGNALS:
                stop = Interrupted(number[0])
                say(stop)
                os._exit(int(stop.code or 0))

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    previous = signal.set_wakeup_fd(writer)  # a signal's number is written there as soon as the signal arrives
    try:
        with _handling(lambda *_: None):
            yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        watcher.join()
        os.close(reader)


def forward_to_sigterm() -> None:
    """Turns Ctrl-C and SIGHUP into SIGTERM for the rest of this process."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number, previous in before.items():
            if previous != signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            if previous is not None:  # None: Python did not install the handler and cannot restore it
                signal.signal(number, previous)
