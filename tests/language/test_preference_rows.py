"""Preference pairs as JSON rows: every form converts to documents and back, and each bad row has its kind."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ar_unified.language.document import CodesPart, Document, DocumentError, ImagePart, TextPart, Turn
from ar_unified.language.rows import document_from_json, document_to_json
from tests.language.test_rows import BLUE, RED, Album

ALBUM = {"red": RED, "blue": BLUE}
ASKED = Turn("user", (TextPart("Draw it."),))
RIGHT, WRONG = Turn("assistant", (ImagePart(RED),)), Turn("assistant", (ImagePart(BLUE),))
WORDS = Turn("assistant", (TextPart("y"),))
PAIR = Document((ASKED, RIGHT), rejected=WRONG)


def image(name):
    return {"type": "image", "image": name}


def read(**row):
    return document_from_json(json.loads(json.dumps(row)), ALBUM.__getitem__)


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": "Draw it."},
        {"prompt": [{"type": "text", "text": "Draw it."}]},
        {"prompt": [{"role": "user", "content": "Draw it."}]},
        {"messages": [{"role": "user", "content": "Draw it."}]},
    ],
)
@pytest.mark.parametrize(
    "answer",
    [
        lambda name: [image(name)],
        lambda name: {"role": "assistant", "content": [image(name)]},
        lambda name: [{"role": "assistant", "content": [image(name)]}],
    ],
)
def test_a_prompt_and_an_answer_may_be_said_in_several_ways(prompt, answer):
    assert read(**prompt, chosen=answer("red"), rejected=answer("blue")) == PAIR


def test_answers_alone_are_learned():
    said = [dict(role="user", content="One?"), dict(role="assistant", content="1"), dict(role="user", content="Two?")]
    pair = read(messages=said, chosen="2", rejected="3", id=7, score=0.5)
    assert [turn.learned for turn in pair.turns] == [False, False, False, True] and pair.rejected.learned
    assert (pair.id, pair.meta) == ("7", {"score": 0.5})
    chosen, rejected = pair.answered
    assert chosen.turns[:-1] == rejected.turns[:-1] == pair.asked and chosen.rejected is rejected.rejected is None
    assert (chosen.answer, rejected.answer) == ((TextPart("2"),), (TextPart("3"),))


def test_there_and_back():
    album = Album()
    for document in (
        PAIR,
        Document((Turn("system", (TextPart("s"),)), ASKED, RIGHT), "a", meta={"k": 1}, rejected=WRONG),
        Document(
            (ASKED, Turn("assistant", (TextPart("x"), ImagePart(RED)))), rejected=Turn("assistant", (TextPart("y"),))
        ),
    ):
        row = json.loads(json.dumps(document_to_json(document, album.save)))
        again = document_from_json(row, album.load)
        assert again == document and (again.id, again.meta) == (document.id, document.meta)


def test_changes_reach_both_answers():
    codes = {id(RIGHT.parts[0]): np.zeros((1, 1), np.int32), id(WRONG.parts[0]): np.ones((1, 1), np.int32)}
    changed = PAIR.changed(lambda part: CodesPart(codes[id(part)]) if id(part) in codes else part)
    assert changed.answer[0].codes == 0 and changed.rejected.parts[0].codes == 1 and changed.asked == PAIR.asked
    assert changed != PAIR and Document(PAIR.turns) != PAIR


GOOD = dict(prompt="p", chosen="a", rejected="b")


@pytest.mark.parametrize(
    "change, kind, said",
    [
        (dict(prompt=None), "no_prompt", "expected prompt or messages, found neither"),
        (dict(prompt=""), "no_prompt", "found neither"),
        (dict(messages=[dict(role="user", content="p")]), "two_prompts", "found both"),
        (dict(rejected="a"), "same_answers", "expected two answers, found 'a' twice"),
        (dict(chosen=""), "empty_answer", "chosen: the answer is empty"),
        (dict(rejected=" \n"), "empty_answer", "rejected: the answer is empty"),
        (dict(rejected=[]), "empty_answer", "rejected"),
        (dict(rejected=[dict(type="text", text=" ")]), "empty_answer", "rejected"),
        (dict(chosen=dict(role="assistant", content=None)), "empty_answer", "chosen"),
        (dict(chosen=dict(role="user", content="a")), "bad_row", "chosen: expected the assistant's message"),
        (dict(chosen=3), "bad_row", "chosen: expected a text or a list of parts"),
        (dict(text="x"), "bad_row", "found also text"),
        (dict(prompt=[dict(role="assistant", content="p")]), "bad_turns", "alternate between user and assistant"),
    ],
)
def test_each_bad_pair_has_a_name(change, kind, said):
    row = {key: value for key, value in (GOOD | change).items() if value is not None}
    with pytest.raises(DocumentError, match=said) as error:
        read(**row)
    assert error.value.kind == kind
    with pytest.raises(DocumentError, match="found no rejected"):
        read(prompt="p", chosen="a")
