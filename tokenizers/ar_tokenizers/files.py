"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
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
    _sync(path.parent)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill that appears when the block ends without an error, or not at all.

    Raises FileExistsError where something is there already, be it put there meanwhile; OSError.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, "something is there already, which is never written over", str(path))
    written = unfinished(path)
    written.mkdir(parents=True)
    try:
        yield written
        os.rename(written, path)  # which fails where there is more than an empty folder
    finally:
        shutil.rmtree(written, ignore_errors=True)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Puts new names on disk, where they are only when their folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that appears whole or not at all, and makes its folder. Raises OSError."""
    with whole(path) as file:
        file.write(data)
