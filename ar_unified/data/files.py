"""Decides which files of a folder belong to a dataset, and which file a name in a row means.

All readers use these rules:

- A name must mean a file inside the folder: `..` may not lead out of it, and an absolute path must point into it. NFC
  and NFD spellings of a name are one name. Otherwise the spelling must be exact. If only the case of letters differs,
  or the name has `\\` in place of `/`, the message says so.
- A link to a place inside the folder is followed. A link to a place outside is refused, unless the source has
  `links=True` (--links) or the link belongs to the Hugging Face cache: it leads from
  <repository>/snapshots/<revision>/ into <repository>/blobs/.
- A search of a folder skips hidden files and folders (`.*`, `@eaDir`, `__MACOSX`, ...). If several links lead to one
  folder, it is read once. Everything that cannot be read (a pipe, a link to nothing, a locked
  folder) is reported by name.
- A path that the user gives (the folder itself, a file) may be a link to anywhere.
- Nothing is downloaded: a name is a path, a file: URL or a data: URL.
- A folder may be in an object store (`storage`). It has no links, and a name must be exactly the object's name.
"""

from __future__ import annotations

import base64
import binascii
import functools
import os
import posixpath
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ar_unified import storage
from ar_unified.errors import UserError
from ar_unified.storage import AnyPath, Remote

LARGEST = 1 << 28  # maximum bytes of an image file
# What file managers, desktops and network storage leave in folders, besides names that begin with a dot.
_LITTER = {
    "@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
    "desktop.ini",
}  # fmt: skip


class FileError(ValueError):
    """A file that cannot be used. The caller adds its name to the message.

    `kind` is "path_escapes", "missing_image", "unreadable_image" or "unreadable_file".
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Found:
    """A file that a search of a folder found: its path below the folder, with "/", and its size in bytes. `error` says
    what is wrong with it; None for a good file.
    """

    name: str
    size: int = 0
    error: FileError | None = None


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped, because it is hidden and not part of a dataset."""
    return name.startswith(".") or name.lower() in _LITTER


