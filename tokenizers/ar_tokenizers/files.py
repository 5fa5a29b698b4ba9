"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

UNFINISHED = ".unfinished~"  # ends the name of a file that is being written


def unfinished(path: Path) -> Path:
    """Where this process writes what is to appear as `path`: beside it, by a name that ends in UNFINISHED."""
    # Processes of other hosts may have the same number.
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{UNFINISHED}")


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write to that appears when the block ends without an error, or not at all. Raises OSError.

    It is on disk then: the machine may stop. What was there before stays until then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = unfinished(path)
    try:
        with open(written, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name is on disk only when its folder is
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that appears whole or not at all, and makes its folder. Raises OSError."""
    with whole(path) as file:
        file.write(data)
