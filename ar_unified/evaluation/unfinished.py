"""A file of JSON lines that appears whole or not at all. If a process is killed, the next process keeps its lines and
continues after them.

FILE.unfinished/made_of.json   the facts that the lines depend on
                lines.jsonl    the lines that are done, added in parts
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ar_tokenizers.files import whole

from ar_unified.errors import UserError
from ar_unified.manifests import Json, differences
from ar_unified.workdir import read_json, write_json

_FACTS, _LINES = "made_of.json", "lines.jsonl"


class Unfinished:
    """A context for writing the lines of `output`. Inside it, only this process adds lines.

    Args:
        facts: JSON values that the lines depend on.
        every: the number of lines in a part; an incomplete part is made again.

    Attributes:
        done: the number of lines that an earlier process has finished.

    Raises UserError if `output` exists, the lines belong to other facts, or another process is adding lines. Raises
    OSError if reading or writing fails.
    """

    def __init__(self, output: str | Path, facts: Mapping[str, object], every: int):
        self.output, self.done = Path(output), 0
        self.folder = self.output.with_name(f"{self.output.name}.unfinished")
        if self.output.exists():
            raise UserError(f"{output} exists and is not overwritten: name another --output, or delete this file")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / _LINES, "a+b", buffering=0)  # closed in __exit__
        try:
            self._lock()
            self._require(facts)
            self._keep_whole(every)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rows(self) -> Iterator[dict[str, Json]]:
        """The finished lines, in order."""
        with open(self.folder / _LINES, "rb") as file:
            yield from map(json.loads, file)

    def add(self, rows: Iterable[Mapping[str, Json]]) -> None:
        """Appends lines and syncs them to disk, so that they survive the end of this process."""
        said = (json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") for row in rows)
        left = memoryview(b"".join(line + b"\n" for line in said))
        while left:
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Turns the lines into `output`. Call this when all lines are finished."""
        self._file.seek(0)
        with whole(self.output) as file:
            shutil.copyfileobj(self._file, file)
        shutil.rmtree(self.folder)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{self.folder} is being written by another process: wait until that process ends, or stop it"
                ) from None
            # other errors are ignored, because some network file systems have no locks
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise UserError(f"{self.output} was finished by another process meanwhile: nothing is left to do")

    def _require(self, facts: Mapping[str, Any]) -> None:
        """Raises UserError if the lines belong to other facts. If no facts were recorded, the lines are made again."""
        try:
            found = read_json(self.folder / _FACTS)
        except (OSError, ValueError):
            self._file.truncate(0)
            write_json(self.folder / _FACTS, dict(facts))
            return
        for field, (old, new) in differences(found, facts).items():
            raise UserError(
                f"{self.folder}: it was started with {field} {old!r:.60}, and this command has {new!r:.60}: use the "
                f"same {field}, name another --output, or delete the folder"
            )

    def _keep_whole(self, every: int) -> None:
        """Keeps the parts that are complete (a part has `every` lines), and cuts off the rest of the file."""
        self._file.seek(0)
        ends = [0]
        with open(self.folder / _LINES, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                ends.append(ends[-1] + len(line))
        self.done = (len(ends) - 1) // every * every
        self._file.truncate(ends[self.done])
