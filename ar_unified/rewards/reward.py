"""What a reward is.

A reward gets many answers in one call. For each answer, it returns a number or says what went wrong. If it raises,
hangs or returns NaN for one answer, the other answers keep their numbers, and the caller decides what to do.
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
    """An answer got no reward, so training stops (`RewardConfig.on_error`)."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """
    Attributes:
        function: the name of a shipped reward, "module:function" for Python, "command:PROGRAM ..." for another
            language, or "scores:FILE" for existing samples.
        timeout: seconds that a reward may take for one answer. A command that gets n answers at once may take n times
            as long.
        on_error: what happens if a reward raises, hangs or is not a finite number. "skip": the group of this answer is
            left out, counted and named, and training goes on. "stop": training stops before the step.

    Raises ValueError that names the field.
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
    """The reason why there is no reward, in words."""

    reason: str


Verdict = float | Failure
# (prompts, answers) -> verdicts. A prompt is the document with the request: its turns, the right answer if there is
# one, and its `meta`. An answer is a document without turns, with images as pixels. It has the `id` of its prompt, and
# its `meta["sample"]` is its number among the answers to that prompt.
Reward = Callable[[Sequence[Document], Sequence[Document]], list[Verdict]]


def verdict(value: Any) -> Verdict:
    """Converts a value to a reward, or says why it is not a reward."""
    if isinstance(value, Failure):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return Failure(f"expected a number, found {value!r:.80}")
    return number if math.isfinite(number) else Failure(f"expected a finite number, found {number}")


def words(prompt: Document) -> str:
    """The prompt as text for a message: its id and its first words."""
    texts = [part.text for turn in (prompt.asked or prompt.turns) for part in turn.parts if isinstance(part, TextPart)]
    name = f"prompt {prompt.id!r}" if prompt.id else "the prompt"
    return f"{name} ({' '.join(texts)[:80]!r})" if texts else name
