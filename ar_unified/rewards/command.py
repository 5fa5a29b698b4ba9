"""A command as a reward, for programs in other languages. It reads one line of JSON per answer and writes one number
per line.

    {"id": "...", "sample": 0, "prompt": [parts], "answer": [parts], "expected": [parts], "meta": {...}}

Parts are {"type": "text", "text": ...} and {"type": "image", "image": PATH}. The PNG files exist only while the command
runs. The command must print only the rewards, in the order of the answers. If it fails, the message shows the last line
of its stderr. The command is started once for each batch of answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ar_unified.data.images import to_png
from ar_unified.errors import UserError
from ar_unified.language.document import Document, Part
from ar_unified.language.rows import write_parts
from ar_unified.manifests import Json
from ar_unified.rewards.reward import Failure, Verdict, verdict


class Command:
    """A reward that a command computes. Raises UserError if the command does not exist."""

    def __init__(self, line: str, timeout: float):
        try:
            self.words = shlex.split(line)
        except ValueError as error:
            raise UserError(f"command {line!r}: {error}") from error
        if not self.words or shutil.which(self.words[0]) is None:
            raise UserError(f"command {line!r}: program {(self.words or [''])[0]!r} does not exist or cannot be run")
        self.timeout = timeout

    def __call__(self, prompts: Sequence[Document], answers: Sequence[Document]) -> list[Verdict]:
        """The program's reward for each answer, or the reason why there is none."""
        with tempfile.TemporaryDirectory() as folder:
            pairs = zip(prompts, answers, strict=True)
            rows = [_row(Path(folder) / f"{i:05d}", *pair) for i, pair in enumerate(pairs)]
            said, why = self._run("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        lines = said.splitlines()
        if not why and len(lines) != len(rows):
            why = f"expected {len(rows)} lines with one number each, found {len(lines)}"
        if why:  # no answer has a reward, because it is unclear which line belongs to which answer
            return [Failure(f"{self.words[0]}: {why}")] * len(rows)
        return [verdict(line) for line in lines]

    def _run(self, asked: str) -> tuple[str, str]:
        """Runs the program on the lines `asked`, then kills it and all processes that it started.

        Returns (its output, ""), or ("", what went wrong).
        """
        patience = self.timeout * max(asked.count("\n"), 1)
        try:
            process = subprocess.Popen(
                self.words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return "", str(error.strerror or error)
        try:
            said, complained = process.communicate(asked, timeout=patience)
        except subprocess.TimeoutExpired:
            return "", f"it did not end within {patience:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            last = (complained.strip().splitlines() or ["nothing"])[-1]
            return "", f"it ended with status {process.returncode} and said {last!r:.200}"
        return said, ""


def _row(stem: Path, prompt: Document, answer: Document) -> dict[str, Json]:
    """The JSON that describes an answer to the command. The names of image files begin with `stem`."""
    count = 0

    def save(pixels: np.ndarray) -> str:
        nonlocal count
        path = stem.with_name(f"{stem.name}_{count:02d}.png")
        path.write_bytes(to_png(pixels))
        count += 1
        return str(path)

    def said(parts: Sequence[Part]) -> list[dict[str, str]]:
        return write_parts(parts, save)

    asked = [part for turn in prompt.asked for part in turn.parts] if prompt.asks else prompt.parts
    row = {"id": answer.id, "sample": answer.meta.get("sample", 0), "prompt": said(asked), "answer": said(answer.parts)}
    row["expected"] = said(prompt.answer) if prompt.asks else []
    return row | {"meta": json.loads(json.dumps(dict(prompt.meta), default=str))}
