"""The folder in which each stage leaves its result, completely or not at all. A finished stage is skipped. A stage that
was made with other settings is refused.

    config.json  text_tokenizer/  image_tokenizer/  image_codes/  data/  model/  samples/  tokenizer_evaluation/
    evaluation.json  report.html

A stage owns one folder. Its `started.json` contains the fingerprint at the start (everything that determines the
result). `done.json` is written last. `history.json` lists later changes (ar_unified.history). If a stage stops before
it has made anything, its folder is removed, at once or when it is opened again. The process that makes a stage keeps
the lock `.locks/STAGE`. The lock is released when the process ends for any reason. In a job of many processes, process
0 writes and the others read, on shared storage.

A workdir may be a folder of an object store (`opened`). This machine then has a mirror of it: each file is uploaded
when it is complete, and the lock is in the store (`storage`).
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ar_tokenizers.files import UNFINISHED, write_bytes

from ar_unified import history, storage
from ar_unified.errors import UserError
from ar_unified.history import Changeable
from ar_unified.manifests import Changes, Json, Mismatch, flat
from ar_unified.recognised import no_workdir

# For a workdir in an object store: folders with files that are downloaded one by one when they are opened, and folders
# that are not mirrored, because Orbax writes checkpoints into the store itself and TFDS can make its data sets again.
_LAZY = re.compile(r"data/[^/]+/[^/]+|image_codes|samples(/.+)?/(images|prompts)")
_KEPT = re.compile(r"tfds|.+/checkpoints")


@contextmanager
def opened(path: str) -> Iterator[Path]:
    """A context that gives a workdir as a local folder. If `path` is the URL of an object store, the local folder is
    its mirror; otherwise it is the path itself.

    When it ends, everything that was written is in the store. Raises UserError (also if a file is in the way, or the
    folder is a bundle or a published model), storage.StoreRefused, storage.StoreFailed.
    """
    if not storage.is_url(path):
        for part in (Path(path), *Path(path).parents):
            if part.exists() and not part.is_dir():
                raise UserError(f"--workdir {path}: expected a folder; found the file {part}")
        if why := no_workdir(Path(path)):
            raise UserError(f"--workdir {path}: expected a workdir; this folder {why}")
        yield Path(path)
        return
    with storage.mirrored(path, lazy=_LAZY, kept=_KEPT) as root:
        yield root


def write_text(path: str | Path, text: str) -> None:
    """Like `write_bytes`, in UTF-8, with line ends unchanged."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: object) -> None:
    """Like `write_bytes`, as indented JSON. numpy scalars and arrays are written as numbers and lists."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n")


def read_json(path: str | Path) -> Any:
    """The value that `write_json` wrote. Raises OSError, and UserError if the file does not contain JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # from UTF-8 or JSON
        raise UserError(f"{path}: expected JSON: {error}. The file was changed or cut short") from error


def clean(folder: str | Path, *, deep: bool = True) -> list[Path]:
    """Removes unfinished files of killed writers in `folder`, and below it if `deep`. Returns their paths. It must not
    be called while other processes write there.
    """
    pattern = f".*{UNFINISHED}"
    leftovers = sorted(Path(folder).rglob(pattern) if deep else Path(folder).glob(pattern))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


class StageMismatch(Mismatch):
    """A stage's folder was made with other settings. `old` is the value of `field` in the folder's record."""

    def __init__(self, field: str, message: str, old: Any = None):
        super().__init__(field, message)
        self.old = old


