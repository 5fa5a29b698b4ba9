"""Writes and reads the lines in a job's folder. Each process appends to its own file. `read` yields each sample once.

    samples.jsonl                    of a job of one process
    samples-00003-of-00016.jsonl     of process 3 of 16

A job may continue with another number of processes, so finished samples are read from all files. A line is appended
only after the images that it names are written. So every complete line is a finished sample.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ar_unified import storage
from ar_unified.data.images import by_size, to_png, to_thumbnail
from ar_unified.errors import UserError
from ar_unified.manifests import Json
from ar_unified.workdir import clean, write_bytes

_NAME = re.compile(r"samples(-\d{5}-of-\d{5})?\.jsonl")
THUMBNAIL = 256  # pixels of the longer side; a smaller image has no thumbnail
_TOLD_EVERY = 30.0  # seconds between uploads to an object store; each one uploads all lines
_PATIENCE = 5.0  # seconds that a finished sample may wait for others, so that they are decoded together


class JobBusy(UserError):
    """Another process writes to the same files."""


def shard_name(process: int, processes: int) -> str:
    """The name of the file that one process appends to."""
    return "samples.jsonl" if processes == 1 else f"samples-{process:05d}-of-{processes:05d}.jsonl"


def shards(folder: str | Path) -> list[Path]:
    """The files of all processes, for any number of processes."""
    return sorted(path for path in Path(folder).glob("samples*.jsonl") if _NAME.fullmatch(path.name))


def read(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every line of a job, finished or running, with each sample once. An incomplete last line is left out.

    An error is left out if a later run succeeded. Raises OSError, and UserError for a line that no job wrote.
    """
    seen: set[tuple[int, int | None]] = set()
    failed: dict[int, dict[str, Json]] = {}
    for path in shards(folder):
        for row in _rows(path):
            if row.get("retry"):
                failed[row["line"]] = row
            elif (row["line"], row["sample"]) not in seen:
                seen.add((row["line"], row["sample"]))
                yield row
    done = {line for line, _ in seen}
    yield from (row for line, row in failed.items() if line not in done)


@dataclass(frozen=True)
class Done:
    """The finished samples, according to the files.

    Attributes:
        samples: pairs (line of the requests, sample); sample is None for a bad request.
        failed: maps a line to the error of its request, if the request may succeed on another try.
    """

    samples: set[tuple[int, int | None]] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)

    def has(self, line: int, sample: int | None) -> bool:
        """Whether the files have this sample, or an error for its whole line."""
        return (line, sample) in self.samples or (line, None) in self.samples

    @classmethod
    def read(cls, folder: str | Path) -> Done:
        """Reads the files of a job. Raises OSError, and UserError for a line that no job wrote."""
        done = cls()
        for row in read(folder):
            if row.get("retry"):
                done.failed[row["line"]] = row["error"]
            else:
                done.samples.add((row["line"], row["sample"]))
        return done


def open_shard(folder: Path, process: int, processes: int) -> IO[bytes]:
    """Opens the file of this process to append to, locks it, and cuts off an incomplete last line.

    It also cuts off incomplete lines in files of an earlier run with another number of processes. Raises OSError, and
    JobBusy if another process still writes one of them.
    """
    name = shard_name(process, processes)
    ending = f"-of-{processes:05d}.jsonl"
    for path in shards(folder):
        current = path.name.endswith(ending) if processes > 1 else path.name == name
        if not current:
            with open(path, "r+b") as other:
                _own(other, path)
    file: IO[bytes] = open(folder / name, "a+b", buffering=0)
    try:
        _own(file, folder / name)
    except BaseException:
        file.close()
        raise
    return file


def _own(file: IO[bytes], path: Path) -> None:
    """Locks a file and cuts off an incomplete last line that a killed writer left; that sample is drawn again."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise JobBusy(
                f"{path} is being written by another process: wait until that process ends, or stop it"
            ) from None
        # some network file systems do not support locks
    size, block = file.seek(0, os.SEEK_END), 1 << 16
    end = size
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                row["line"], row["sample"]  # noqa: B018
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: expected a sample, found {line[:60]!r} ({error!r})") from None
            yield row


# ---- writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A line to write, and the images that it names: file names under the folder, and codes int32 [h, w]."""

    row: Mapping[str, Json]
    images: tuple[tuple[str, np.ndarray], ...] = ()


class Writer:
    """Decodes images and appends lines on its own thread, while the engine goes on.

    Args:
        folder: the job's folder.
        file: the file from `open_shard`.
        decode: codes int32 [B, h, w] -> images uint8 [B, H, W, 3].
        batch: how many entries are decoded and written together; an entry waits at most five seconds for others.
        written: called on the thread with the rows that are safely on disk.

    It is a context manager; on exit, it writes all entries. An error of the thread is raised by `put` or by the exit.
    """

    def __init__(
        self,
        folder: Path,
        file: IO[bytes],
        decode: Callable[[np.ndarray], np.ndarray],
        batch: int,
        written: Callable[[Sequence[Mapping[str, Json]]], None],
    ):
        self._folder, self._file, self._decode = folder, file, decode
        self._batch, self._written = batch, written
        self._queue: queue.Queue[Entry | None] = queue.Queue(4 * batch)
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._error: Exception | None = None
        self._touched: set[Path] = set()
        self._told = time.monotonic()

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error and kind is None:
            raise self._error

    def put(self, entry: Entry) -> None:
        """Passes an entry to the thread; waits while the thread is four batches behind."""
        if self._error:
            raise self._error
        self._queue.put(entry)

    def _work(self) -> None:
        waiting: list[Entry] = []
        since = time.monotonic()
        going = True
        while going:
            try:
                entry = self._queue.get(timeout=max(since + _PATIENCE - time.monotonic(), 0.01) if waiting else None)
                going = entry is not None
                since = since if waiting else time.monotonic()
                waiting += [entry] if entry else []
            except queue.Empty:
                pass
            if waiting and (len(waiting) >= self._batch or not going or time.monotonic() > since + _PATIENCE):
                try:
                    if not self._error:  # after an error nothing is written, but `put` must not wait for ever
                        self._write(waiting)
                except Exception as error:
                    self._error = error
                waiting = []

    def _write(self, entries: Sequence[Entry]) -> None:
        named = [image for entry in entries for image in entry.images]
        decoded = by_size(self._decode, [codes for _, codes in named])
        for (name, _), pixels in zip(named, decoded, strict=True):
            path = self._folder / name
            if path.parent not in self._touched:
                self._touched.add(path.parent)
                clean(path.parent)  # removes what a killed process left for this request
            write_image(path, pixels)
        for entry in entries:
            # A lone surrogate of a bad request becomes its JSON escape.
            line = json.dumps(entry.row, ensure_ascii=False).encode("utf-8", "backslashreplace")
            rest = memoryview(line + b"\n")
            while rest:  # one write for each line; a full disk cuts it short, and the next write raises
                rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())
        if time.monotonic() > self._told + _TOLD_EVERY:
            storage.tell(Path(self._file.name))
            self._told = time.monotonic()
        self._written([entry.row for entry in entries])


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Writes a PNG. The thumbnail of a large image is written first. So if the PNG exists, both files are complete.
    Raises OSError.
    """
    if max(pixels.shape[:2]) > THUMBNAIL:
        write_bytes(thumbnail(path), to_thumbnail(pixels, THUMBNAIL))
    write_bytes(path, to_png(pixels))


def thumbnail(image: Path) -> Path:
    """The path of an image's thumbnail, if it has one. It is in the image's folder."""
    return image.with_suffix(".jpg")
