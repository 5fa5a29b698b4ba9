"""Writes files and folders that appear completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

UNFINISHED = ".unfinished~"  # a file has this suffix while it is being written
# Each of these functions is called with the path of every file that `whole` has finished.
when_whole: list[Callable[[Path], object]] = []


def unfinished(path: Path) -> Path:
    """The path at which this process writes a file before renaming it to `path`: in the same folder, ending in
    UNFINISHED."""
    # The name contains the host, because a process of another host may have the same number.
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{UNFINISHED}")


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a new file for writing. It appears under its name only if the block ends without an error. Raises OSError.

    Once the file appears, its content is safe even if the machine stops. Until then, the former file stays.
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
    for tell in when_whole:
        tell(path)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a folder to fill. It appears under its name only if the block ends without an error.

    First it removes unfinished folders of killed processes, because they may be as large as a model.

    Raises OSError; FileExistsError if something is there already, or appears there before the block ends.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, "something is there already, and is never overwritten", str(path))
    for left in path.parent.glob(f"{glob.escape(f'.{path.name}.')}*{UNFINISHED}"):
        _remove_unless_held(left)
    written, handle = _new_folder(unfinished(path))
    try:
        yield written
        os.rename(written, path)  # fails if there is anything but an empty folder
    finally:
        shutil.rmtree(written, ignore_errors=True)
        os.close(handle)
    _sync(path.parent)


def _new_folder(path: Path) -> tuple[Path, int]:
    """Makes a folder. Returns it with an open handle that holds the folder's lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        path.mkdir()
        # Before the folder is locked, another process may mistake it for the folder of a killed process and remove
        # it. Then it is made again.
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            _hold(handle, wait=True)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return path, handle
            os.close(handle)


def _hold(handle: int, *, wait: bool = False) -> bool:
    """Locks an open folder until its handle is closed, or the process ends. Returns False if it cannot be locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also raised by a file system without locks, where unfinished folders are never removed
        return False
    return True


def _remove_unless_held(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if _hold(handle):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _sync(folder: Path) -> None:
    """Writes the folder itself to disk. Without this, a new name in it may be lost if the machine stops."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that appears whole or not at all, and makes its folder. Raises OSError."""
    with whole(path) as file:
        file.write(data)
