"""Prepares a set in this process and reports its memory and the files that it touched.

PYTHONPATH=.:tokenizers python -m tests.data.watched FOLDER    prepares what FOLDER/specs.json names into FOLDER/data

Prints JSON: the memory of the process before and at its peak, in MiB, and the files that it wrote outside FOLDER/data.
Python caches no bytecode meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from ar_unified.data.prepare import prepare
from ar_unified.data.sources import open_source
from ar_unified.language.syntax import fixed_grid
from tests.data.conftest import Kit


class Watch:
    """Records each file that this process opens for writing, makes, moves or removes outside a folder."""

    _EVENTS = {
        "os.mkdir": 1,
        "os.rename": 2,
        "os.remove": 1,
        "os.rmdir": 1,
        "os.symlink": 2,
        "os.link": 2,
        "os.truncate": 1,
        "shutil.copyfile": 2,
        "os.mkfifo": 1,
    }  # event -> its number of paths

    def __init__(self, inside: Path):
        self.outside: list[str] = []
        self._inside = os.path.realpath(inside)
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if isinstance(flags, int) else mode
            paths = [path] if writes and not isinstance(path, int) else []
        else:
            paths = list(arguments[: self._EVENTS.get(event, 0)])
        for path in paths:
            where = os.path.realpath(os.fsdecode(path))
            if where != os.devnull and where != self._inside and not where.startswith(self._inside + os.sep):
                self.outside.append(f"{event} {where}")


def memory(what: str) -> int:
    """MiB of this process: "VmRSS" is now, "VmHWM" is the peak until now."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) // 1024  # type: ignore[index]


def main() -> None:
    """Prepares what the specs in FOLDER/specs.json name."""
    root = Path(sys.argv[1])
    specs = json.loads((root / "specs.json").read_text())
    sys.dont_write_bytecode = True
    tokenizer, before, watch = Kit.Tokenizer(), memory("VmRSS"), Watch(root / "data")
    sources = [open_source(spec | dict(label=name)) for name, spec in specs.items()]
    report = prepare(sources, Kit.grammar(fixed_grid(4, 4)), tokenizer, root / "data", max_tokens=512,
                     shard_items=512, show_progress=False)  # fmt: skip
    outside = list(watch.outside)
    print(report, file=sys.stderr)
    print(json.dumps(dict(before=before, most=memory("VmHWM"), outside=outside)))


if __name__ == "__main__":
    main()