@dataclass
class Stage:
    """One stage's folder.

    Attributes:
        fingerprint: everything that determines its result.
        cost: its other settings, as a flat dict.
        done: whether its result is complete and may be used.
        summary: the argument of `finish`.
        changed: the allowed differences from the folder's record, by kind (ar_unified.history); `begin` records them.
        aside: if the stage was started again, the folder with the former result.
    """

    name: str
    folder: Path
    fingerprint: dict[str, Json]
    cost: dict[str, Json] = field(default_factory=dict)
    done: bool = False
    summary: dict[str, Json] | None = None
    changed: dict[str, Changes] = field(default_factory=dict)
    aside: Path | None = None

    @property
    def fields(self) -> list[str]:
        """The dotted names of all its settings."""
        return [*self.cost, *dict(flat(self.fingerprint))]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The entries of history.json, oldest first; [] if nothing changed."""
        return read_history(self.folder)

    def begin(self, *entries: Mapping[str, Any]) -> None:
        """Writes `entries` to the history, and then the record of the present settings. It also marks the stage as not
        done.

        Raises StageBusy if another process is making the stage.
        """
        own(self.folder)
        told = self.history
        for entry in entries:
            if not told or not history.same(told[-1], entry):  # an attempt that was killed may have written it already
                told.append(dict(entry))
        if entries:
            write_json(self.folder / "history.json", told)
        write_json(self.folder / "started.json", {"fingerprint": self.fingerprint, "cost": self.cost})
        storage.remove(self.folder / "done.json")
        self.done, self.summary = False, None
        clean(self.folder)

    def begin_anew(self) -> None:
        """Renames the folder to NAME.old-N, where N is the first free number, and begins with an empty folder."""
        numbers = (self.folder.with_name(f"{self.name}.old-{n}") for n in itertools.count(1))
        own(self.folder)
        self.aside = next(path for path in numbers if not path.exists())
        storage.move(self.folder, self.aside)
        self.begin(history.entry("anew", None, self.changed["anew"], aside=self.aside.name))

    def finish(self, summary: Mapping[str, Json]) -> None:
        """Marks the stage as done. It must be called after all results are in place."""
        self.summary = _as_json(summary)
        storage.push(self.folder)
        record = {"fingerprint": self.fingerprint, "cost": self.cost, "summary": self.summary}
        write_json(self.folder / "done.json", record)
        self.done = True

    def made_nothing(self) -> bool:
        """Whether the stage has made nothing yet: its folder has no files except started.json and unfinished ones."""
        files = {path.name for path in self.folder.rglob("*") if not path.is_dir()}
        return not {name for name in files - {"started.json"} if not name.endswith(UNFINISHED)}

    def abandon(self) -> None:
        """Removes the folder of a stage that failed before it made anything, so that the next attempt starts from
        nothing.
        """
        if not self.done and self.made_nothing():
            storage.remove_tree(self.folder)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The changes of settings while the stage in a folder was made, oldest first."""
    path = folder / "history.json"
    return read_json(path) if path.exists() else []


class StageBusy(UserError):
    """Another process is making this stage. The message says which one."""


class NotShared(UserError):
    """This process does not see what process 0 wrote."""


_held: dict[Path, IO[str]] = {}  # the locks that this process has


def own(folder: Path) -> None:
    """Takes the lock of a stage's folder until this process ends. Raises StageBusy."""
    path = (folder.parent / ".locks" / folder.name).resolve()
    if path in _held:
        return
    if storage.is_mirrored(folder):
        try:
            storage.lock(path)
        except storage.Held as held:
            at = storage.address(folder)
            raise StageBusy(f"{at} is being made by {held}: wait until that process ends, or stop it") from None
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
        raise StageBusy(f"{folder} is being made by {holder}: wait until that process ends, or stop it") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _held[path] = file


