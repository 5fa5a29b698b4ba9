"""Folders that may be in an object store. docs/object_stores.md explains usage, guarantees and cost.

`stores` makes all requests and retries. `remote` has paths and files of read-only sources. `mirror` keeps a local copy
of a workdir's folder and uploads its files when they are complete. Code that works in a workdir uses the functions
below. For a folder that is not in a store, they do the same on disk.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ar_tokenizers import files

from ar_unified.errors import UserError
from ar_unified.storage.locks import Held, Lock
from ar_unified.storage.mirror import Mirror
from ar_unified.storage.remote import AnyPath, Opened, Remote, open_binary, path, size_of
from ar_unified.storage.steps import Steps
from ar_unified.storage.stores import create as _create
from ar_unified.storage.stores import facts, found_under, is_url, listed
from ar_unified.storage.stores import read as _read
from ar_unified.storage.stores import write as _write

__all__ = [
    "AnyPath", "Held", "Opened", "Remote", "Steps", "address", "create", "exists", "facts", "fetch", "found_under",
    "is_mirrored", "is_url", "lock", "mirrored", "move", "names", "names_in", "open_binary", "path", "push", "read",
    "refresh", "refuse", "remove", "remove_tree", "size_of", "tell", "write",
]  # fmt: skip

_mirrors: list[Mirror] = []  # the mirrors of this process
_locks: dict[Path, Lock] = {}


@contextmanager
def mirrored(url: str, *, lazy: re.Pattern[str], kept: re.Pattern[str]) -> Iterator[Path]:
    """A local folder with the content of a store's folder (`mirror.Mirror`). When the context ends, all new and changed
    files of the local folder are uploaded, except those in `kept` folders.

    Nested contexts of one process for the same folder share one mirror. Raises UserError if the URL names no folder,
    and StoreRefused or StoreFailed if the store cannot be used.
    """
    if (open_already := next((each for each in _mirrors if each.url == url.rstrip("/")), None)) is not None:
        yield open_already.root
        return
    mirror = Mirror(url, lazy=lazy, kept=kept)
    _mirrors.append(mirror)
    files.when_whole.append(tell)
    try:
        yield mirror.root
    finally:
        files.when_whole.remove(tell)
        try:
            mirror.close(telling=not any(held.lost for held in _locks.values()))
            for held in _locks.values():
                held.release()
        finally:
            _locks.clear()
            _mirrors.remove(mirror)


def refuse(path: str | os.PathLike[str] | None, what: str) -> None:
    """Raises UserError if a user gives a URL instead of a path of this machine."""
    if path is not None and is_url(path):
        raise UserError(
            f"{what}: expected a path on this machine, found {path}: only --workdir and sources may be URLs"
        )


def _of(path: Path) -> Mirror | None:
    return next((mirror for mirror in _mirrors if path.is_absolute() and path.is_relative_to(mirror.root)), None)


def is_mirrored(path: Path) -> bool:
    """Whether a path is in the mirror of an object store."""
    return _of(path) is not None


def address(path: Path) -> str:
    """The address by which other processes find `path`: the URL for a store's file, else the path."""
    mirror = _of(path)
    return str(path) if mirror is None else mirror.address(path)


# ---- files as the store has them --------------------------------------------------------------------------------


def exists(path: Path) -> bool:
    """Whether the file exists, here or in the store."""
    mirror = _of(path)
    return path.exists() if mirror is None else mirror.exists(path)


def fetch(path: Path) -> Path:
    """Downloads the file of a path, if there is one, and returns the path. Call it before opening a file of a lazy
    folder (see `mirror`).
    """
    mirror = _of(path)
    return path if mirror is None else mirror.fetch(path)


def refresh(path: Path | None = None) -> None:
    """Downloads the current version of one file or, if `path` is None, of all files outside lazy folders."""
    if path is None:
        for mirror in _mirrors:
            mirror.pull()
    elif (found := _of(path)) is not None:
        found.fetch(path, fresh=True)


def names(folder: Path) -> set[str]:
    """The names of a folder's entries. In a store, these are only its files. Empty if there is no folder."""
    mirror = _of(folder)
    if mirror is not None:
        return mirror.names(folder)
    return set(os.listdir(folder)) if folder.exists() else set()


def tell(path: Path) -> None:
    """Uploads the file of this path to the store; call it when the file is complete. Raises StoreFailed, LockLost."""
    mirror = _of(path)
    if mirror is not None:
        _check_locks()
        mirror.push(path)


def push(folder: Path) -> None:
    """Uploads files of a folder that have grown or were written without `tell`, such as logs."""
    mirror = _of(folder)
    if mirror is not None:
        _check_locks()
        mirror.push_changed(folder)


def remove(path: Path) -> None:
    """Removes a file, if it is there."""
    mirror = _of(path)
    if mirror is None:
        path.unlink(missing_ok=True)
    else:
        mirror.remove(path)


def remove_tree(folder: Path) -> None:
    """Removes a folder with all its content, as far as possible."""
    mirror = _of(folder)
    if mirror is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        mirror.remove_tree(folder)


def move(old: Path, new: Path) -> None:
    """Renames a file or a folder. In a store this is not atomic: objects are copied, and then the old ones are
    removed."""
    mirror = _of(old)
    if mirror is None:
        old.rename(new)
    else:
        mirror.move(old, new)


def names_in(folder: Remote) -> list[str]:
    """The names of the objects in a folder of a read-only store. Raises FileNotFoundError if it does not exist."""
    found, folders = listed(str(folder))
    if not found and not folders:
        raise FileNotFoundError(2, "no such folder", str(folder))
    return list(found)


# ---- small objects without a local copy: claims -----------------------------------------------------------------


def create(path: Path, data: bytes) -> bool:
    """Writes a file unless it exists. Returns whether this call wrote it. If several processes try, exactly one
    succeeds. Each writer must use different `data`.
    """
    mirror = _of(path)
    if mirror is not None:
        return _create(mirror.address(path), data)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def read(path: Path) -> bytes:
    """The current content of a file. Raises FileNotFoundError."""
    mirror = _of(path)
    return path.read_bytes() if mirror is None else _read(mirror.address(path))


def write(path: Path, data: bytes) -> None:
    """Writes a file atomically; for a store's file, no local copy remains."""
    mirror = _of(path)
    if mirror is None:
        files.write_bytes(path, data)
    else:
        _write(mirror.address(path), data)


# ---- locks ------------------------------------------------------------------------------------------------------


def lock(path: Path) -> None:
    """Takes the lock of this name in the store. The lock is released when the context of `mirrored` ends. Raises Held
    if another process has it.
    """
    mirror = _of(path)
    if mirror is None or path in _locks:
        return
    _locks[path] = Lock(mirror.address(path))
    if _locks[path].waited:
        mirror.pull()


def _check_locks() -> None:
    for held in _locks.values():
        held.check()
