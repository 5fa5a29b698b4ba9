"""Where each stage leaves its result, whole or not at all. A finished stage is skipped. A stage that was made with
other settings is refused.

    config.json  text_tokenizer/  image_tokenizer/  image_codes/  data/  model/  samples/  tokenizer_evaluation/
    evaluation.json  report.html

A stage owns one folder. `started.json` in it holds the fingerprint it was begun with (all that decides its result).
`done.json` is written last. `history.json` lists what changed meanwhile (ar_unified.history). If a stage stops before
it has made anything, its folder is removed, at once or when it is opened again. While a process makes a stage it holds
the lock `.locks/STAGE`, which is released when the process ends, in whatever way. In a job of many processes, process 0
writes and the others read, on storage that all share.

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

# For a workdir in an object store: folders whose files are downloaded one by one as they are opened; and folders that
# are not mirrored, because Orbax writes checkpoints into the store itself, and TFDS can make its data sets again.
_LAZY = re.compile(r"data/[^/]+/[^/]+|image_codes|samples(/.+)?/(images|prompts)")
_KEPT = re.compile(r"tfds|.+/checkpoints")


@contextmanager
def opened(path: str) -> Iterator[Path]:
    """A context that gives a workdir as a local folder: for the URL of an object store its mirror, else the path
    itself.

    At its end, all that was written is in the store. Raises UserError, storage.StoreRefused, storage.StoreFailed.
    """
    if not storage.is_url(path):
        yield Path(path)
        return
    with storage.mirrored(path, lazy=_LAZY, kept=_KEPT) as root:
        yield root


def write_text(path: str | Path, text: str) -> None:
    """Like `write_bytes`, UTF-8, line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: object) -> None:
    """Like `write_bytes`; indented JSON. numpy scalars and arrays are written as numbers and lists."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n")


def read_json(path: str | Path) -> Any:
    """The value `write_json` wrote. Raises OSError, and UserError for a file that holds something else."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of UTF-8, or of JSON
        raise UserError(f"{path}: expected JSON, as it was written: {error}. It was changed, or cut short") from error


def clean(folder: str | Path, *, deep: bool = True) -> list[Path]:
    """Removes the unfinished files of killed writers in `folder`, and below it if `deep`. Returns their paths. It must
    not be called while others write there.
    """
    pattern = f".*{UNFINISHED}"
    leftovers = sorted(Path(folder).rglob(pattern) if deep else Path(folder).glob(pattern))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


class StageMismatch(Mismatch):
    """A stage's folder holds (part of) the result of something else. `old`: what `field` was."""

    def __init__(self, field: str, message: str, old: Any = None):
        super().__init__(field, message)
        self.old = old


@dataclass
class Stage:
    """One stage's folder.

    Attributes:
        fingerprint: all that decides its result. cost: its other settings, as a flat dict.
        done: its result is there and may be used. summary: what `finish` was given.
        changed: the allowed differences from the folder's record, by kind (ar_unified.history); `begin` records them.
        aside: if the stage was begun anew, the folder that now holds the former result.
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
        """The dotted names of all settings that it is made with."""
        return [*self.cost, *dict(flat(self.fingerprint))]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The entries of history.json, oldest first; [] where nothing changed."""
        return read_history(self.folder)

    def begin(self, *entries: Mapping[str, Any]) -> None:
        """Writes `entries` to the history, then the record of how the stage is made from now on. It then counts as not
        done.

        Raises StageBusy.
        """
        own(self.folder)
        told = self.history
        for entry in entries:
            if not told or not history.same(told[-1], entry):  # killed behind this, it comes here again
                told.append(dict(entry))
        if entries:
            write_json(self.folder / "history.json", told)
        write_json(self.folder / "started.json", {"fingerprint": self.fingerprint, "cost": self.cost})
        storage.remove(self.folder / "done.json")
        self.done, self.summary = False, None
        clean(self.folder)

    def begin_anew(self) -> None:
        """Renames the folder with the first free number, and begins an empty one."""
        numbers = (self.folder.with_name(f"{self.name}.old-{n}") for n in itertools.count(1))
        own(self.folder)
        self.aside = next(path for path in numbers if not path.exists())
        storage.move(self.folder, self.aside)
        self.begin(history.entry("anew", None, self.changed["anew"], aside=self.aside.name))

    def finish(self, summary: Mapping[str, Json]) -> None:
        """Marks the stage as done; to be called when everything it leaves is in its place."""
        self.summary = _as_json(summary)
        storage.push(self.folder)
        record = {"fingerprint": self.fingerprint, "cost": self.cost, "summary": self.summary}
        write_json(self.folder / "done.json", record)
        self.done = True

    def made_nothing(self) -> bool:
        """Whether it was begun and has made nothing so far."""
        files = {path.name for path in self.folder.rglob("*") if not path.is_dir()}
        return not {name for name in files - {"started.json"} if not name.endswith(UNFINISHED)}

    def abandon(self) -> None:
        """Removes the folder of a stage that failed before it made anything, so that the next attempt begins anew."""
        if not self.done and self.made_nothing():
            storage.remove_tree(self.folder)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """What changed while the stage of a folder was made, oldest first."""
    path = folder / "history.json"
    return read_json(path) if path.exists() else []


