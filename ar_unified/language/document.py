"""A Document: turns of text and images, in reading order. It is the framework's input and output.

Axes: `H` `W` height and width of an image in pixels; `h` `w` height and width in codes of the image tokenizer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

TASKS = ("text", "text_to_image", "image_to_text", "interleaved")
Speaker = Literal["document", "system", "user", "assistant"]
SPEAKERS: tuple[Speaker, ...] = ("document", "system", "user", "assistant")


class DocumentError(ValueError):
    """What is wrong with a document, and in which part.

    Attributes:
        kind: one word, used for counting: "empty_text", "bad_text", "image_shape", "image_codes", "adjacent_text",
            "bad_turns", "bad_prompt" or "bad_row"; for preference pairs also "no_prompt", "two_prompts", "empty_answer"
            or "same_answers".
        part: index of the wrong part among all parts; 0 if the error concerns no part.
    """

    def __init__(self, kind: str, reason: str, part: int = 0):
        super().__init__(reason)
        self.kind, self.part = kind, part


@dataclass(frozen=True)
class TextPart:
    """A text, exactly as the model reads or writes it."""

    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """An image: `pixels` uint8 [H, W, 3], RGB. Two image parts are equal if their pixels are equal."""

    pixels: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImagePart) and np.array_equal(self.pixels, other.pixels)

    def __hash__(self) -> int:
        return hash((self.pixels.shape, self.pixels.tobytes()))


@dataclass(frozen=True, eq=False)
class CodesPart:
    """The codes of an image from an image tokenizer, int32 [h, w]. Two parts are equal if their codes are equal."""

    codes: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodesPart) and np.array_equal(self.codes, other.codes)

    def __hash__(self) -> int:
        return hash((self.codes.shape, self.codes.tobytes()))


Part = TextPart | ImagePart | CodesPart


@dataclass(frozen=True)
class TokensPart:
    """Ids of the vocabulary, used unchanged. Only a prompt may have them, so that it can end in the middle of an
    image."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """What one speaker says. The speaker "document" means that nobody speaks: plain or interleaved text without turns.

    `trained`: whether the model learns to generate the turn. None means yes for documents and assistants, no for system
    and user. Comparisons of turns ignore `trained`, because ids cannot store it.
    """

    speaker: Speaker
    parts: tuple[Part, ...] = ()
    trained: bool | None = field(default=None, compare=False)

    @property
    def learned(self) -> bool:
        """Whether the model learns to generate the turn: the value of `trained`; if it is None, the speaker decides."""
        return self.speaker in ("document", "assistant") if self.trained is None else self.trained


@dataclass(frozen=True)
class Document:
    """Either one turn without a speaker, or a conversation: user and assistant alternate, and a system turn may come
    first.

    A conversation ends with a turn of the assistant, which may be empty. For classifier-free guidance, the
    unconditional document has an empty user turn.

    Attributes:
        turns: the turns, in order.
        id: the name that the source gave the document.
        origin: "file:line", for messages.
        meta: other facts, such as the scene that an image shows. Comparisons ignore meta, id and origin.
        rejected: in a preference pair, the worse answer, which could replace the assistant's last turn; None in other
            documents.
    """

    turns: tuple[Turn, ...]
    id: str = field(default="", compare=False)
    origin: str = field(default="", compare=False)
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)
    rejected: Turn | None = None

    @classmethod
    def of(cls, parts: Iterable[Part], prompt: int | None = None, **more: Any) -> Document:
        """A document of these parts: without turns, or with the first `prompt` parts as the user's turn and the rest as
        the answer.
        """
        parts = tuple(parts)
        if prompt is None:
            return cls((Turn("document", parts),), **more)
        if not 0 <= prompt <= len(parts):
            raise DocumentError("bad_prompt", f"prompt={prompt}: expected None or a number of parts, 0..{len(parts)}")
        return cls((Turn("user", parts[:prompt]), Turn("assistant", parts[prompt:])), **more)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of all turns, in reading order."""
        return tuple(part for turn in self.turns for part in turn.parts)

    def changed(self, change: Callable[[Part], Part]) -> Document:
        """A copy of the document in which `change` has replaced each part; the rejected answer's parts are changed
        last."""

        def made(turn: Turn) -> Turn:
            parts = tuple(map(change, turn.parts))
            same = all(map(operator.is_, parts, turn.parts))
            return turn if same else Turn(turn.speaker, parts, turn.trained)

        turns = tuple(map(made, self.turns))
        return Document(turns, self.id, self.origin, self.meta, self.rejected and made(self.rejected))

    @property
    def answered(self) -> tuple[Document, ...]:
        """The document itself; for a preference pair, two documents: one with the chosen answer, then one with the
        rejected answer.
        """
        if self.rejected is None:
            return (self,)
        both = (self.turns[-1], self.rejected)
        return tuple(replace(self, turns=(*self.asked, answer), rejected=None) for answer in both)

    @property
    def asks(self) -> bool:
        """Whether the document has turns. If so, the last turn is the answer to the turns before it."""
        return self.turns[-1].speaker != "document"

    @property
    def asked(self) -> tuple[Turn, ...]:
        """The turns before the answer, which is the last turn."""
        return self.turns[:-1]

    @property
    def answer(self) -> tuple[Part, ...]:
        """The parts of the last turn, or all parts if there are no turns."""
        return self.turns[-1].parts

    @property
    def is_pair(self) -> bool:
        """Whether question and answer have one part each, one of them a text and the other an image."""
        if [turn.speaker for turn in self.turns] != ["user", "assistant"]:
            return False
        kinds = [[isinstance(part, TextPart) for part in turn.parts] for turn in self.turns]
        return kinds in ([[False], [True]], [[True], [False]])

    def check(self) -> None:
        """Raises DocumentError, which names the first part that no grammar could encode and decode."""
        check_speakers([turn.speaker for turn in self.turns])
        if self.rejected is not None and (not self.asks or self.rejected.speaker != "assistant"):
            raise DocumentError("bad_turns", "rejected: expected an assistant's turn, in a document with turns")
        i = 0
        for turn in (*self.turns, *([] if self.rejected is None else [self.rejected])):
            before: Part | None = None
            for part in turn.parts:
                _check_part(part, before, i)
                before = part
                i += 1

    @property
    def task(self) -> str:
        """Which of TASKS this document trains. It depends on the turns and on the first part of the answer."""
        turns = self.turns
        if not self.asks or sum(turn.speaker == "assistant" for turn in turns) > 1:
            return "interleaved" if _shows(turns) else "text"
        answer = turns[-1].parts
        if answer and not isinstance(answer[0], TextPart):
            return "text_to_image"
        return "image_to_text" if _shows(turns[:-1]) else "text"


