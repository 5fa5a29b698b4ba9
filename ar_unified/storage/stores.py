"""A small interface to object stores: whole objects by URL. All retries and checks are in this file.

An object appears whole or not at all, so no rename is needed. An object that marks others as complete is written last.
After a transient failure (429, 5xx, a lost connection, too few bytes), a request is repeated with growing pauses, for
AR_UNIFIED_STORE_PATIENCE seconds. Credentials, region and endpoint are found where s3fs and gcsfs look for them.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import importlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ar_tokenizers.files import whole

from ar_unified.errors import UNUSABLE, RunError, UserError

SCHEMES = {"s3": "s3fs", "gs": "gcsfs"}  # each with its Python package
PIECE = 1 << 24  # bytes of a large object that one request reads
_PATIENCE = 120.0  # seconds
_LONGEST_PAUSE = 16.0
_ENTRANCE = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or the machine's role), and AWS_ENDPOINT_URL for "
    "a store that is not Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (or `gcloud auth application-default login`, or the machine's account)",
}
# Errors for which a retry is useless. They are given by class name, because their packages may not be installed.
_NO_ENTRANCE = re.compile(r"NoCredentials|PartialCredentials|ProfileNotFound|DefaultCredentials|RefreshError|Token")
_FORBIDDEN = re.compile(r"Forbidden|Access ?Denied|Unauthorized|InvalidAccessKey|SignatureDoesNotMatch", re.I)


class StoreFailed(RunError):
    """A request to a store failed, although it was repeated."""


class StoreRefused(RunError):
    """A store needs other credentials, or its package is missing. It is not a ValueError, because the data is not at
    fault."""

    exit_status = UNUSABLE


class _Torn(Exception):
    """The received bytes are too few, or differ from those in the store."""


@dataclass(frozen=True)
class Facts:
    """An object's size in bytes, and a tag that changes with its content: the MD5 if the store has it."""

    size: int
    tag: str


def is_url(path: str | os.PathLike[str] | object) -> bool:
    """Whether a path is in an object store. This function alone decides which URLs belong to a store."""
    return str(path).partition("://")[0] in SCHEMES and "://" in str(path)


def patience() -> float:
    """Seconds for which a request is repeated after transient failures."""
    try:
        return float(os.environ.get("AR_UNIFIED_STORE_PATIENCE", _PATIENCE))
    except ValueError as error:
        raise UserError(f"AR_UNIFIED_STORE_PATIENCE: expected seconds as a number: {error}") from error


# ---- objects ----------------------------------------------------------------------------------------------------


def facts(url: str) -> Facts | None:
    """The facts about an object; None if there is no such object."""

    def ask() -> Facts | None:
        try:
            found = _system(url).info(url)
        except FileNotFoundError:
            return None
        return _facts(found) if found.get("type") == "file" else None

    return _patiently("look at", url, ask)


def listed(url: str) -> tuple[dict[str, Facts], list[str]]:
    """The objects one level below a folder, by name, and the names of the folders there; both are empty if there is no
    folder."""

    def ask() -> tuple[dict[str, Facts], list[str]]:
        try:
            rows = _system(url).ls(f"{url.rstrip('/')}/", detail=True)
        except FileNotFoundError:
            return {}, []
        below = _below(url, rows)
        files = {name: _facts(row) for name, row in below if row["type"] == "file" and name}
        return files, sorted(name for name, row in below if row["type"] != "file" and name)

    return _patiently("list", url, ask)


def found_under(url: str) -> dict[str, Facts]:
    """All objects below a folder, by their paths in the folder, with "/" between parts. Long listings are read page by
    page."""

    def ask() -> dict[str, Facts]:
        try:
            rows = list(_system(url).find(f"{url.rstrip('/')}/", detail=True).values())
        except FileNotFoundError:
            return {}
        rows = [row for row in rows if not row["name"].endswith("/")]  # some tools create such an object for a folder
        return {name: _facts(row) for name, row in _below(url, rows) if name}

    return _patiently("list", url, ask)


class TooLarge(ValueError):
    """An object has more bytes than its reader allows."""


def read(url: str, start: int = 0, stop: int | None = None, *, most: int | None = None) -> bytes:
    """Bytes start..stop-1 of an object, or the whole object if `stop` is None. Raises FileNotFoundError, or TooLarge if
    a whole object has more than `most` bytes."""

    def ask() -> bytes:
        if stop is None:
            known = _facts(_system(url).info(url))
            if most is not None and known.size > most:
                raise TooLarge(f"{url}: expected at most {most} bytes, found {known.size}")
            data = _system(url).cat_file(url)
            _require_whole(known, len(data), functools.partial(hashlib.md5, data, usedforsecurity=False))
            return data
        data = _system(url).cat_file(url, start=start, end=stop) if stop > start else b""
        if len(data) != stop - start:
            raise _Torn(f"expected {stop - start} bytes from byte {start} on, found {len(data)}")
        return data

    return _patiently("read", url, ask)


def write(url: str, data: bytes) -> None:
    """Writes an object, and replaces an existing one."""
    _patiently("write", url, lambda: _system(url).pipe_file(url, data))


def create(url: str, data: bytes) -> bool:
    """Writes an object unless it exists. Returns whether this call wrote it. If several processes try, exactly one
    succeeds.

    Each writer must use different `data`. If the store's answer is lost, the request is repeated. The data in the store
    then shows whether the first request succeeded.
    """
    tries = 0

    def ask() -> bool:
        nonlocal tries
        tries += 1
        try:
            _system(url).pipe_file(url, data, mode="create")
        except FileExistsError:
            return tries > 1 and _system(url).cat_file(url) == data
        return True

    return _patiently("create", url, ask)