class Folder:
    """A dataset's folder. `links` says whether links that lead out of the folder are followed.

    Raises:
        UserError: if `links` is neither True nor False.
    """

    def __init__(self, root: str | Path, links: bool = False):
        if not isinstance(links, bool):
            raise UserError(f"links: expected True or False, found {links!r}")
        self.root, self.links = Path(root), links
        self._lexical, self._real = os.path.abspath(root), os.path.realpath(root)
        self._blobs = _blobs(self._real)
        self._listed = functools.lru_cache(maxsize=16)(_listed)

    # ---- names in rows --------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        """The bytes that a row names: a file inside the folder (a path or a file: URL) or a data: URL. Raises
        FileError."""
        found = meant(name)
        return found if isinstance(found, bytes) else self.read_file(found)

    def read_file(self, name: str) -> bytes:
        """The bytes of the file that a path names. Raises FileError."""
        path = self.path(name)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise FileError("missing_image", f"expected a file, found {_kind(status.st_mode)}")
            if status.st_size > LARGEST:
                raise FileError("unreadable_image", f"expected a file of at most {LARGEST} bytes")
            return path.read_bytes()
        except OSError as error:
            raise FileError("missing_image", str(error.strerror)) from error

    def path(self, name: str) -> Path:
        """The file that a row names with `name`. Raises FileError if it is outside the folder or missing."""
        if "\0" in name:
            raise FileError("missing_image", "a name cannot have a zero byte")
        full = os.path.normpath(os.path.join(self._lexical, name))
        top = next((top for top in (self._lexical, self._real) if _is_below(full, top)), None)
        if top is None:
            raise FileError("path_escapes", f"expected a path inside {self.root}")
        below = full[len(top) :].lstrip(os.sep) or "."
        if not os.path.lexists(self.root / below):
            below = self._spelled(name, below.split(os.sep))
        if reason := self._refused(below):
            raise FileError("path_escapes", reason)
        return self.root / below

    def _spelled(self, name: str, parts: Sequence[str]) -> str:
        """The path of a file whose name is stored in another Unicode form. Raises FileError if there is none."""
        near, exact = "", True
        for part in parts:
            here = os.path.join(near, part)
            if not os.path.lexists(self.root / here):
                names = self._listed(self.root / near).get(_folded(part), [])
                same = [found for found in names if _nfc(found) == _nfc(part)]
                if not names:
                    break
                here, exact = os.path.join(near, (same or names)[0]), exact and bool(same)
            near = here
        else:
            if exact:
                return near
            raise FileError("missing_image", f"no such file; did you mean {near!r}?")
        reason = "no such file"
        if "\\" in name:
            slashed = name.replace("\\", "/")
            there = os.path.lexists(self.root / slashed)
            reason += f"; write names with '/'{f', as in {slashed!r}, which is there' if there else ''}"
        raise FileError("missing_image", reason)

    # ---- links ----------------------------------------------------------------------------------------------------

    def _refused(self, name: str) -> str:
        """The reason why a path below the folder may not be followed; "" if it may be followed."""
        if self.links or self._is_inside(self.root / name):
            return ""
        link = name
        for part in reversed(Path(name).parents):  # finds the first link that leads out
            if (self.root / part).is_symlink() and not self._is_inside(self.root / part):
                link = str(part)
                break
        target = os.path.realpath(self.root / link)
        return f"{link} is a link to {target}, outside {self.root}; links=True in the source, or --links, allows that"

    def _is_inside(self, path: Path) -> bool:
        real = os.path.realpath(path)
        return _is_below(real, self._real) or (self._blobs is not None and _is_below(real, self._blobs))

    # ---- searching ------------------------------------------------------------------------------------------------

    def search(self, wanted: Callable[[str], bool]) -> list[Found]:
        """The files below this folder that are `wanted` (a function of the path, with "/" between its parts), sorted by
        path.

        Raises:
            UserError: if it is no folder, or cannot be read.
        """
        try:
            os.listdir(self.root)
        except FileNotFoundError as error:
            raise UserError(f"{self.root}: no such file or folder") from error
        except OSError as error:
            raise UserError(f"{self.root}: expected a folder that can be read: {error.strerror}") from error
        found: list[Found] = []
        folders, links, seen = [""], list[str](), {self._real}
        while folders or links:
            if not folders:  # links come last, so that a folder is read under its own path, not a link's
                links.sort()
                link = links.pop(0)
                real = os.path.realpath(self.root / link)
                folders += [] if real in seen else [link]
                seen.add(real)
                continue
            for item, is_link in self._look(folders.pop(), wanted):
                if isinstance(item, Found):
                    found.append(item)
                elif is_link:
                    links.append(item)
                elif (real := os.path.realpath(self.root / item)) not in seen:
                    folders.append(item)
                    seen.add(real)
        return sorted(found, key=lambda item: item.name)

    def _look(self, here: str, wanted: Callable[[str], bool]) -> Iterator[tuple[Found | str, bool]]:
        """Yields each file (`Found`) and subfolder (its path) of one folder, and whether it is a link."""
        try:
            with os.scandir(self.root / here) as entries:
                seen = [(os.path.join(here, entry.name), entry.is_symlink()) for entry in entries]
        except OSError as error:
            reason = f"the folder cannot be read: {error.strerror}"
            yield Found(here, error=FileError("unreadable_file", reason)), False
            return
        for name, is_link in seen:
            if hidden(os.path.basename(name)):
                continue
            try:
                status = os.stat(self.root / name)
            except OSError as error:  # a link to nothing, a loop of links
                if wanted(name):
                    yield Found(name, error=FileError("unreadable_file", str(error.strerror))), is_link
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            if not is_folder and not wanted(name):
                continue
            if reason := self._refused(name) if is_link else "":
                yield Found(name, error=FileError("path_escapes", reason)), is_link
            elif is_folder:
                yield name, is_link
            elif not stat.S_ISREG(status.st_mode):
                reason = f"expected a file, found {_kind(status.st_mode)}"
                yield Found(name, error=FileError("unreadable_file", reason)), is_link
            else:
                yield Found(name, status.st_size), is_link


class Bucket:
    """A dataset's folder in an object store, with the methods of `Folder`."""

    def __init__(self, root: Remote):
        self.root, self.links = root, False

    def read(self, name: str) -> bytes:
        """See `Folder.read`."""
        found = meant(name)
        return found if isinstance(found, bytes) else self.read_file(found)

    def read_file(self, name: str) -> bytes:
        """The bytes of the object that a path names. Raises FileError."""
        path = self.path(name)
        try:
            return path.read_bytes(LARGEST)
        except ValueError as error:
            raise FileError("unreadable_image", f"expected a file of at most {LARGEST} bytes") from error
        except OSError as error:
            raise FileError("missing_image", f"no such object: {path}") from error

    def path(self, name: str) -> Remote:
        """The object that a row names. A missing object is noticed only when it is read. Raises FileError."""
        if "\0" in name:
            raise FileError("missing_image", "a name cannot have a zero byte")
        below = posixpath.normpath(name)
        if name.startswith("/") or below.partition("/")[0] == "..":
            raise FileError("path_escapes", f"expected a path inside {self.root}")
        return self.root if below == "." else self.root / below

    def search(self, wanted: Callable[[str], bool]) -> list[Found]:
        """See `Folder.search`. Raises UserError if there are no objects in it."""
        objects = storage.found_under(str(self.root))
        if not objects:
            raise UserError(f"{self.root}: no such file or folder")
        found = []
        for name, facts in objects.items():
            parts = name.split("/")
            if any(part in ("", ".", "..") for part in parts):
                if wanted(name):
                    error = FileError("path_escapes", "expected a name in which no part is empty, . or ..")
                    found.append(Found(name, error=error))
            elif wanted(name) and not any(map(hidden, parts)):
                found.append(Found(name, facts.size))
        return sorted(found, key=lambda item: item.name)


