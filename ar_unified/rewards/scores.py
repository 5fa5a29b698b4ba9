"""A file of scores as a reward. Another program, or a person, has scored existing samples.

Each line is JSON, {"id", "sample", "score"}, with the id and the sample's number from samples.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ar_unified.errors import UserError, about
from ar_unified.language.document import Document
from ar_unified.rewards.reward import Failure, Verdict, verdict


class Scores:
    """Scores from a file. Raises UserError if the file is missing or a line has another form."""

    def __init__(self, file: str | Path):
        self.file = Path(file)
        self.known: dict[tuple[str, int], Verdict] = {}
        with about(str(self.file)):
            lines = self.file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self.known[str(row["id"]), int(row.get("sample") or 0)] = verdict(row["score"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                found = f"{line:.60}"
                expected = 'expected {"id", "sample", "score"}'
                raise UserError(f"{self.file}:{number}: {expected}, found {found!r}") from error

    def __call__(self, prompts: Sequence[Document], answers: Sequence[Document]) -> list[Verdict]:
        """Looks up the score of each answer."""
        keys = [(answer.id, int(answer.meta.get("sample", 0))) for answer in answers]
        none = f"{self.file} has no score for sample"
        return [self.known.get(key, Failure(f"{none} {key[1]} of {key[0]!r}")) for key in keys]
