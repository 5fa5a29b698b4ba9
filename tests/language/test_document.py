"""Documents: which are valid, what each trains, and who says what."""

import numpy as np
import pytest

from ar_unified.language.document import CodesPart, Document, DocumentError, ImagePart, TextPart, Turn, check_speakers

RED = np.full((2, 3, 3), (255, 0, 0), np.uint8)
BLUE = np.full((4, 2, 3), (0, 0, 255), np.uint8)
A, B = TextPart("a"), TextPart("b")
R, S = ImagePart(RED), ImagePart(BLUE)


def test_equality_is_by_content_and_ignores_where_a_document_came_from():
    again = Document.of((A, ImagePart(RED.copy())), 1, id="7", origin="x.jsonl:3", meta={"n": 1})
    assert Document.of((A, R), 1) == again and hash(Document.of((A, R), 1)) == hash(again)
    assert Document.of((A, R), 1) != Document.of((A, S), 1)
    assert Document.of((A, R), 1) != Document.of((A, R))
    assert CodesPart(np.zeros((1, 4), np.int32)) != CodesPart(np.zeros((2, 2), np.int32))


@pytest.mark.parametrize(
    "parts, prompt, task",
    [
        ((A,), None, "text"),
        ((A, R, B), None, "interleaved"),
        ((A, R), 1, "text_to_image"),
        ((R,), 0, "text_to_image"),
        ((R, S), 1, "text_to_image"),
        ((R, A), 1, "image_to_text"),
        ((R, A, B), 2, "image_to_text"),
        ((A, B), 1, "text"),
        ((A, B, R), 1, "text"),  # the answer's beginning decides the task
        ((R, B, S), 1, "image_to_text"),
        ((A,), 0, "text"),
        ((R,), 1, "image_to_text"),
        ((), 0, "text"),
    ],
)
def test_task(parts, prompt, task):
    document = Document.of(parts, prompt)
    document.check()
    assert document.task == task


@pytest.mark.parametrize(
    "document, kind, says",
    [
        (Document.of((R, TextPart(""))), "empty_text", "part 1: the text is empty"),
        (Document.of((A, B)), "adjacent_text", "part 1"),
        (Document.of((A, B, A), 1), "adjacent_text", "part 2"),
        (Document.of((TextPart("ok\ud800"),)), "bad_text", "surrogate at character 2"),
        (Document.of((ImagePart(RED.astype(np.float32)),)), "image_shape", "float32"),
        (Document.of((ImagePart(RED[..., :1]),)), "image_shape", r"\[2, 3, 1\]"),
        (Document.of((ImagePart(RED[:0]),)), "image_shape", r"\[0, 3, 3\]"),
        (Document.of((CodesPart(np.zeros((2, 2), np.int64)),)), "image_codes", "int64"),
        (Document.of((CodesPart(np.zeros(4, np.int32)),)), "image_codes", r"\[4\]"),
        (Document.of(("a",)), "bad_row", "found str"),
    ],
)
def test_check_names_what_is_wrong(document, kind, says):
    with pytest.raises(DocumentError, match=says) as caught:
        document.check()
    assert caught.value.kind == kind


def test_a_border_outside_the_parts_is_refused():
    for prompt in (-1, 2):
        with pytest.raises(DocumentError, match=r"0\.\.1") as caught:
            Document.of((A,), prompt)
        assert caught.value.kind == "bad_prompt"


def talk(speakers):
    names = {"d": "document", "s": "system", "u": "user", "a": "assistant"}
    return [names[letter] for letter in speakers]


@pytest.mark.parametrize("speakers", ["d", "ua", "sua", "uaua", "suauaua"])
def test_who_may_follow_whom(speakers):
    Document(tuple(Turn(who) for who in talk(speakers))).check()
    check_speakers(tuple(talk(speakers)))


@pytest.mark.parametrize("speakers", ["", "u", "a", "s", "sa", "su", "au", "uau", "usua", "ssua", "dd", "dua", "uad"])
def test_turns_in_another_order_are_refused(speakers):
    with pytest.raises(DocumentError, match="alternate between user and assistant") as caught:
        Document(tuple(Turn(who) for who in talk(speakers))).check()
    assert caught.value.kind == "bad_turns"
    assert str(caught.value).endswith(", ".join(talk(speakers)) or "none")


def test_parts_are_counted_through_all_turns_and_texts_of_two_turns_may_meet():
    Document((Turn("user", (A,)), Turn("assistant", (B,)))).check()
    with pytest.raises(DocumentError, match="part 3: the text is empty") as caught:
        Document((Turn("system", (A,)), Turn("user", (R, A)), Turn("assistant", (TextPart(""),)))).check()
    assert caught.value.part == 3


def test_what_is_learned_is_what_is_said_and_not_what_is_told_unless_a_turn_says_otherwise():
    learned = [Turn(who).learned for who in ("document", "system", "user", "assistant")]
    assert learned == [True, False, False, True]
    assert Turn("user", trained=True).learned and not Turn("assistant", trained=False).learned
    assert Turn("user", (A,), True) == Turn("user", (A,))  # ids cannot store `trained`


def test_what_is_asked_and_what_is_answered():
    turns = Turn("system", (B,)), Turn("user", (R,)), Turn("assistant", (A, S))
    document = Document(turns)
    assert document.asks and document.asked == turns[:2] and document.answer == (A, S)
    assert document.parts == (B, R, A, S) and not document.is_pair
    plain = Document.of((A, R))
    assert not plain.asks and plain.asked == () and plain.answer == (A, R)
    pairs = [((A, R), 1), ((R, A), 1), ((A, B), 1), ((R, S), 1), ((A, R), 0), ((A, R), None), ((R, A, B), 2)]
    assert [Document.of(*pair).is_pair for pair in pairs] == [True, True, False, False, False, False, False]
    codes = CodesPart(np.zeros((1, 1), np.int32))
    changed = document.changed(lambda part: codes if isinstance(part, ImagePart) else part)
    assert changed.parts == (B, codes, A, codes) and [t.speaker for t in changed.turns] == [
        "system",
        "user",
        "assistant",
    ]


def test_task_of_a_conversation():
    ask, paint, say = Turn("user", (R, A)), Turn("assistant", (S,)), Turn("assistant", (B,))
    said = Turn("user", (A,))
    for turns, task in (
        ((Turn("system", (A,)), ask, say), "image_to_text"),
        ((Turn("system", (A,)), said, paint), "text_to_image"),
        ((ask, paint, said, say), "interleaved"),
        ((said, say, said, say), "text"),
    ):
        assert Document(turns).task == task
