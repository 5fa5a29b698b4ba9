"""Writes the log of one process of a job, and its last message, even if the process itself cannot write it any more.

If another process is gone, JAX ends this one with abort(); a killed process ends at once. In both cases our Python code
cannot run. So each process sends its stderr to a small reader that lives longer, which is this file run as a script:

    python last_words.py LOG PROCESS PROCESSES COORDINATOR < the stderr of the process

The reader writes every line with the time to LOG, and for process 0 also to the terminal. If the lines end without
FAREWELL, it says what happened. It needs only the standard library and starts in 20 ms.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time

FAREWELL = "\x04"  # the last line of a process that ends normally

# How jaxlib's coordination service (0.10 to 0.12) names missing processes, and how its own end is reported.
_NAMED = re.compile(r"(?:timed out task names|stopped sending heartbeats\)):\s*((?:\d+\s+)+)")
_START = "RegisterTask"
_NO_COORDINATOR = re.compile(r"Failed to send RPC to coordination service|Deadline Exceeded\s+RPC: \S*RegisterTask")


def missing(text: str) -> list[int]:
    """The processes that an error of the coordination service names as missing; [] if it names none."""
    named = {int(number) for group in _NAMED.findall(f"{text}\n") for number in group.split()}
    return sorted(named) or ([0] if _NO_COORDINATOR.search(text) else [])


def gone(processes: list[int]) -> str:
    """Text like "process 1 is gone (log: logs/process-1.log in the workdir)", for one or more processes."""
    names = ", ".join(map(str, processes[:20])) + (f" and {len(processes) - 20} more" if len(processes) > 20 else "")
    verb = "process {} is gone" if len(processes) == 1 else "processes {} are gone"
    return f"{verb.format(names)} (log: logs/process-{processes[0]}.log in the workdir)"


AGAIN = "Nothing is lost: the same command, started again, continues from the last checkpoint."


def obituary(text: str, process: int, processes: int, coordinator: str) -> str:
    """The message for a process that ended without FAREWELL, from the end of its stderr."""
    who, blamed = f"process {process} of {processes}", missing(text)
    if not blamed:
        return f"{who} was killed from outside, or ran out of memory. {AGAIN}"
    if _START not in text:
        return f"{who} was stopped by JAX: {gone(blamed)}. {AGAIN}"
    names = f"process{'es' if len(blamed) > 1 else ''} {', '.join(map(str, blamed))}"
    return (
        f"{who} gave up at the start: {names} did not connect to {coordinator} in time. Is every "
        f"missing process running (see its log, or the scheduler's)? Can its host resolve and reach {coordinator} "
        "(firewall, proxy variables)? Has each process the same --coordinator and --processes, and its own --process? "
        "A larger --start-timeout waits longer."
    )


def main() -> None:
    """The main function of the reader. It lives longer than the process that it watches, and logs how that process
    ended."""
    log_path, process, processes, coordinator = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the process handles these signals; its last lines must still be read
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def say(line: str) -> None:
        os.write(log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())
        if process == 0:
            with contextlib.suppress(OSError):  # the terminal may be closed; the log goes on
                os.write(2, f"{line}\n".encode())

    rest, tail = "", ""
    while chunk := os.read(0, 65536).decode(errors="replace"):
        *lines, rest = re.split("[\r\n]", rest + chunk)
        for line in lines:
            if line == FAREWELL:
                return
            say(line)
        tail = (tail + "".join(f"{line}\n" for line in lines))[-20_000:]
    say(f"ar-unified: {obituary(tail + rest, process, processes, coordinator)}")


if __name__ == "__main__":
    main()
