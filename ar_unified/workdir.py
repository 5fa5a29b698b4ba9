"""What each stage leaves where, whole or not at all. What is done is skipped; what is other is refused.

    config.json  text_tokenizer/  image_tokenizer/  data/  model/  samples/  tokenizer_evaluation/
    evaluation.json  report.html

A stage owns one folder. `started.json` in it says with which fingerprint (whatever decides its result) it was
begun, `done.json` is written last. While a process makes a stage it holds the lock `.locks/STAGE`, which ends with the
process, however that ends. Of a job's many processes, process 0 writes and the others read, on storage that all share.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ar_unified.errors import UserError

_UNFINISHED = ".unfinished~"  # ends the name of a file that is being written


@contextmanager
def whole(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write to that appears when the block ends without an error, or not at all. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of other hosts may have the same number.
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{_UNFINISHED}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name is on disk only when its folder is
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all, and makes its folder. Raises OSError."""
    with whole(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Like `write_bytes`, UTF-8, line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Like `write_bytes`; indented JSON. numpy scalars and arrays are written as numbers and lists."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n")


def read_json(path: str | Path) -> Any:
    """The value `write_json` wrote. Raises OSError, and UserError for a file that holds something else."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of UTF-8, or of JSON
        raise UserError(f"{path}: expected JSON, as it was written: {error}. It was changed, or cut short") from error


def clean(folder: str | Path, *, deep: bool = True) -> list[Path]:
    """Removes what killed writers left in `folder`, `deep`: and under it; returns the paths.

    Not while others write there.
    """
    pattern = f".*{_UNFINISHED}"
    leftovers = sorted(Path(folder).rglob(pattern) if deep else Path(folder).glob(pattern))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


class StageMismatch(UserError):
    """A stage's folder holds (part of) the result of something else. `field`: first to differ, dotted."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclass
class Stage:
    """One stage's folder. `done`: its result is there and may be used; `summary`: what `finish` was given."""

    name: str
    folder: Path
    fingerprint: dict[str, Any]
    done: bool = False
    summary: dict[str, Any] | None = None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Marks the stage as done; to be called when everything it leaves is in its place."""
        self.summary = json.loads(json.dumps(summary, default=_plain))
        write_json(self.folder / "done.json", {"fingerprint": self.fingerprint, "summary": self.summary})
        self.done = True


class StageBusy(UserError):
    """Another process is making this stage; the message says which."""


class NotShared(UserError):
    """This process does not see what process 0 wrote."""


_held: dict[Path, IO[str]] = {}  # the locks of this process


class Workdir:
    """The folder of one run, made when the first stage begins. `reader`: another process writes; this one only looks.

    What is finished is only read, so it may lie on storage that cannot be written.
    """

    def __init__(self, path: str | Path, *, reader: bool = False):
        self.path, self.reader = Path(path), reader
        self.config = self.path / "config.json"
        self.text_tokenizer = self.path / "text_tokenizer"
        self.image_tokenizer = self.path / "image_tokenizer"
        self.data = self.path / "data"
        self.model = self.path / "model"
        self.samples = self.path / "samples"
        self.tokenizer_evaluation = self.path / "tokenizer_evaluation"
        self.evaluation = self.path / "evaluation.json"
        self.report = self.path / "report.html"

    def stage(self, name: str, fingerprint: Mapping[str, Any]) -> Stage:
        """Opens a stage: a finished one as `done`, an interrupted one to continue, a new one to begin.

        A reader opens it when the writer has opened it.

        Args:
            name: of its folder, e.g. "data".
            fingerprint: all that decides the result, as JSON values: part of the config, input hashes.

        Raises:
            StageMismatch: the folder was finished, or begun, with another fingerprint.
            StageBusy: another process is making it.
            NotShared: a reader does not find the writer's record.
        """
        ours = json.loads(json.dumps(fingerprint, default=_plain))
        stage = Stage(name, self.path / name, ours)
        started, done = stage.folder / "started.json", stage.folder / "done.json"
        if self.reader and not done.exists():
            self.await_file(started)
        for record, state in ((done, "finished"), (started, "begun, not finished,")):
            if record.exists():
                found = read_json(record)
                _require_same(stage, found["fingerprint"], state)
                stage.done, stage.summary = record == done, found.get("summary")
                break
        if not stage.done and not self.reader:
            self._own(name)
            if not started.exists():
                write_json(started, {"fingerprint": ours})
            clean(stage.folder)
        return stage

    def _own(self, name: str) -> None:
        """Takes the lock of a stage for the rest of this process. Raises StageBusy."""
        path = (self.path / ".locks" / name).resolve()
        if path in _held:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return  # some network file systems have no locks
            raise StageBusy(f"{self.path / name} is being made by {holder}: wait for it, or end it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        _held[path] = file

    def await_file(self, path: Path, content: Any = None, *, patience: float = 60.0) -> None:
        """For a reader: until a JSON file that the writer has written is seen here, with `content` unless None.

        Network file systems show new files late; after `patience` seconds NotShared is raised.
        """
        deadline = time.monotonic() + patience
        while not (path.exists() and (content is None or read_json(path) == content)):
            if time.monotonic() > deadline:
                found = "holds something else" if path.exists() else "is not there"
                raise NotShared(
                    f"process 0 has written {path.absolute()}; seen from this process, on {os.uname().nodename}, "
                    f"it {found}: --workdir must be on storage that all processes share, and their configs the same"
                )
            time.sleep(0.1)


def _require_same(stage: Stage, found: Any, state: str) -> None:
    theirs, ours = dict(_flat(found)), dict(_flat(stage.fingerprint))
    for field in [*ours, *(field for field in theirs if field not in ours)]:
        a, b = theirs.get(field, "(absent)"), ours.get(field, "(absent)")
        if a != b:
            raise StageMismatch(
                field,
                f"stage {stage.name!r}: {stage.folder} was {state} with {field} = {a!r:.200}, this run has "
                f"{b!r:.200}. Use another --workdir, or delete {stage.folder} to make it again.",
            )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _plain(value: Any) -> Any:
    """numpy scalars and arrays, and paths, as JSON values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"expected a JSON value, found {type(value).__name__}: {value!r:.80}")
