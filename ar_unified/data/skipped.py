"""The list of items that a stage leaves out: skipped.jsonl, with {"origin", "kind", "reason"} in each line."""

from __future__ import annotations

import json
from pathlib import Path

from ar_unified import workdir
from ar_unified.data.items import BadItem, LeftOut

SKIPPED = "skipped.jsonl"


class Skipped:
    """Collects the bad items that a training leaves out. Items that an earlier attempt has listed are kept.

    Args:
        folder: the stage's folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / SKIPPED
        rows = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ()
        self._bad = {bad.origin: bad for bad in (BadItem(**json.loads(row)) for row in rows)}

    def __call__(self, bad: BadItem) -> None:
        """Adds an item, unless it is in the list already."""
        self._bad.setdefault(bad.origin, bad)

    @property
    def counts(self) -> LeftOut:
        """How many items there are of each kind, and the first of each."""
        counts = LeftOut()
        for bad in self._bad.values():
            counts(bad)
        return counts

    def write(self) -> None:
        """Writes the file. Nothing is written if nothing was left out."""
        rows = [{"origin": bad.origin, "kind": bad.kind, "reason": bad.reason} for bad in self._bad.values()]
        if rows:
            workdir.write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