class Workdir:
    """The folder of one run, made when the first stage begins. `reader`: another process writes, this one only reads.

    Finished stages are only read, so they may be on read-only storage.
    """

    def __init__(self, path: str | Path, *, reader: bool = False):
        self.path, self.reader = Path(path), reader
        self.config = self.path / "config.json"
        self.text_tokenizer = self.path / "text_tokenizer"
        self.image_tokenizer = self.path / "image_tokenizer"
        self.data = self.path / "data"
        self.image_codes = self.path / "image_codes"
        self.model = self.path / "model"
        self.samples = self.path / "samples"
        self.tokenizer_evaluation = self.path / "tokenizer_evaluation"
        self.evaluation = self.path / "evaluation.json"
        self.report = self.path / "report.html"

    def stage(self, name: str, fingerprint: Mapping[str, Json], may: Changeable = history.NOTHING) -> Stage:
        """Opens a stage. A finished one is `done`, an interrupted one can be continued, and a new one is begun.

        A reader waits until the writer has opened it.

        Args:
            name: the name of its folder, such as "data".
            fingerprint: JSON values of everything that determines the result (part of the config, hashes of inputs),
                and of those settings that affect only the cost but are worth recording.
            may: the fields that may differ from the folder's record. The stage's `changed` lists the fields that do.

        Raises:
            StageMismatch: if the folder was begun or finished with other settings that may not change.
            StageBusy: if another process is making the stage.
            NotShared: if a reader does not find the record of the writer.
        """
        stage = self.undecided(name, fingerprint, may)
        started, done = stage.folder / "started.json", stage.folder / "done.json"
        if not self.reader and storage.is_mirrored(stage.folder) and not done.exists():
            own(stage.folder)  # this may download the files of its last owner
        if self.reader:
            self._await_record(stage, may)
        elif not done.exists() and started.exists() and stage.made_nothing():
            own(stage.folder)
            storage.remove(started)  # the stage was killed before it made anything, so its record is ignored
        for record, state in ((done, "finished"), (started, "begun, not finished,")):
            if record.exists():
                found = read_json(record)
                stage.changed = _changes(stage, found, state, may)
                stage.done, stage.summary = record == done, found.get("summary")
                break
        else:
            stage.begin()
        if not stage.done and not self.reader and not stage.changed:
            own(stage.folder)
            clean(stage.folder)
        return stage

    def undecided(self, name: str, fingerprint: Mapping[str, Json], may: Changeable) -> Stage:
        """A new stage with these settings, whatever its folder contains. Nothing is read or written."""
        return Stage(name, self.path / name, *history.divide(_as_json(fingerprint), may.cost))

    def _await_record(self, stage: Stage, may: Changeable, patience: float = 60.0) -> None:
        """For a reader: waits until it sees the writer's record, which must match this config."""
        started, done = stage.folder / "started.json", stage.folder / "done.json"
        deadline = time.monotonic() + patience
        while True:
            if not _now(done).exists():
                self.await_file(started, patience=patience)
            record, state = (done, "finished") if done.exists() else (started, "begun")
            if not _changes(stage, read_json(record), state, may):
                return
            if time.monotonic() > deadline:  # raises, because the record differs
                self.await_file(record, {"fingerprint": stage.fingerprint, "cost": stage.cost}, patience=0)
            time.sleep(0.1)

    def await_file(self, path: Path, content: object = None, *, patience: float = 60.0) -> None:
        """For a reader: waits until it sees a JSON file from the writer. If `content` is given, it waits until the file
        has this content.

        Network file systems show new files late. After `patience` seconds, NotShared is raised.
        """
        deadline = time.monotonic() + patience
        while not (_now(path).exists() and (content is None or read_json(path) == content)):
            if time.monotonic() > deadline:
                found = "has other content" if path.exists() else "is not there"
                raise NotShared(
                    f"process 0 has written {path.absolute()}, but for this process on {os.uname().nodename} the file "
                    f"{found}: --workdir must be on storage that all processes share, and all processes need the same "
                    "config"
                )
            time.sleep(0.1)


def _now(path: Path) -> Path:
    """Updates a file from the store, because another process may have written it there, and returns its path."""
    storage.refresh(path)
    return path


def _changes(stage: Stage, found: Mapping[str, Json], state: str, may: Changeable) -> dict[str, Changes]:
    """The allowed differences between the record `found` and the stage, by kind. Raises StageMismatch for a difference
    that is not allowed."""
    refused, changed = history.compare(found, stage.fingerprint, stage.cost, may)
    if refused is not None:
        old, new = changed["extended"][refused]
        raise StageMismatch(
            refused,
            f"stage {stage.name!r}: {stage.folder} was {state} with {refused} = {old!r:.200}, this run has "
            f"{new!r:.200}. Use another --workdir, or delete {stage.folder} to make it again. "
            f"{may.among(stage.fields)}".rstrip(),
            old,
        )
    if state == "finished" and "extended" not in changed:  # no work is left, so its cost does not matter
        changed.pop("cost", None)
    return changed


def _as_json(value: object) -> Any:
    """Converts a value to what `read_json` would return if `write_json` had written the value."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: object) -> Any:
    """Converts numpy scalars and arrays, and paths, to JSON values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"expected a JSON value, found {type(value).__name__}: {value!r:.80}")
