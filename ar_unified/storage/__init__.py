"""Folders that may be an object store's: docs/object_stores.md has how, what is promised and what it costs.

`stores` has the requests, with every retry; `remote` has paths and files of sources, which are only read; `mirror` has
a workdir's folder here, whose files go up as they become whole. Whoever works in a workdir uses the functions below:
for a folder that is not in a store they do what they say on disk.
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

_mirrors: list[Mirror] = []  # of this process
_locks: dict[Path, Lock] = {}


@contextmanager
def mirrored(url: str, *, lazy: re.Pattern[str], kept: re.Pattern[str]) -> Iterator[Path]:
    """A folder of a store as a folder here, with what is in it (`mirror.Mirror`); closed, all of it is in the store.

    Raises UserError for a URL that names no folder; StoreRefused, StoreFailed.
    """
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
    """Raises UserError where a person gives a URL for what must be a path of this machine."""
    if path is not None and is_url(path):
        raise UserError(
            f"{what}: expected a path of this machine, found {path}: only --workdir and sources may be URLs"
        )


def _of(path: Path) -> Mirror | None:
    return next((mirror for mirror in _mirrors if path.is_absolute() and path.is_relative_to(mirror.root)), None)


def is_mirrored(path: Path) -> bool:
    """Whether a path is that of an object store's mirror."""
    return _of(path) is not None


def address(path: Path) -> str:
    """Where others find what is here as `path`: the URL of what is a store's."""
    mirror = _of(path)
    return str(path) if mirror is None else mirror.address(path)


# ---- files as the store has them --------------------------------------------------------------------------------


def exists(path: Path) -> bool:
    """Whether there is such a file, here or in the store."""
    mirror = _of(path)
    return path.exists() if mirror is None else mirror.exists(path)


def fetch(path: Path) -> Path:
    """The same path; the file is here if there is one. To be called before a file is opened that came lazily."""
    mirror = _of(path)
    return path if mirror is None else mirror.fetch(path)


def refresh(path: Path | None = None) -> None:
    """What others have written until now is seen here: of one file, or of all that do not come lazily."""
    if path is None:
        for mirror in _mirrors:
            mirror.pull()
    elif (found := _of(path)) is not None:
        found.fetch(path, fresh=True)


def names(folder: Path) -> set[str]:
    """Of what is in a folder; of a store's, of files alone. Empty where there is none."""
    mirror = _of(folder)
    if mirror is not None:
        return mirror.names(folder)
    return set(os.listdir(folder)) if folder.exists() else set()


def tell(path: Path) -> None:
    """A file of this path has become whole: the store gets it. Raises StoreFailed, LockLost."""
    mirror = _of(path)
    if mirror is not None:
        _check_locks()
        mirror.push(path)


def push(folder: Path) -> None:
    """Puts what of a folder's files has grown or come by other ways, as logs do, into the store."""
    mirror = _of(folder)
    if mirror is not None:
        _check_locks()
        mirror.push_changed(folder)


def remove(path: Path) -> None:
    """A file, if it is there."""
    mirror = _of(path)
    if mirror is None:
        path.unlink(missing_ok=True)
    else:
        mirror.remove(path)


def remove_tree(folder: Path) -> None:
    """A folder with all that is in it, as far as that can be done."""
    mirror = _of(folder)
    if mirror is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        mirror.remove_tree(folder)


def move(old: Path, new: Path) -> None:
    """A file or a folder gets another name. In a store that is no one step: what has it is copied, then removed."""
    mirror = _of(old)
    if mirror is None:
        old.rename(new)
    else:
        mirror.move(old, new)


def names_in(folder: Remote) -> list[str]:
    """Of the objects in a folder of a store that is only read. Raises FileNotFoundError: there is no such folder."""
    found, folders = listed(str(folder))
    if not found and not folders:
        raise FileNotFoundError(2, "no such folder", str(folder))
    return list(found)


# ---- small objects of the store alone: claims -------------------------------------------------------------------


def create(path: Path, data: bytes) -> bool:
    """Writes a file unless there is one; whether it did. Of many who try, one does. `data` is nobody else's."""
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
    """What a file says now. Raises FileNotFoundError."""
    mirror = _of(path)
    return path.read_bytes() if mirror is None else _read(mirror.address(path))


def write(path: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all; of a store's nothing stays here."""
    mirror = _of(path)
    if mirror is None:
        files.write_bytes(path, data)
    else:
        _write(mirror.address(path), data)


# ---- locks ------------------------------------------------------------------------------------------------------


def lock(path: Path) -> None:
    """Takes the lock of this name in the store for the rest of this process. Raises Held: another process has it."""
    mirror = _of(path)
    if mirror is None or path in _locks:
        return
    _locks[path] = Lock(mirror.address(path))
    if _locks[path].waited:
        mirror.pull()


def _check_locks() -> None:
    for held in _locks.values():
        held.check()
