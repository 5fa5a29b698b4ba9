"""A Document: text and pictures in reading order. What goes into the framework, and what comes out of it.

Axes: `H` `W` height and width of a picture in pixels; `h` `w` the same in codes of the image tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TASKS = ("text", "text_to_image", "image_to_text", "interleaved")


class DocumentError(ValueError):
    """What is wrong with a document and at which part.

    Attributes:
        kind: one word for counting: "empty_text", "bad_text", "image_shape", "image_codes", "adjacent_text",
            "bad_prompt" or "bad_row".
        part: index of the part, where there is one.
    """

    def __init__(self, kind: str, reason: str, part: int = 0):
        super().__init__(reason)
        self.kind, self.part = kind, part


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A picture: `pixels` uint8 [H, W, 3], RGB. Equal when the pixels are."""

    pixels: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImagePart) and np.array_equal(self.pixels, other.pixels)

    def __hash__(self) -> int:
        return hash((self.pixels.shape, self.pixels.tobytes()))


@dataclass(frozen=True, eq=False)
class CodesPart:
    """What an image tokenizer made of a picture: `codes` int32 [h, w]. Equal when the codes are."""

    codes: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodesPart) and np.array_equal(self.codes, other.codes)

    def __hash__(self) -> int:
        return hash((self.codes.shape, self.codes.tobytes()))


Part = TextPart | ImagePart | CodesPart


@dataclass(frozen=True)
class Document:
    """Ordered parts, and where the prompt ends.

    Attributes:
        parts: text and pictures.
        prompt: how many leading parts are the prompt. None: no turn at all (plain or interleaved text). 0: an
            empty prompt, which is what classifier-free guidance compares with. len(parts): an empty answer.
        id: the name a source gave it.
        origin: "file:line", for messages.
        meta: facts that travel along, such as the scene a picture shows. Like id and origin, not compared.
    """

    parts: tuple[Part, ...]
    prompt: int | None = None
    id: str = field(default="", compare=False)
    origin: str = field(default="", compare=False)
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def check(self) -> None:
        """Raises DocumentError naming the first part that no grammar could carry there and back."""
        if self.prompt is not None and not 0 <= self.prompt <= len(self.parts):
            raise DocumentError(
                "bad_prompt", f"prompt={self.prompt}: expected None or 0..{len(self.parts)} leading parts"
            )
        for i, part in enumerate(self.parts):
            if isinstance(part, TextPart):
                _check_text(part.text, f"part {i}", i)
                if i and i != self.prompt and isinstance(self.parts[i - 1], TextPart):
                    reason = f"part {i}: text right after text: join them, a model sees no border"
                    raise DocumentError("adjacent_text", reason, i)
            elif isinstance(part, ImagePart):
                _check_array(part.pixels, np.uint8, "image_shape", f"part {i}: pixels", "[H, W, 3]", i)
            elif isinstance(part, CodesPart):
                _check_array(part.codes, np.int32, "image_codes", f"part {i}: codes", "[h, w]", i)
            else:
                expected = "expected TextPart, ImagePart or CodesPart"
                raise DocumentError("bad_row", f"part {i}: {expected}, found {type(part).__name__}", i)

    @property
    def task(self) -> str:
        """Which of TASKS this document trains: read off the turn and what the answer begins with."""
        pictures = [not isinstance(part, TextPart) for part in self.parts]
        if self.prompt is None:
            return "interleaved" if any(pictures) else "text"
        if any(pictures[self.prompt : self.prompt + 1]):
            return "text_to_image"
        return "image_to_text" if any(pictures[: self.prompt]) else "text"


def _check_text(text: object, where: str, part: int = 0) -> None:
    if not isinstance(text, str):
        raise DocumentError("bad_text", f"{where}: expected a string, found {type(text).__name__}", part)
    if not text:
        raise DocumentError("empty_text", f"{where}: the text is empty", part)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError("bad_text", f"{where}: lone surrogate at character {error.start}", part) from None


def _check_array(array: object, dtype: type, kind: str, where: str, shape: str, part: int) -> None:
    expected = f"{where}: expected {np.dtype(dtype)} {shape}"
    if not isinstance(array, np.ndarray):
        raise DocumentError(kind, f"{expected}, found {type(array).__name__}", part)
    right = array.ndim == 3 and array.shape[2] == 3 if shape == "[H, W, 3]" else array.ndim == 2
    if array.dtype != dtype or not right or array.size == 0:
        raise DocumentError(kind, f"{expected}, found {array.dtype} {list(array.shape)}", part)


# ---- JSON rows -----------------------------------------------------------------------------------


