"""Decides which answers are right, for each dataset, by plain functions of a held-out document and the model's answer.

A protocol has up to nine functions. A function that a dataset does not have is None, and its metric is left out.
Images are uint8 [H, W, 3].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ar_unified.data.edits import kind_of
from ar_unified.data.scenes import read_caption, scene_from_json
from ar_unified.evaluation import easy_vqa, shapes
from ar_unified.language.document import Document, TextPart


def text_of(document: Document, answer: bool | None = None) -> str:
    """The document's texts joined by spaces: all (None), the answer's (True) or the prompt's (False)."""
    asked = tuple(part for turn in document.asked for part in turn.parts)
    parts = document.parts if answer is None else document.answer if answer else asked
    return " ".join(part.text for part in parts if isinstance(part, TextPart))


def same_text(expected: str, got: str) -> bool:
    """Whether texts are equal, apart from white space at the ends."""
    return expected.strip() == got.strip()


@dataclass(frozen=True)
class Protocol:
    """The checks of one dataset.

    Attributes:
        image_matches(document, pixels): whether the pixels show what the document's text says.
        story_matches(document, i, before, after): whether the model's image `after` is right as the i-th image (from 0)
            of the document; `before` is the real image that precedes it.
        edit_matches(document, after): whether the model's image `after` is the document's image, edited as instructed.
        answer_matches(expected, got): whether a text answer is right.
        caption_matches(document, got): whether `got` is a right caption of the image in the document.
        question_kind(document): the group of questions in which the answer is also counted; "" for none.
        edit_kind(document): the same for an edit.
        turn_matches(document, i, got): whether the i-th answer (from 0) of a conversation, a text or pixels, is right.
        turn_kind(document, i): the same for the i-th answer of a conversation.
    """

    name: str
    image_matches: Callable[[Document, np.ndarray], bool] | None = None
    story_matches: Callable[[Document, int, np.ndarray, np.ndarray], bool] | None = None
    edit_matches: Callable[[Document, np.ndarray], bool] | None = None
    answer_matches: Callable[[str, str], bool] = same_text
    caption_matches: Callable[[Document, str], bool] | None = None
    turn_matches: Callable[[Document, int, str | np.ndarray], bool] | None = None
    question_kind: Callable[[Document], str] = lambda document: str(document.meta.get("kind", ""))
    edit_kind: Callable[[Document], str] = lambda document: str(document.meta.get("kind", ""))
    turn_kind: Callable[[Document, int], str] = lambda document, i: ""


# ---- shapes: the embedded dataset --------------------------------------------------------------------------


def _shapes_image(document: Document, pixels: np.ndarray) -> bool:
    return shapes.scene_matches(shapes.read_scene(pixels), scene_from_json(document.meta["scene"]))


def _shapes_story(document: Document, i: int, before: np.ndarray, after: np.ndarray) -> bool:
    return shapes.story_change_matches(before, after, scene_from_json(document.meta["scenes"][i]))


def _shapes_edit(document: Document, after: np.ndarray) -> bool:
    """Compares the scenes with their sizes, because some instructions change only the size."""
    return shapes.edit_matches(after, scene_from_json(document.meta["edited_scene"]))


def _shapes_edit_kind(document: Document) -> str:
    before, after = (scene_from_json(document.meta[name]) for name in ("scene", "edited_scene"))
    return kind_of(before, after)


def _shapes_turn(document: Document, i: int, got: str | np.ndarray) -> bool:
    """An image or a description must show the current scene of the conversation, with sizes. Other answers must equal
    those in the document.
    """
    scene = scene_from_json(document.meta["scenes"][i])
    if isinstance(got, np.ndarray):
        return shapes.edit_matches(got, scene)
    if _shapes_turn_kind(document, i) == "describe":
        return read_caption(got) == scene
    (right,) = [turn for turn in document.turns if turn.speaker == "assistant"][i].parts
    return isinstance(right, TextPart) and same_text(right.text, got)


def _shapes_turn_kind(document: Document, i: int) -> str:
    return str(document.meta["kinds"][i])


def _shapes_caption(document: Document, got: str) -> bool:
    """Compares the scenes that captions describe, with sizes, because captions have many wordings."""
    return read_caption(got) == scene_from_json(document.meta["scene"])


_SHAPES_QUESTIONS = {
    "What colour": "colour",
    "What shape": "shape",
    "Is the": "size",
    "Where": "place",
    "How many": "count",
    "Is there": "presence",
    "What is": "neighbour",
}


def _shapes_question(document: Document) -> str:
    question = text_of(document, answer=False)
    return next((kind for start, kind in _SHAPES_QUESTIONS.items() if question.startswith(start)), "")


# ---- easy-VQA ----------------------------------------------------------------------------------------------


def _easy_vqa_facts(document: Document) -> tuple[str, str] | None:
    if "color" in document.meta and "shape" in document.meta:
        return document.meta["color"], document.meta["shape"]
    return easy_vqa.facts(text_of(document))


def _easy_vqa_image(document: Document, pixels: np.ndarray) -> bool:
    found = easy_vqa.read_image(pixels)
    return found is not None and (found.color, found.shape) == _easy_vqa_facts(document)


def _easy_vqa_caption(document: Document, got: str) -> bool:
    found = easy_vqa.facts(got)
    return found is not None and found == _easy_vqa_facts(document)


def _easy_vqa_question(document: Document) -> str:
    answer = text_of(document, answer=True).strip()
    return "yes or no" if answer in ("yes", "no") else "colour" if answer in easy_vqa.COLORS else "shape"


# ------------------------------------------------------------------------------------------------------------


def _exact_caption(document: Document, got: str) -> bool:
    return same_text(text_of(document), got)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "shapes",
            image_matches=_shapes_image,
            story_matches=_shapes_story,
            edit_matches=_shapes_edit,
            edit_kind=_shapes_edit_kind,
            turn_matches=_shapes_turn,
            turn_kind=_shapes_turn_kind,
            caption_matches=_shapes_caption,
            question_kind=_shapes_question,
        ),
        Protocol(
            "easy_vqa",
            image_matches=_easy_vqa_image,
            caption_matches=_easy_vqa_caption,
            question_kind=_easy_vqa_question,
        ),
        Protocol("exact", caption_matches=_exact_caption),
    )
}
