"""A local copy of an object store's folder. Files are uploaded when they are complete, and downloaded on request.

The store's content is authoritative. When the folder is opened, local files that the store lacks, such as those of a
killed process, are removed. Every process has its own mirror, so processes share only the store. The mirror is
`<cache>/<hash of the URL>-<number>`, with the first number that no other process on this machine uses. <cache> is
AR_UNIFIED_CACHE, else ~/.cache/ar_unified/mirrors.

`lazy` folders are downloaded file by file; `kept` folders stay local and are neither downloaded nor uploaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from ar_tokenizers.files import UNFINISHED

from ar_unified.errors import UserError
from ar_unified.storage import stores

_THREADS = 8
_OURS = "mirror.lock"


class Mirror:
    """The local copy of one folder of a store.

    Args:
        url: the folder's URL.
        lazy, kept: patterns that match the paths of lazy and of kept folders, relative to `url`, with "/" between
            their parts.

    Attributes:
        root: the local folder.
    """

    def __init__(self, url: str, *, lazy: re.Pattern[str], kept: re.Pattern[str]):
        self.url, self._lazy, self._kept = url.rstrip("/"), lazy, kept
        if not re.fullmatch(r"\w+://[^/]+/.+", self.url):
            raise UserError(f"{url}: expected a folder in a bucket, such as {url.partition('://')[0]}://bucket/run")
        self.root, self._lock = _place(self.url)
        self._tags: dict[str, str] = {}  # the tags of files that are the same here and in the store
        self._sizes: dict[str, tuple[int, int]] = {}  # bytes and time of each file after its last transfer
        self._guard = threading.Lock()
        self._bring(self.root, removing=True)

    # ---- down ---------------------------------------------------------------------------------------------------

    def pull(self) -> None:
        """Downloads what others have uploaded, except lazy files, which are downloaded on request."""
        self._bring(self.root, removing=False)

    def _bring(self, folder: Path, removing: bool) -> None:
        """Downloads what has changed, and deletes local files that the store lacks.

        removing: True deletes all of these files, False only those that the store had before.
        """
        wanted: dict[str, stores.Facts] = {}
        left = [self.name(folder)]
        while left:
            here = left.pop()
            if self._is(self._lazy, here) or self._is(self._kept, here):
                continue
            files, folders = stores.listed(self._url(here))
            below = f"{here}/" if here else ""
            wanted |= {below + name: facts for name, facts in files.items() if _safe(name)}
            left += [below + name for name in folders if _safe(name)]
        for path in list(self._files(folder)):
            name = self.name(path)
            if name not in wanted and (removing or name in self._tags):
                path.unlink(missing_ok=True)
                self._tags.pop(name, None)
        changed = [name for name, facts in wanted.items() if not self._is_here(name, facts)]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._download, changed))

    def fetch(self, path: Path, *, fresh: bool = False) -> Path:
        """Downloads a file, unless it is here, and returns its path. If the store has no such file, a local file of
        this name is removed.

        fresh: whether to ask the store even if this process has already downloaded or uploaded the file.
        """
        name = self.name(path)
        if (name in self._tags and not fresh) or self._is(self._kept, os.path.dirname(name)):
            return path
        facts = stores.facts(self._url(name))
        if facts is None:
            path.unlink(missing_ok=True)
            self._tags.pop(name, None)
        elif not self._is_here(name, facts):
            self._download(name)
        return path

    def exists(self, path: Path) -> bool:
        """Whether the store has a file; downloads nothing."""
        name = self.name(path)
        return name in self._tags or stores.facts(self._url(name)) is not None

    def names(self, folder: Path) -> set[str]:
        """The names of the files in a folder of the store."""
        return set(stores.listed(self._url(self.name(folder)))[0])

    def _is_here(self, name: str, facts: stores.Facts) -> bool:
        path = self.root / name
        if self._tags.get(name) != facts.tag:
            known = path.is_file() and path.stat().st_size == facts.size and stores.is_md5(facts.tag)
            if not known or stores.file_md5(path).hexdigest() != facts.tag:
                return False
            self._note(name, facts)
        return path.exists()

    def _download(self, name: str) -> None:
        try:
            self._note(name, stores.download(self._url(name), self.root / name))
        except FileNotFoundError:  # removed since the listing
            (self.root / name).unlink(missing_ok=True)

    # ---- up -----------------------------------------------------------------------------------------------------

    def push(self, path: Path) -> None:
        """Uploads a file to the store."""
        name = self.name(path)
        if _travels(name) and not self._is(self._kept, os.path.dirname(name)):
            self._note(name, stores.upload(path, self._url(name)))

    def push_changed(self, folder: Path) -> None:
        """Uploads files of a folder that differ from the store's, such as logs that have grown."""
        for path in sorted(self._files(folder)):
            if self._sizes.get(self.name(path)) != _look(path):
                self.push(path)

    def _note(self, name: str, facts: stores.Facts) -> None:
        with self._guard:
            self._tags[name], self._sizes[name] = facts.tag, _look(self.root / name)

    # ---- removing and renaming ------------------------------------------------------------------------------------

    def remove(self, path: Path) -> None:
        """Deletes a local file and its object in the store."""
        stores.delete(self._url(self.name(path)))
        path.unlink(missing_ok=True)
        self._tags.pop(self.name(path), None)

    def remove_tree(self, folder: Path) -> None:
        """Removes a folder with all its content. A stage's records (`_is_record`) are removed last, so that an
        interrupted removal can be recognised.
        """
        top = self.name(folder)
        names = [f"{top}/{name}" for name in stores.found_under(self._url(top))]
        with ThreadPoolExecutor(_THREADS) as pool:
            for last in (False, True):
                list(pool.map(stores.delete, [self._url(name) for name in names if _is_record(name) is last]))
        shutil.rmtree(folder, ignore_errors=True)
        self._tags = {name: tag for name, tag in self._tags.items() if not name.startswith(f"{top}/")}

    def move(self, old: Path, new: Path) -> None:
        """Renames a file, or a folder with all its content: copies it inside the store, then removes the old name."""
        top = self.name(old)
        for name in stores.found_under(self._url(top)):
            stores.copy(self._url(f"{top}/{name}"), self._url(f"{self.name(new)}/{name}"))
        if (alone := stores.facts(self._url(top))) is not None:
            stores.copy(self._url(top), self._url(self.name(new)))
        if old.exists():
            new.parent.mkdir(parents=True, exist_ok=True)
            old.rename(new)
        self.remove(old) if alone else self.remove_tree(old)

    def address(self, path: Path) -> str:
        """The URL of the local `path`."""
        return self._url(self.name(path))

    def close(self, *, telling: bool = True) -> None:
        """Frees the mirror for another process. If `telling`, it first uploads everything that the store lacks."""
        try:
            if telling:
                self.push_changed(self.root)
        finally:
            self._lock.close()

    # ---- names --------------------------------------------------------------------------------------------------

    def name(self, path: Path) -> str:
        """The path relative to the folder, with "/" between its parts; "" for the folder itself."""
        name = path.relative_to(self.root).as_posix()
        return "" if name == "." else name

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _is(self, pattern: re.Pattern[str], folder: str) -> bool:
        parts = folder.split("/")
        return any(pattern.fullmatch("/".join(parts[:i])) for i in range(1, len(parts) + 1))

    def _files(self, folder: Path) -> Iterator[Path]:
        """The local files that belong to the store's folder."""
        for here, folders, files in os.walk(folder):
            at = Path(here)
            folders[:] = [name for name in folders if not self._is(self._kept, self.name(at / name))]
            lazy = self._is(self._lazy, self.name(at))
            for name in files:
                if _travels(name) and not (lazy and self.name(at / name) not in self._sizes):
                    yield at / name


def _place(url: str) -> tuple[Path, IO[str]]:
    """A folder for this process alone, and the lock that reserves it."""
    cache = Path(os.environ.get("AR_UNIFIED_CACHE") or Path.home() / ".cache" / "ar_unified" / "mirrors")
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    for number in range(1 << 16):
        place = cache / f"{name}-{number}"
        (place / "files").mkdir(parents=True, exist_ok=True)
        lock = open(place / _OURS, "a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        lock.truncate(0)
        lock.write(f"{url}\n")
        lock.flush()
        return (place / "files").resolve(), lock
    raise UserError(f"{cache}: all mirrors of {url} are in use: set AR_UNIFIED_CACHE to another folder")


def _look(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _travels(name: str) -> bool:
    """Whether a file belongs to the store. Unfinished files and hidden files do not belong to it."""
    return not (name.endswith((UNFINISHED, ".tmp")) or any(part.startswith(".") for part in name.split("/")))


def _safe(name: str) -> bool:
    """Whether a name in the store is safe as a local file name."""
    return bool(name) and name not in (".", "..") and "\0" not in name and _travels(name)


def _is_record(name: str) -> bool:
    return name.endswith(("/started.json", "/done.json", "/history.json"))