def document_to_json(document: Document, save_image: Callable[[np.ndarray], str]) -> dict[str, Any]:
    """A row for a JSONL file; the inverse of `document_from_json`.

    Args:
        document: text and pictures (ImagePart; codes have to be decoded first).
        save_image: stores pixels uint8 [H, W, 3] and returns the reference that goes into the row.

    Returns:
        {"image", "text"} for a captioned picture, {"image", "question", "answer"} for a question,
        {"segments": [...], "prompt"?: n} for everything else; "id" if there is one, and `meta` beside them.

    Raises:
        DocumentError: the document is invalid, has codes in it, or a key of `meta` is one the row needs.
    """
    document.check()
    shape = "".join("t" if isinstance(part, TextPart) else "i" for part in document.parts)
    segments: list[dict[str, str]] = []
    for i, part in enumerate(document.parts):
        if isinstance(part, TextPart):
            segments.append({"type": "text", "text": part.text})
        elif isinstance(part, ImagePart):
            segments.append({"type": "image", "image": save_image(part.pixels)})
        else:
            raise DocumentError("bad_row", f"part {i}: codes cannot be written: decode them first", i)
    row: dict[str, Any]
    if (shape, document.prompt) == ("ti", 1):
        row = {"image": segments[1]["image"], "text": segments[0]["text"]}
    elif (shape, document.prompt) == ("itt", 2):
        row = {"image": segments[0]["image"], "question": segments[1]["text"], "answer": segments[2]["text"]}
    else:
        row = {"segments": segments} | ({} if document.prompt is None else {"prompt": document.prompt})
    if document.id:
        row["id"] = document.id
    taken = sorted(_KEYS & document.meta.keys())
    if taken:
        raise DocumentError("bad_row", f"meta key {taken[0]!r} is a field of the row itself: rename it")
    return row | dict(document.meta)


_KEYS = {"id", "image", "text", "question", "answer", "segments", "prompt"}
_KINDS = ({"segments"}, {"image", "question", "answer"}, {"image", "text"})


def document_from_json(row: Mapping[str, Any], load_image: Callable[[str], np.ndarray]) -> Document:
    """The document of one JSONL row, checked. See `document_to_json` for the three kinds of rows.

    Text segments side by side are blocks of one text and are joined by a blank line, but never across the
    prompt's border; "prompt" counts segments. Other keys of a segment ("alt") are not read.

    Args:
        row: one parsed line; keys that belong to no kind end up in `meta`.
        load_image: reads a picture by its reference to uint8 [H, W, 3]; what it raises passes through.

    Raises:
        DocumentError: the row is of no kind or of two, a field has a wrong type, or the document is invalid.
    """
    if not isinstance(row, Mapping):
        raise DocumentError("bad_row", f"expected an object, found {type(row).__name__}")
    used = _KEYS & row.keys() - {"id", "prompt"}
    if used not in _KINDS:
        raise DocumentError(
            "bad_row",
            "expected the keys {image, text}, {image, question, answer} or {segments}, "
            f"found {{{', '.join(sorted(map(str, row)))}}}",
        )
    prompt = row.get("prompt")
    if "prompt" in row and ("segments" not in row or type(prompt) is not int):
        raise DocumentError("bad_prompt", f"prompt={prompt!r}: expected a whole number, beside segments")

    parts: tuple[Part, ...]
    if "segments" in row:
        if not isinstance(row["segments"], list) or not row["segments"]:
            raise DocumentError("bad_row", "segments: expected a list with at least one segment")
        segments = [_segment(i, segment, load_image) for i, segment in enumerate(row["segments"])]
        if prompt is not None and not 0 <= prompt <= len(segments):
            raise DocumentError("bad_prompt", f"prompt={prompt}: expected 0..{len(segments)}, in segments")
        parts = _joined(segments[:prompt])
        if prompt is not None:
            parts, prompt = parts + _joined(segments[prompt:]), len(parts)
    elif "question" in row:
        image = _image(row["image"], "image", load_image)
        parts, prompt = (image, _text(row["question"], "question"), _text(row["answer"], "answer")), 2
    else:
        text = _text(row["text"], "text")
        parts, prompt = (text, _image(row["image"], "image", load_image)), 1

    meta = {key: value for key, value in row.items() if key not in _KEYS}
    document = Document(parts, prompt, id=str(row.get("id", "")), meta=meta)
    document.check()
    return document


def _segment(i: int, segment: Any, load_image: Callable[[str], np.ndarray]) -> Part:
    kind = segment.get("type") if isinstance(segment, Mapping) else None
    if kind == "text":
        return _text(segment.get("text"), f"segment {i}")
    if kind == "image":
        return _image(segment.get("image"), f"segment {i}", load_image)
    raise DocumentError("bad_row", f'segment {i}: expected type "text" or "image", found {segment!r:.80}')


def _joined(segments: list[Part]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for part in segments:
        before = parts[-1] if parts else None
        if isinstance(part, TextPart) and isinstance(before, TextPart):
            parts[-1] = TextPart(f"{before.text}\n\n{part.text}")
        else:
            parts.append(part)
    return tuple(parts)


def _text(value: object, where: str) -> TextPart:
    _check_text(value, where)
    return TextPart(str(value))


def _image(reference: object, where: str, load_image: Callable[[str], np.ndarray]) -> ImagePart:
    if not isinstance(reference, str) or not reference:
        raise DocumentError("bad_row", f"{where}: expected a reference to a picture, found {reference!r:.80}")
    return ImagePart(load_image(reference))
