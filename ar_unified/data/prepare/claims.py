"""Divides work among processes that share a folder. No process has to know whether the others are alive.

A claim to a piece of work is a small file that names its owner. The owner rewrites it again and again. A claim that has
not changed for `lease` seconds is void, and any free process takes the piece over. Sometimes two processes do the same
piece, so both must write the same bytes. Claims only avoid double work. Nothing depends on locks or on the clocks of
other hosts.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ar_unified import storage


@dataclass(frozen=True)
class Team:
    """The number of this process, and the number of all processes. A process that is alone claims nothing.

    Attributes:
        lease: seconds after which anyone may take a claim that was not renewed. It must be longer than the longest time
            between two calls of `Claims.renew`, including a compilation.
        alive: called again and again, also while this process waits for others. If it raises, the work ends.
    """

    process: int = 0
    processes: int = 1
    lease: float = 120.0  # network file systems show a change up to 60 s late
    alive: Callable[[], object] = lambda: None


class Claims:
    """The claims of one job. The team shares `folder`, which the first claim creates."""

    def __init__(self, folder: Path, team: Team):
        self._folder, self._team = folder, team
        self._me = f"process {team.process} of {team.processes}: {os.getpid()} on {socket.gethostname()}"
        self._held: Path | None = None
        self._renewed = 0.0
        self._seen: dict[Path, tuple[bytes, float]] = {}  # others' claims: the text, and when it was first seen

    def work(self, pieces: Sequence[str], done: Callable[[str], bool], do: Callable[[str], object]) -> None:
        """Does pieces of work until all pieces are done, by this process or by others.

        This process does its own pieces first (piece i belongs to process i mod P). Then it takes, from the end of the
        list, pieces that others have not begun or have abandoned.

        Args:
            pieces: the names of the pieces. All processes have the same names, in the same order.
            done: says whether the result of a piece exists.
            do: makes the result of a piece, and calls `renew` meanwhile.
        """
        process, processes = self._team.process, self._team.processes
        mine = pieces[process::processes]
        others = [name for i, name in enumerate(pieces) if i % processes != process]
        left = [name for name in (*mine, *reversed(others)) if not done(name)]
        while left:
            took = False
            for name in left:
                self._team.alive()
                if not done(name) and self._take(name):
                    took = True
                    if not done(name):  # another process may have finished it just before
                        do(name)
                    self._release()
            left = [name for name in left if not done(name)]
            if left and not took:
                time.sleep(min(1.0, self._team.lease / 8))

    def renew(self) -> bool:
        """Renews the claim. Call it often; it does nothing until a part of the lease has passed.

        Returns True a few times in each lease, when it is time to look at what others have done.
        """
        self._team.alive()
        now = time.monotonic()
        if now - self._renewed < self._team.lease / 8:
            return False
        self._renewed = now
        if self._held is not None:
            storage.write(self._held, f"{self._me}, at {now:.3f}\n".encode())
        return True

    def clear(self) -> None:
        """Removes all claims. Call it only when no process is working, or when no work is left."""
        storage.remove_tree(self._folder)

    def _take(self, name: str) -> bool:
        if self._team.processes == 1:
            return True
        path = self._folder / name.replace("/", "+")
        now = time.monotonic()
        if not storage.create(path, f"{self._me}, since {now:.3f}\n".encode()):
            try:
                says = storage.read(path)
            except FileNotFoundError:  # the claim was released just now
                return False
            seen = self._seen.get(path)
            if seen is None or seen[0] != says:  # a claim just created may still be empty
                self._seen[path] = seen = says, now
            if now - seen[1] < self._team.lease:
                return False
            storage.write(path, f"{self._me}, taken over at {now:.3f}\n".encode())
        self._seen.pop(path, None)
        self._held, self._renewed = path, now
        return True

    def _release(self) -> None:
        if self._held is not None:
            storage.remove(self._held)
            self._held = None
