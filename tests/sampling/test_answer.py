"""The document of an answer that continues after text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ar_unified.language.document import CodesPart, Part, TextPart, Turn
from ar_unified.sampling.answer import finished
from ar_unified.sampling.request import Request
from tests.language.small import Pieces, grammar_of

CODES = np.array([[0, 1]], np.int32)


@pytest.mark.parametrize(
    "answer",
    [(CodesPart(CODES),), (CodesPart(CODES), TextPart("b")), (TextPart("b"), CodesPart(CODES)), (TextPart("b"),), ()],
)
@pytest.mark.parametrize("kind", ["lwm", "grid"])
def test_an_image_may_be_the_first_to_come_behind_text(kind: str, answer: tuple[Part, ...]) -> None:
    """If an image also begins with text (LWM), its first ids are pieces of text and do not count as an image."""
    grammar = grammar_of(kind, 1, 2, codec=Pieces("a", "b", "<vi", "sion>", "</vision>"))
    prompt = grammar.prompt([Turn("document", (TextPart("a"),))])
    tokens = np.append(grammar.parts(answer), grammar.syntax.end).astype(np.int32)
    plan: Any = SimpleNamespace(prompt=prompt, request=Request("r", (), turn=False), budget=40, smallest=4)
    sample = finished(grammar, plan, 0, tokens)
    assert sample.error == "" and sample.document is not None
    said = [part.text if isinstance(part, TextPart) else part.codes.tolist() for part in sample.document.parts]
    assert said == [part.text if isinstance(part, TextPart) else CODES.tolist() for part in answer]
