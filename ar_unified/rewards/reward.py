"""What a reward is.

A reward is asked about many answers at once. For each it gives a number or says what went wrong. If it raises, hangs or
says NaN for one answer, the other answers keep theirs, and the caller decides what happens then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from ar_unified.errors import RunError, nearest, outside
from ar_unified.language.document import Document, TextPart

ON_ERROR = ("skip", "stop")


class RewardFailed(RunError):
    """A reward could not be had, and training stops for it (`RewardConfig.on_error`)."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """
    Attributes:
        function: how good an answer is: a shipped reward's name, "module:function" of Python, "command:PROGRAM ..."
            for another language, "scores:FILE" of samples that are there.
        timeout: seconds that a reward may take for one answer; a command that gets n answers at once has n times as
            many.
        on_error: what follows when a reward raises, hangs or is no finite number. "skip": its group is left out,
            counted and named, and training goes on. "stop": training stops before the step.

    Raises ValueError, naming the field.
    """

    function: str = ""
    timeout: float = 60.0
    on_error: str = "skip"

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            near = nearest(self.on_error, ON_ERROR)
            raise ValueError(f"on_error: expected one of {', '.join(ON_ERROR)}; found {self.on_error!r}{near}")
        if problems := outside(self, timeout="(0, inf)"):
            raise ValueError(problems[0])


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no reward, in words."""

    reason: str


Verdict = float | Failure
# (prompts, answers) -> verdicts. A prompt is the document that asks: its turns, the right answer where it has one, and
# its `meta`. An answer is a document without turns, its images as pixels; its `id` is the prompt's, and its
# `meta["sample"]` says which of the answers to that prompt it is.
Reward = Callable[[Sequence[Document], Sequence[Document]], list[Verdict]]


def verdict(value: Any) -> Verdict:
    """A value as a reward, or why it is none."""
    if isinstance(value, Failure):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return Failure(f"expected a number, found {value!r:.80}")
    return number if math.isfinite(number) else Failure(f"expected a finite number, found {number}")


def words(prompt: Document) -> str:
    """The prompt for a message: its name and how it begins."""
    texts = [part.text for turn in (prompt.asked or prompt.turns) for part in turn.parts if isinstance(part, TextPart)]
    name = f"prompt {prompt.id!r}" if prompt.id else "the prompt"
    return f"{name} ({' '.join(texts)[:80]!r})" if texts else name
