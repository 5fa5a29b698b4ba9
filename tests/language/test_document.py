"""Documents: what is valid, what each trains, and the way through a JSONL row and back."""

import json

import numpy as np
import pytest

from ar_unified.language.document import CodesPart, Document, DocumentError, ImagePart, TextPart
from ar_unified.language.rows import document_from_json, document_to_json

RED = np.full((2, 3, 3), (255, 0, 0), np.uint8)
BLUE = np.full((4, 2, 3), (0, 0, 255), np.uint8)
A, B = TextPart("a"), TextPart("b")
R, S = ImagePart(RED), ImagePart(BLUE)


class Album:
    """Pictures by name, as a folder would keep them."""

    def __init__(self):
        self.pictures = {}

    def save(self, pixels):
        self.pictures[name := f"{len(self.pictures)}.png"] = pixels
        return name

    def load(self, name):
        return self.pictures[name]


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
        (Document.of((A,), 2), "bad_prompt", r"0\.\.1"),
        (Document.of(("a",)), "bad_row", "found str"),
    ],
)
def test_check_names_what_is_wrong(document, kind, says):
    with pytest.raises(DocumentError, match=says) as caught:
        document.check()
    assert caught.value.kind == kind


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
        ({"text": "no picture"}, "bad_row"),
        ({"image": "x", "text": "a", "segments": []}, "bad_row"),
        ({"image": "x", "question": "a"}, "bad_row"),
        ({"image": "x", "text": 3}, "bad_text"),
        ({"image": "x", "text": ""}, "empty_text"),
        ({"image": None, "text": "a"}, "bad_row"),
        ({"segments": []}, "bad_row"),
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