def _shows(turns: Sequence[Turn]) -> bool:
    """Whether the turns have images."""
    return any(not isinstance(part, TextPart) for turn in turns for part in turn.parts)


def check_speakers(speakers: Sequence[str]) -> None:
    """Raises DocumentError("bad_turns") unless a document may have turns of these speakers in this order."""
    if list(speakers) in (["document"], ["user", "assistant"]):  # true for nearly all documents
        return
    talk = list(speakers[1:] if speakers[:1] == ["system"] or speakers[:1] == ("system",) else speakers)
    if not talk or len(talk) % 2 or any(who != ("user", "assistant")[i % 2] for i, who in enumerate(talk)):
        expected = (
            "expected turns that alternate between user and assistant and end with the assistant, after at most one "
            "system turn"
        )
        raise DocumentError("bad_turns", f"turns: {expected}; found {', '.join(map(str, speakers)) or 'none'}")


def _check_part(part: object, before: Part | None, i: int) -> None:
    if isinstance(part, TextPart):
        check_text(part.text, f"part {i}", i)
        if isinstance(before, TextPart):
            reason = f"part {i}: text right after text: join the two, because a model sees no border between them"
            raise DocumentError("adjacent_text", reason, i)
    elif isinstance(part, ImagePart):
        _check_array(part.pixels, np.uint8, "image_shape", f"part {i}: pixels", "[H, W, 3]", i)
    elif isinstance(part, CodesPart):
        _check_array(part.codes, np.int32, "image_codes", f"part {i}: codes", "[h, w]", i)
    else:
        expected = "expected TextPart, ImagePart or CodesPart"
        raise DocumentError("bad_row", f"part {i}: {expected}, found {type(part).__name__}", i)


def check_text(text: object, where: str, part: int = 0) -> None:
    """Raises DocumentError unless the text is a string that is not empty and can be encoded as UTF-8."""
    if not isinstance(text, str):
        raise DocumentError("bad_text", f"{where}: expected a string, found {type(text).__name__}", part)
    if not text:
        raise DocumentError("empty_text", f"{where}: the text is empty", part)
    if text.isascii():  # true for nearly all texts, and Python knows it without reading the characters
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError("bad_text", f"{where}: has a lone surrogate at character {error.start}", part) from None


def _check_array(array: object, dtype: type, kind: str, where: str, shape: str, part: int) -> None:
    # This runs for every image, so the message, which is rarely needed, is only built on an error.
    if isinstance(array, np.ndarray):
        right = array.ndim == 3 and array.shape[2] == 3 if shape == "[H, W, 3]" else array.ndim == 2
        if right and array.dtype == dtype and array.size:
            return
        found = f"{array.dtype} {list(array.shape)}"
    else:
        found = type(array).__name__
    raise DocumentError(kind, f"{where}: expected {np.dtype(dtype)} {shape}, found {found}", part)
