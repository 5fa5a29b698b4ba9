"""Locks for one process at a time. They use one operation of a store, which creates an object unless it exists.

A lock is a series of objects, NAME.000001, NAME.000002, and so on. The process that creates the next one has the lock.
This process, the holder, writes to its object again and again. If it writes nothing new for the length of a lease
(AR_UNIFIED_STORE_LEASE, 60 s), another process may create the next object. The clocks of two machines are never
compared. A holder that finds a higher number than its own has lost the lock, and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ar_unified.errors import RunError
from ar_unified.storage import stores

_LEASE = 60.0  # seconds; a holder writes four times in a lease
_BOOT = "/proc/sys/kernel/random/boot_id"


class LockLost(RunError):
    """Another process took the lock, because this process had written nothing for too long."""


class Held(Exception):
    """Another process has the lock; the message says which."""


class Lock:
    """A lock that this process has until it calls `release` or ends.

    Args:
        url: the URL of the series of objects, without the number.

    Attributes:
        number: the number of this process's object in the series.
        lost: whether another process has a higher number.
        waited: whether this process waited for a previous holder to end; that holder may have written files meanwhile.

    Raises Held if another process has the lock.
    """

    def __init__(self, url: str):
        self._url, self._folder, self._name = url, *url.rsplit("/", 1)
        self._lease = float(os.environ.get("AR_UNIFIED_STORE_LEASE", _LEASE))
        self._who = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        self._token = uuid.uuid4().hex
        self.waited = False
        self._beats = 0
        self.number = self._take()
        self.lost = self._ended = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LockLost if another process has taken the lock."""
        if self.lost:
            raise LockLost(
                f"{self._at(self.number)}: another process has taken over this lock, because this process did not "
                f"renew it for {self._lease:g} s. This process writes nothing more: wait until the other process ends, "
                "or end it, and start again"
            )

    def release(self) -> None:
        """Gives the lock back, unless it was taken over."""
        self._stop.set()
        self._thread.join()
        if not self.lost:
            stores.write(self._at(self.number), self._says(released=True))

    def _take(self) -> int:
        while True:
            numbers = self._numbers()
            last = numbers[-1] if numbers else 0
            if last:
                self._await(last)
            if stores.create(self._at(last + 1), self._says()):
                for number in numbers:
                    stores.delete(self._at(number))
                return last + 1
            # another process was faster: look again, to find out which one and whether it is alive

    def _await(self, number: int) -> None:
        """Waits until the holder with this number has ended, or has written nothing for a lease. Raises Held if the
        holder still writes.
        """
        first = self._read(number)
        if _is_gone(first):
            return
        self.waited = True
        until = time.monotonic() + self._lease
        while time.monotonic() < until:
            time.sleep(min(self._lease / 8, 2.0))
            now = self._read(number)
            if _is_gone(now):
                return
            if now != first:
                raise Held(str(now.get("who", "another process")))

    def _numbers(self) -> list[int]:
        names = stores.listed(self._folder)[0]
        ends = (name.removeprefix(f"{self._name}.") for name in names if name.startswith(f"{self._name}."))
        return sorted(int(end) for end in ends if end.isdecimal())

    def _read(self, number: int) -> dict[str, object]:
        try:
            found = json.loads(stores.read(self._at(number)))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _at(self, number: int) -> str:
        return f"{self._url}.{number:06d}"

    def _says(self, released: bool = False) -> bytes:
        said = {"who": self._who, "host": _machine(), "pid": os.getpid(), "token": self._token}
        return json.dumps(said | {"beat": self._beats, "released": released}).encode()

    def _beat(self) -> None:
        while not self._stop.wait(self._lease / 4):
            self._beats += 1
            with contextlib.suppress(RunError):  # if the store cannot be reached, other requests report that
                if max(self._numbers(), default=0) > self.number:
                    self.lost = True
                    return
                stores.write(self._at(self.number), self._says())


def _machine() -> str:
    """A name for the scope in which a process number is unique. Containers of one host may share its host name."""
    try:
        return f"{socket.gethostname()} {Path(_BOOT).read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.uuid4().hex}"  # a random name, so that no holder seems to be gone


def _is_gone(said: dict[str, Any]) -> bool:
    """Whether a holder has certainly ended, because it said so or its process on this machine is gone. Never waits."""
    if not said or said.get("released"):
        return True
    if said.get("host") != _machine() or not isinstance(said.get("pid"), int):
        return False
    try:
        os.kill(said["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