class StageBusy(UserError):
    """Another process is making this stage; the message says which."""


class NotShared(UserError):
    """This process does not see what process 0 wrote."""


_held: dict[Path, IO[str]] = {}  # the locks of this process


def own(folder: Path) -> None:
    """Takes the lock of a stage's folder for the rest of this process. Raises StageBusy."""
    path = (folder.parent / ".locks" / folder.name).resolve()
    if path in _held:
        return
    if storage.is_mirrored(folder):
        try:
            storage.lock(path)
        except storage.Held as held:
            raise StageBusy(f"{storage.address(folder)} is being made by {held}: wait for it, or end it") from None
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
        raise StageBusy(f"{folder} is being made by {holder}: wait for it, or end it") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _held[path] = file


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
        self.image_codes = self.path / "image_codes"
        self.model = self.path / "model"
        self.samples = self.path / "samples"
        self.tokenizer_evaluation = self.path / "tokenizer_evaluation"
        self.evaluation = self.path / "evaluation.json"
        self.report = self.path / "report.html"

    def stage(self, name: str, fingerprint: Mapping[str, Json], may: Changeable = history.NOTHING) -> Stage:
        """Opens a stage: a finished one as `done`, an interrupted one to continue, a new one to begin.

        A reader opens it when the writer has opened it.

        Args:
            name: of its folder, e.g. "data".
            fingerprint: as JSON values, all that decides the result (part of the config, hashes of inputs), and those
            settings of cost alone that are worth recording.
            may: what may differ from the folder's record; the stage then has it as `changed`.

        Raises:
            StageMismatch: the folder was finished, or begun, with something else that may not change.
            StageBusy: another process is making it.
            NotShared: a reader does not find the writer's record.
        """
        stage = self.undecided(name, fingerprint, may)
        started, done = stage.folder / "started.json", stage.folder / "done.json"
        if not self.reader and storage.is_mirrored(stage.folder) and not done.exists():
            own(stage.folder)  # which may download what its last holder left
        if self.reader:
            self._await_record(stage, may)
        elif not done.exists() and started.exists() and stage.made_nothing():
            own(stage.folder)
            storage.remove(started)  # it was killed before it made anything, so its record does not matter
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
        """A stage as it is to be made, whatever its folder holds: nothing is read or written."""
        return Stage(name, self.path / name, *history.divide(_as_json(fingerprint), may.cost))

    def _await_record(self, stage: Stage, may: Changeable, patience: float = 60.0) -> None:
        """For a reader: waits until it sees the writer's record, which must be of this config."""
        started, done = stage.folder / "started.json", stage.folder / "done.json"
        deadline = time.monotonic() + patience
        while True:
            if not _now(done).exists():
                self.await_file(started, patience=patience)
            record, state = (done, "finished") if done.exists() else (started, "begun")
            if not _changes(stage, read_json(record), state, may):
                return
            if time.monotonic() > deadline:  # raises, because the record does not say this
                self.await_file(record, {"fingerprint": stage.fingerprint, "cost": stage.cost}, patience=0)
            time.sleep(0.1)

    def await_file(self, path: Path, content: object = None, *, patience: float = 60.0) -> None:
        """For a reader: waits until it sees a JSON file that the writer wrote, with this `content` unless None.

        Network file systems show new files late; after `patience` seconds NotShared is raised.
        """
        deadline = time.monotonic() + patience
        while not (_now(path).exists() and (content is None or read_json(path) == content)):
            if time.monotonic() > deadline:
                found = "holds something else" if path.exists() else "is not there"
                raise NotShared(
                    f"process 0 has written {path.absolute()}; seen from this process, on {os.uname().nodename}, "
                    f"it {found}: --workdir must be on storage that all processes share, and their configs the same"
                )
            time.sleep(0.1)


def _now(path: Path) -> Path:
    """The path, after its file was updated from the store, where others may have written it."""
    storage.refresh(path)
    return path


def _changes(stage: Stage, found: Mapping[str, Json], state: str, may: Changeable) -> dict[str, Changes]:
    """The allowed differences from a record, by kind. Raises StageMismatch for a difference that is not allowed."""
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
    if state == "finished" and "extended" not in changed:  # nothing is left to do with other settings
        changed.pop("cost", None)
    return changed


def _as_json(value: object) -> Any:
    """A value as `write_json` and `read_json` would return it."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: object) -> Any:
    """numpy scalars and arrays, and paths, as JSON values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"expected a JSON value, found {type(value).__name__}: {value!r:.80}")