AnyFolder = Folder | Bucket


def folder_at(root: str | AnyPath, links: bool = False) -> AnyFolder:
    """A dataset's folder, on disk or in a store. Raises UserError if `links` is neither True nor False."""
    root = storage.path(root)
    return Folder(root, links) if isinstance(root, Path) else Bucket(root)


def require_file(path: str | AnyPath) -> None:
    """Raises UserError unless `path` is a file."""
    path = storage.path(path)
    if isinstance(path, Remote):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise UserError(f"{path}: {'no such file' if missing else error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: expected a file, found {_kind(mode)}")


def meant(name: str) -> str | bytes:
    """What a name in a row means: the bytes in a data: URL, the path in a file: URL, or else the name itself as a
    path. Raises FileError.
    """
    scheme = re.match(r"(data|file):|[A-Za-z][A-Za-z0-9+.-]*://", name, re.IGNORECASE)
    if scheme and name[:5].lower() == "data:":
        return _data_url(name)
    if scheme and name[:5].lower() != "file:":
        reason = "expected a path, a file: URL or a data: URL, because nothing is fetched from a network"
        raise FileError("missing_image", reason)
    return unquote(urlsplit(name).path) if scheme else name


def _data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise FileError("unreadable_image", f"expected data:<type>;base64,<bytes>, found {header[:40]!r}")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FileError("unreadable_image", f"expected base64 in the data: URL: {error}") from error


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip(os.sep) + os.sep)


def _blobs(real: str) -> str | None:
    """The folder where the Hugging Face cache keeps the files of a snapshot. `real` is the path of the snapshot, or a
    path inside it.
    """
    for folder in (Path(real), *Path(real).parents):
        if folder.parent.name == "snapshots" and (blobs := folder.parent.parent / "blobs").is_dir():
            return str(blobs)
    return None


def _listed(folder: Path) -> dict[str, list[str]]:
    """The names in a folder, grouped by a normal form that all spellings of one name share."""
    names: dict[str, list[str]] = {}
    try:
        for name in sorted(os.listdir(folder)):
            names.setdefault(_folded(name), []).append(name)
    except OSError:
        pass
    return names


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _nfc(_nfc(name).casefold())


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "a device")
