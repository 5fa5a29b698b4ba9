"""Numbered folders that are made here and copied to a store. A mark, written last, shows that a folder is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ar_unified.storage import stores

_THREADS = 8


class Steps:
    """Folders `<url>/<number>`; a folder with the mark is complete.

    Args:
        url: the URL of the folder that contains them.
        mark: the name of the object that marks a folder as complete.

    Attributes:
        here: the local folder in which folders are made or downloaded; it is removed when this process ends.
    """

    def __init__(self, url: str, mark: str):
        self._url, self._mark = url.rstrip("/"), mark
        cache = os.environ.get("AR_UNIFIED_CACHE") or None  # None means the folder for temporary files
        if cache:
            os.makedirs(cache, exist_ok=True)
        self.here = Path(tempfile.mkdtemp(prefix="ar_unified-steps-", dir=cache))
        weakref.finalize(self, shutil.rmtree, self.here, ignore_errors=True)

    def steps(self) -> list[int]:
        """The numbers of the complete folders, ascending."""
        numbers = sorted(int(name) for name in stores.listed(self._url)[1] if name.isdecimal())
        return [number for number in numbers if stores.facts(self._at(number, self._mark)) is not None]

    def put(self, step: int) -> None:
        """Copies a local folder to the store, and removes the other local folders. The copy replaces what a killed
        process left in the store."""
        self._clear(step)
        top = self.here / str(step)
        files = [path for path in sorted(top.rglob("*")) if path.is_file() and path != top / self._mark]
        names = [path.relative_to(top).as_posix() for path in files]
        _all(lambda pair: stores.upload(pair[0], self._at(step, pair[1])), list(zip(files, names, strict=True)))
        stores.write(self._at(step, self._mark), b"whole\n")
        for old in self.here.iterdir():
            if old.name.isdecimal() and old.name != str(step):
                shutil.rmtree(old, ignore_errors=True)

    def bring(self, step: int) -> Path:
        """Downloads a complete folder. Raises FileNotFoundError if it was removed meanwhile."""
        top = self.here / str(step)
        if not top.is_dir():
            part = self.here / f".{step}"
            shutil.rmtree(part, ignore_errors=True)
            names = [name for name in stores.found_under(self._at(step)) if ".." not in name.split("/")]
            _all(lambda name: stores.download(self._at(step, name), part / name), names)
            part.rename(top)
        return top

    def delete(self, step: int) -> None:
        """Deletes a folder here and in the store."""
        stores.delete(self._at(step, self._mark))  # deleted first, so that a half deleted folder does not seem complete
        self._clear(step)
        shutil.rmtree(self.here / str(step), ignore_errors=True)

    def _clear(self, step: int) -> None:
        names = stores.found_under(self._at(step))
        _all(stores.delete, [self._at(step, name) for name in sorted(names, key=lambda name: name != self._mark)])

    def _at(self, step: int, name: str = "") -> str:
        return f"{self._url}/{step}" + (f"/{name}" if name else "")


def _all(do: Callable, of: list) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(do, of))