def delete(url: str) -> None:
    """Removes an object, if it is there."""

    def ask() -> None:
        with contextlib.suppress(FileNotFoundError):
            _system(url).rm_file(url)

    _patiently("delete", url, ask)


def copy(old: str, new: str) -> None:
    """Copies an object to another name inside the store. Raises FileNotFoundError."""
    _patiently("copy", old, lambda: _system(old).cp_file(old, new))


def upload(path: Path, url: str) -> Facts:
    """Uploads a file, replacing an existing object; returns the store's facts about it."""

    def ask() -> Facts:
        _system(url).put_file(str(path), url)
        found = _facts(_system(url).info(url))
        _require_whole(found, path.stat().st_size, functools.partial(file_md5, path))
        return found

    return _patiently("write", url, ask)


def download(url: str, path: Path) -> Facts:
    """Downloads an object and checks it; the file appears whole or not at all. Raises FileNotFoundError."""

    def ask() -> Facts:
        known = _facts(_system(url).info(url))
        digest = hashlib.md5(usedforsecurity=False)
        with whole(path) as file:
            for start in range(0, known.size, PIECE):
                stop = min(start + PIECE, known.size)
                data = _system(url).cat_file(url, start=start, end=stop)
                if len(data) != stop - start:
                    raise _Torn(f"expected {stop - start} bytes from byte {start} on, found {len(data)}")
                digest.update(data)
                file.write(data)
            _require_whole(known, known.size, lambda: digest)
        return known

    return _patiently("read", url, ask)


def file_md5(path: Path) -> Any:
    """The MD5 of a file's bytes, as a hash object."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False))


def is_md5(tag: str) -> bool:
    """Whether a tag is the MD5 of the content. If an object was written in parts, its tag is not the MD5."""
    return re.fullmatch(r"[0-9a-f]{32}", tag) is not None


# ---- one request ------------------------------------------------------------------------------------------------


def _patiently(verb: str, url: str, ask: Callable[[], object]) -> Any:
    """Makes a request, and repeats it after transient failures. Returns the answer.

    Raises FileNotFoundError, StoreRefused, StoreFailed.
    """
    for tries, pause in enumerate(_pauses(), 1):
        try:
            return ask()
        except (FileNotFoundError, FileExistsError, TooLarge, UserError, StoreRefused):
            raise
        except Exception as error:
            if isinstance(error, PermissionError) or _FORBIDDEN.search(str(error)):
                raise StoreRefused(f"{url}: the store does not let us {verb} this: {_said(error)}") from error
            if _NO_ENTRANCE.search(type(error).__name__):
                scheme = url.partition("://")[0]
                raise StoreRefused(f"{url}: {_said(error)}: set {_ENTRANCE[scheme]}") from error
            if pause is None or isinstance(error, TypeError | AttributeError):
                raise StoreFailed(
                    f"{url}: all {tries} requests to {verb} this failed. The last error is {_said(error)}. "
                    "Finished work is kept, and the same command continues from there"
                ) from error
            time.sleep(pause)


def _pauses() -> Iterator[float | None]:
    """Yields the pause, in seconds, before each further try, and None when the time for tries is over. Pauses are
    partly random, because many processes may fail at the same time.
    """
    until, pause = time.monotonic() + patience(), 0.1
    while time.monotonic() + pause < until:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, _LONGEST_PAUSE)
    yield None


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@functools.lru_cache(maxsize=4)
def _open(scheme: str, where: str | None, process: int) -> Any:
    package = SCHEMES[scheme]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise StoreRefused(
            f"{scheme}:// needs the package {package}, which is not installed: pip install 'ar_unified[storage]'"
        ) from error
    # No listing is cached, because this process must see what another one has just written. The package's own retries
    # are turned off if possible; otherwise the package would make six tries for each of ours.
    if scheme == "s3":
        # botocore's other setting, "max_attempts", does not count the first try. A retry by botocore would have a pause
        # of its own, and would hide from `create` that a request was made twice.
        retries = {"retries": {"total_max_attempts": 1, "mode": "standard"}}
        found = module.S3FileSystem(use_listings_cache=False, config_kwargs=retries, skip_instance_cache=True)
        found.retries = 1
        return found
    return module.GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)


def _system(url: str) -> Any:
    scheme = url.partition("://")[0]
    where = os.environ.get({"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}[scheme])
    return _open(scheme, where, os.getpid())  # a forked process needs its own client, because threads are not copied


def _facts(row: dict[str, Any]) -> Facts:
    tag = str(row.get("ETag") or row.get("etag") or "").strip('"')
    if md5 := row.get("md5Hash"):
        with contextlib.suppress(binascii.Error):
            tag = base64.b64decode(md5).hex()
    return Facts(int(row.get("size") or 0), tag)


def _require_whole(known: Facts, size: int, md5: Callable[[], Any]) -> None:
    if size != known.size:
        raise _Torn(f"expected {known.size} bytes, found {size}")
    if is_md5(known.tag) and (found := md5().hexdigest()) != known.tag:
        raise _Torn(f"expected the MD5 {known.tag}, found {found}")


def _below(url: str, rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a listing that are in a folder, each with its path relative to the folder."""
    top = url.partition("://")[2].rstrip("/") + "/"
    named = ((row["name"], row) for row in rows)
    return [(name.removeprefix(top).rstrip("/"), row) for name, row in named if name.startswith(top)]
