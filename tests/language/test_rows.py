"""Documents are converted to JSONL rows and chat messages, and back."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_unified.language.document import CodesPart, Document, DocumentError, ImagePart, TextPart, TokensPart, Turn
from ar_unified.language.rows import document_from_json, document_to_json, read_messages, read_parts

RED = np.full((2, 3, 3), (255, 0, 0), np.uint8)
BLUE = np.full((4, 2, 3), (0, 0, 255), np.uint8)
A, B = TextPart("a"), TextPart("b")
R, S = ImagePart(RED), ImagePart(BLUE)


class Album:
    """Images by name, like in a folder."""

    def __init__(self):
        self.images = {}

    def save(self, pixels):
        self.images[name := f"{len(self.images)}.png"] = pixels
        return name

    def load(self, name):
        return self.images[name]


@pytest.mark.parametrize(
    "document, keys",
    [
        (Document.of((A, R), 1), {"image", "text"}),
        (Document.of((R, A, B), 2), {"image", "question", "answer"}),
        (Document.of((A, R, B, S, R)), {"segments"}),
        (Document.of((R, A), 1), {"segments", "prompt"}),
        (Document.of((A, B), 1), {"segments", "prompt"}),
        (Document.of((R, A), 0), {"segments", "prompt"}),
    ],
)
def test_json_there_and_back(document, keys):
    album = Album()
    row = document_to_json(document, album.save)
    assert row.keys() == keys
    assert document_from_json(json.loads(json.dumps(row)), album.load) == document


def test_other_keys_travel_as_meta():
    row = {"image": "x", "text": "a red square", "id": 7, "split": "train", "color": "red"}
    document = document_from_json(row, lambda name: RED)
    assert (document.id, document.meta) == ("7", {"split": "train", "color": "red"})
    assert document_to_json(document, lambda pixels: "x") == row | {"id": "7"}


def test_text_blocks_side_by_side_become_one_text_but_not_across_the_border():
    blocks = [{"type": "text", "text": text} for text in "abcd"]
    whole = document_from_json({"segments": blocks}, lambda name: RED)
    assert whole == Document.of((TextPart("a\n\nb\n\nc\n\nd"),))
    turn = document_from_json({"segments": blocks, "prompt": 3}, lambda name: RED)
    assert turn == Document.of((TextPart("a\n\nb\n\nc"), TextPart("d")), 1)


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"text": "no image"}, "bad_row"),
        ({"image": "x", "text": "a", "segments": []}, "bad_row"),
        ({"image": "x", "question": "a"}, "bad_row"),
        ({"image": "x", "text": 3}, "bad_text"),
        ({"image": "x", "text": ""}, "empty_text"),
        ({"image": None, "text": "a"}, "bad_row"),
        ({"segments": []}, "bad_row"),
        ({"messages": [], "segments": []}, "bad_row"),
        ({"image": "x", "text": "a", "prompt": 1}, "bad_prompt"),
        ({"segments": [{"type": "video"}]}, "bad_row"),
        ({"segments": [{"type": "text", "text": "a"}], "prompt": True}, "bad_prompt"),
        ({"segments": [{"type": "text", "text": "a"}], "prompt": 2}, "bad_prompt"),
        (["image"], "bad_row"),
    ],
)
def test_bad_rows_are_refused_by_kind(row, kind):
    with pytest.raises(DocumentError) as caught:
        document_from_json(row, lambda name: RED)
    assert caught.value.kind == kind


def test_rows_that_would_not_come_back_are_not_written():
    with pytest.raises(DocumentError, match="decode them first"):
        document_to_json(Document.of((CodesPart(np.zeros((1, 1), np.int32)),)), lambda pixels: "x")
    with pytest.raises(DocumentError, match="'text' is a field"):
        document_to_json(Document.of((A, R), 1, meta={"text": "other"}), lambda pixels: "x")
    with pytest.raises(DocumentError, match="a document without turns needs a part"):
        document_to_json(Document((Turn("document", (A,), False),)), lambda pixels: "x")


# ---- messages ------------------------------------------------------------------------------------


def conversation(*turns):
    return Document(tuple(Turn(*turn) for turn in turns))


@pytest.mark.parametrize(
    "document",
    [
        conversation(("system", (A,)), ("user", (A, R)), ("assistant", (B,))),
        conversation(("user", (A,)), ("assistant", (R,)), ("user", (S, B)), ("assistant", (A, R, B))),
        conversation(("system", ()), ("user", ()), ("assistant", ())),
        conversation(("user", (A,), True), ("assistant", (B,), False), ("user", (R,)), ("assistant", (A,), True)),
    ],
)
def test_conversations_there_and_back(document):
    album = Album()
    row = json.loads(json.dumps(document_to_json(document, album.save)))
    assert row.keys() == {"messages"}
    again = document_from_json(row, album.load)
    assert again == document
    assert [turn.trained for turn in again.turns] == [turn.trained for turn in document.turns]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_document_comes_back_from_its_row(data):
    def parts():
        kinds = data.draw(st.lists(st.sampled_from([A, R, S, TextPart("  x\n")]), max_size=3))
        kept = kinds[:1] + [b for a, b in zip(kinds, kinds[1:], strict=False) if not (a in TEXTS and b in TEXTS)]
        return tuple(kept)

    TEXTS = (A, TextPart("  x\n"))
    count = data.draw(st.integers(0, 3))
    speakers = ["system"] * data.draw(st.booleans()) + ["user", "assistant"] * count if count else ["document"]
    trained = st.sampled_from([None, True, False]) if len(speakers) > 1 else st.none()
    document = Document(tuple(Turn(who, parts(), data.draw(trained)) for who in speakers), id="7", meta={"n": [1]})
    if not document.parts and not count:
        with pytest.raises(DocumentError, match="a document without turns needs a part"):
            document_to_json(document, Album().save)
        return
    album = Album()
    again = document_from_json(json.loads(json.dumps(document_to_json(document, album.save))), album.load)
    assert (again, again.id, again.meta) == (document, document.id, document.meta)
    assert [turn.trained for turn in again.turns] == [turn.trained for turn in document.turns]


def read(*messages):
    return document_from_json({"messages": list(messages)}, {"r": RED, "s": BLUE}.__getitem__)


def test_messages_in_openai_s_form():
    found = read(
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "image_url", "image_url": {"url": "r"}}]},
        {
            "role": "assistant",
            "content": [{"type": "image_url", "image_url": "s"}, {"type": "refusal", "refusal": "a"}],
        },
        {"role": "user", "content": ""},
        {"role": "assistant", "content": None, "refusal": "b", "tool_calls": []},
    )
    assert found == conversation(
        ("system", (A,)), ("user", (B, R)), ("assistant", (S, A)), ("user",), ("assistant", (B,))
    )
    assert read({"role": "user", "content": "a"}, {"role": "assistant", "content": None}).answer == ()


def test_before_a_greeting_the_user_says_nothing():
    hello = {"role": "assistant", "content": "b"}
    assert read(hello) == conversation(("user",), ("assistant", (B,)))
    system = {"role": "system", "content": "a"}
    greeted = conversation(("system", (A,)), ("user",), ("assistant", (B,)))
    assert read(system, hello) == greeted
    asked = read(system, hello, {"role": "user", "content": "a"}, hello)
    assert asked.turns == (*greeted.turns, Turn("user", (A,)), Turn("assistant", (B,)))


def test_a_weight_says_what_is_learned():
    found = read(
        {"role": "user", "content": "a", "weight": 1},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    )
    assert [turn.trained for turn in found.turns] == [True, False, None, None]
    assert [turn.learned for turn in found.turns] == [True, False, False, True]


def test_messages_of_one_role_in_a_row_are_one_turn():
    found = read(
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": [{"type": "image", "image": "r"}, {"type": "text", "text": "a"}]},
        {"role": "user", "content": "b"},
        {"role": "user", "content": [{"type": "image", "image": "s"}]},
        {"role": "assistant", "content": "a"},
    )
    assert found == conversation(
        ("system", (TextPart("a\n\nb"),)), ("user", (R, TextPart("a\n\nb"), S)), ("assistant", (A,))
    )


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "messages, kind, says",
    [
        ([], "bad_row", "at least one message"),
        ("a", "bad_row", "a list of"),
        (["a"], "bad_row", "messages 0: expected one of the roles"),
        ([{"content": "a"}], "bad_row", "system, developer, user, assistant, found None"),
        ([USER, {"role": "tool", "content": "b"}], "bad_row", "messages 1: .*found 'tool'"),
        ([{"role": ["user"], "content": "b"}], "bad_row", "one of the roles"),
        ([USER, {**ANSWER, "tool_calls": [{"id": 1}]}], "bad_row", "messages 1: .*tool_calls"),
        ([USER, {**ANSWER, "audio": {"id": 1}}], "bad_row", "audio"),
        ([USER, {**ANSWER, "weight": 0.5}], "bad_row", "weight 0 or 1, found 0.5"),
        ([{"role": "user", "content": None}, ANSWER], "bad_row", "messages 0: content: expected a text or a list"),
        ([{"role": "user", "content": [{"type": "video"}]}, ANSWER], "bad_row", "messages 0: content 0: expected type"),
        ([{"role": "user", "content": [{"type": "tokens", "ids": [1]}]}, ANSWER], "bad_row", "expected type"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER], "bad_row", "to an image"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 3}]}, ANSWER],
            "bad_text",
            "content 0: expected a string",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": ""}]}, ANSWER], "empty_text", "content 0"),
        ([USER], "bad_turns", "found user"),
        ([ANSWER, USER], "bad_turns", "found user, assistant, user"),
        ([USER, ANSWER, {"role": "system", "content": "a"}, USER, ANSWER], "bad_turns", "turns that alternate"),
        ([USER, {**ANSWER, "weight": 0}, ANSWER], "bad_turns", "turns that alternate"),  # two answers in a row
    ],
)
def test_bad_messages_are_refused_by_kind(messages, kind, says):
    with pytest.raises(DocumentError, match=says) as caught:
        document_from_json({"messages": messages}, {"r": RED}.__getitem__)
    assert caught.value.kind == kind


def test_ids_are_parts_of_a_request_alone():
    def image(name, where):
        return name, where

    parts = [
        {"type": "tokens", "ids": [1, 2]},
        {"type": "image", "image": "r", "alt": "x"},
        {"type": "text", "text": "a"},
    ]
    assert read_parts(parts, image, "prompt", tokens=True) == [TokensPart((1, 2)), ("r", "prompt 1"), A]
    assert read_parts("a", image, "prompt") == [A]
    (turn,) = read_messages([{"role": "user", "content": parts}], image, tokens=True)
    assert turn == ("user", [TokensPart((1, 2)), ("r", "messages 0: content 1"), A], None)
    for ids in ([], [True], [1.0], "12", None):
        with pytest.raises(DocumentError, match="prompt 0: expected ids, a list of whole numbers"):
            read_parts([{"type": "tokens", "ids": ids}], image, "prompt", tokens=True)
    with pytest.raises(DocumentError, match='expected type "text" or "image", found'):
        read_parts(parts, image, "prompt")
