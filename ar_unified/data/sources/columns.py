"""Turns records of any format into rows of `language.rows`. It finds which column is which part of a document.

A record is a mapping from names to values: a row of a table, an example of TFDS, a sample of a WebDataset. The argument
`columns` says which value is which part. Without it, these names are known, in upper or lower case:

    image, images, jpg, png, ...          an image, or a list of images
    text, caption, txt                    what an image shows, or text alone
    texts and images                      two lists, read in turn: text, image, text, ...; null skips a turn
    question and answer                   with or without images; answer may be the number of one of the options
    image, instruction and edited_image   a picture, what to do to it, and the result
    messages, conversations               turns; <image> in a turn, or a part of type "image", means the next image
    segments                              parts in reading order
    prompt, chosen and rejected           a preference pair; each is a text, an image, a list of these or of parts, or
                                          messages. Other images of the record belong to the prompt. question,
                                          instruction, caption or txt may take the place of prompt
    id, language                          the document's name and its language

If a record has several of these, the first in this order decides: chosen, messages, segments, instruction, question,
texts, text, image. All other values that are short (texts, numbers, lists of them) become `meta`.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ar_unified.data.sources.places import chosen, look_up, ways
from ar_unified.errors import UserError, nearest
from ar_unified.language.document import DocumentError
from ar_unified.language.rows import ANSWERS, KEYS, is_conversation, parted

_IMAGE_FILES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
COMMON = {
    "prompt": ("prompt", "question", "instruction", "caption", "txt"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "messages": ("messages", "conversations"),
    "segments": ("segments",),
    "instruction": ("instruction", "edit_instruction", "edit_prompt"),
    "edited": ("edited_image", "target_image", "output_image"),
    "question": ("question",),
    "answer": ("answer",),
    "options": ("options", "choices"),
    "texts": ("texts",),
    "text": ("txt", "text", "caption"),
    "images": ("images",),
    "image": ("image", *_IMAGE_FILES),
    "id": ("id", "__key__"),
    "language": ("language",),
}
PARTS = tuple(COMMON)
PICTURES = ("image", "images", "edited")  # parts that are images
_OF_PAIRS = ("prompt", *ANSWERS, "messages", "images", "image", "id", "language")
_WHOLES = (
    ANSWERS,
    ("messages",),
    ("segments",),
    ("instruction", "image", "edited"),
    ("question", "answer"),
    ("texts",),
    ("text",),
    ("images",),
    ("image",),
)
_SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # in ShareGPT, LLaVA
_PLACE = re.compile(r"\s*<image>\s*")
_EXPECTED = (
    "image, text, caption, question and answer, instruction and edited_image, texts and images, messages, or prompt, "
    "chosen and rejected"
)
_LONGEST = 1 << 16  # the most characters of a text that is kept as meta
_DEEPEST = 8  # levels of a value that are searched for a known name
HINT = 'Say which column is what: columns={"image": "NAME", "text": "NAME"}'


class Columns:
    """Says which value of a record is which part of a document.

    Args:
        columns: maps a document part to its place in a record. A place is the name of a column; a path into it
            ("captions/0/text", "json/caption"); the element of a list, where another column has the number of the
            element ("options[answer]"); or a text with places in braces ("{title}\\n\\n{text}"). None means the names
            above.
        argument: the name that the source gives to this argument, for messages.

    Raises:
        UserError: if a part is unknown, or if a place is not a text.
    """

    def __init__(self, columns: Mapping[str, str] | None = None, argument: str = "columns"):
        for part, place in dict(columns or {}).items():
            if part not in PARTS:
                raise UserError(
                    f"{argument}: expected one of the parts {', '.join(PARTS)}; found {part!r}{nearest(part, PARTS)}"
                )
            if not isinstance(place, str) or not place:
                raise UserError(f"{argument}: expected the name of a column for {part!r}, found {place!r}")
        self._columns, self._argument = dict(columns) if columns else None, argument
        self._plan = functools.lru_cache(maxsize=64)(self._planned)

    @property
    def given(self) -> Mapping[str, str] | None:
        """The argument `columns`."""
        return self._columns

    def places(self, names: Iterable[str]) -> Mapping[str, str]:
        """Maps each part to its place in records with these column names."""
        if self._columns is not None:
            return self._columns
        lower = {name.lower(): name for name in reversed(list(names))}
        known = {part: [lower[name] for name in common if name in lower] for part, common in COMMON.items()}
        found = {part: found[0] for part, found in known.items() if found}
        if not found.keys() >= {*ANSWERS}:
            return {part: name for part, name in found.items() if part not in ("prompt", *ANSWERS)}
        if "messages" in found and found.get("prompt", "").lower() != "prompt":
            found.pop("prompt", None)
        return {part: name for part, name in found.items() if part in _OF_PAIRS}

    def names(self, names: Sequence[str], where: str) -> dict[str, list[str]]:
        """Maps each part to the columns that it uses. Raises UserError if these columns cannot make a document."""
        places, whole, _ = self._plan(tuple(names))
        if not whole:
            found = f"columns={dict(self._columns)}" if self._columns else ", ".join(names)
            raise UserError(f"{where}: expected {_EXPECTED}; found {found}. {HINT}")
        used: dict[str, list[str]] = {}
        for part, place in places.items():
            used[part] = []
            for way in ways(place, names):
                name = way if way in names else way.split("/")[0]
                if name not in names:
                    raise UserError(
                        f"{where}: {part}: expected a column {name!r}, found the columns {', '.join(names)}"
                        + nearest(name, names)
                    )
                used[part].append(name)
        return used

    def row(self, record: Mapping[str, object], pictures: bool = True) -> tuple[dict[str, Any], list[Any]]:
        """Turns a record into a row for `document_from_json`, and returns the row and its images. In the row, the
        reference "0" means the first image.

        pictures: False if only texts are wanted and images were not read. Each returned image is then None.

        Raises:
            DocumentError: "bad_row" if a value is not what its part needs, or if an image's text is inside an object
                with an unknown name, where it would be lost silently. "missing_image" if an image is null.
        """
        places, whole, used = self._plan(tuple(record), pictures)
        if not whole:
            raise DocumentError("bad_row", f"expected {_EXPECTED}; found {', '.join(map(str, record)) or 'nothing'}")
        if whole in ("image", "images") and self._columns is None:
            unused = {name: value for name, value in record.items() if name not in used}
            _refuse_below(unused, self._argument)
        read = {part: place for part, place in places.items() if pictures or part not in PICTURES}
        found = {part: look_up(record, place, part) for part, place in read.items()}
        images = _Images(found, pictures, required=whole in ("instruction", "question", "text", "images", "image"))
        row = _WRITERS[whole](found, images)
        images.done()
        row |= _meta({name: value for name, value in record.items() if name not in used and name not in KEYS})
        if found.get("id") not in (None, ""):
            row["id"] = str(found["id"])
        return row, images.values

    def texts(self, record: Mapping[str, object]) -> list[tuple[str, Any]]:
        """The texts of a record, as (part, text), if they can be read without making its row; else []."""
        places, whole, _ = self._plan(tuple(record), False)
        if whole == "texts":
            found = look_up(record, places["texts"], "texts")
            return [("texts", text) for text in found if text is not None] if isinstance(found, list) else []
        parts = {
            "text": ["text"],
            "instruction": ["instruction"],
            "question": [] if "options" in places else ["question", "answer"],
        }.get(whole, [])
        return [(part, look_up(record, places[part], part)) for part in parts]

    def language(self, record: Mapping[str, object]) -> str:
        """The language that a record states; "" if it states none."""
        place = self.places(record).get("language")
        try:
            known = look_up(record, place, "language") if place else None
        except DocumentError:
            return ""
        return known if isinstance(known, str) else ""

    def _planned(self, names: tuple[str, ...], pictures: bool = True) -> tuple[Mapping[str, str], str, set[str]]:
        """Returns the place of each part, the part that makes the record a document ("" if none does), and the names
        of the record that are used.

        pictures: False if images were not read. Their names may then be missing.
        """
        places = self.places(names)
        there = {*places, *(() if pictures else PICTURES)}
        alone = "" if pictures else "image"  # the record may have only an image, which was not read
        whole = next((whole[0] for whole in _WHOLES if whole[0] in places and there.issuperset(whole)), alone)
        return places, whole, {way.split("/")[0] for place in places.values() for way in (place, *ways(place, names))}


_WORDS = {
    name for part in ("prompt", "messages", "segments", "question", "answer", "texts", "text") for name in COMMON[part]
}


def _refuse_below(unused: Mapping[str, object], argument: str) -> None:
    """Raises DocumentError if an unused value of a record with an image contains a text under a known name. Such a
    value is an object, or a list of objects."""
    left = [*unused.items()]
    for _ in range(_DEEPEST):
        left = [(f"{at}/0", value[0]) if isinstance(value, list) and value else (at, value) for at, value in left]
        inner = [
            (f"{at}/{key}", each) for at, value in left if isinstance(value, Mapping) for key, each in value.items()
        ]
        for at, value in inner:
            if at.rpartition("/")[2].lower() in _WORDS and value and isinstance(value, str | list):
                raise DocumentError(
                    "bad_row",
                    f"expected the image's text under a known name, found a text at {at!r}. Give "
                    f'{argument}={{"image": "NAME", "text": "{at}"}} or, without text, {argument}={{"image": "NAME"}}',
                )
        left = inner


class _Images:
    """The images of one record. `next` returns a reference to the next image."""

    def __init__(self, found: Mapping[str, object], pictures: bool, required: bool):
        self.values: list[Any] = []
        self.endless = not pictures
        for part in ("image", "images") if pictures else ():
            value = found.get(part)
            if part in found and value is None and required:
                raise DocumentError("missing_image", f"{part}: expected an image, found null")
            self.values += value if isinstance(value, list) else [] if value is None else [value]
        self.left = len(self.values)

    def next(self, where: str) -> str:
        if self.endless:
            return self.add(None)
        if not self.left:
            raise DocumentError("bad_row", f"{where}: expected one more image, found only {len(self.values)} in all")
        self.left -= 1
        return str(len(self.values) - self.left - 1)

    def rest(self) -> list[str]:
        return [self.next("images") for _ in range(self.left)]

    def add(self, value: object) -> str:
        self.values.append(value)
        return str(len(self.values) - 1)

    def done(self) -> None:
        if self.left:
            used = len(self.values) - self.left
            every = len(self.values)
            raise DocumentError(
                "bad_row", f"expected parts that use all {every} images of the record, found {used} used"
            )


# ---- rows of each kind -------------------------------------------------------------------------------------------


def _pair(found: Mapping[str, Any], images: _Images) -> dict[str, object]:
    asked = {key: found[key] for key in ("prompt", "messages") if found.get(key) not in (None, "", [])}
    said = {key: found[key] for key in ANSWERS}
    if all(map(is_conversation, said.values())):
        asked, said = parted(asked, said)
    row: dict[str, object] = {}
    for key, value in asked.items():
        if is_conversation(value):
            row[key] = _messages({"messages": value}, images, whole=False)["messages"]
        else:
            row[key] = _content(value, images, key)
    row |= {key: _answer(value, images, key) for key, value in said.items()}
    if images.left and row.keys() & asked.keys():
        _show(row, next(iter(asked)), images.rest())
    return row


def _show(row: dict[str, Any], key: str, references: Sequence[str]) -> None:
    """Puts images before the question. references: refer to these images, which no part of the row uses yet."""
    shown = [{"type": "image", "image": reference} for reference in references]
    holder: dict[str, Any] = row
    if is_conversation(row[key]):
        holder, key = next((each for each in row[key] if each["role"] == "user"), row[key][0]), "content"
    content = holder[key]
    holder[key] = shown + ([{"type": "text", "text": content}] if isinstance(content, str) else content or [])


def _answer(value: object, images: _Images, where: str) -> Any:
    if is_conversation(value) or is_conversation([value]):
        messages = value if isinstance(value, list) else [value]
        return _messages({"messages": messages}, images, whole=False)["messages"]
    return _content(value, images, where)


def _content(value: object, images: _Images, where: str) -> Any:
    """Turns a text, an image, or a list of texts, images and parts into what `read_parts` reads."""
    if isinstance(value, str):
        return _places(value, images, where)
    if isinstance(value, bytes | Mapping):
        value = [value]
    return _parts([_piece(each) for each in value], images, where) if isinstance(value, list) else value


def _piece(value: object) -> Any:
    """Turns an element of a list into a part. It may be a part already, a plain text or a plain image."""
    if isinstance(value, str):
        return {"type": "text", "text": value}
    if isinstance(value, bytes) or (isinstance(value, Mapping) and "type" not in value):
        return {"type": "image", "image": value}
    return value


def _messages(found: Mapping[str, object], images: _Images, whole: bool = True) -> dict[str, object]:
    """Turns a conversation into messages. whole: whether images that no turn names go into the user's first turn."""
    turns = found["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DocumentError("bad_row", f"messages: expected a list of objects, found {turns!r:.80}")
    messages = []
    for i, turn in enumerate(turns):
        role = turn.get("role") or turn.get("from")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if isinstance(content, str):
            content = _places(content, images, f"messages {i}")
        elif isinstance(content, list):
            content = _parts(content, images, f"messages {i}")
        rest = {key: turn[key] for key in ("weight", "tool_calls", "audio", "refusal") if turn.get(key) is not None}
        messages.append({"role": _SPEAKERS.get(role, role), "content": content} | rest)
    first = next((message for message in messages if message["role"] == "user"), None)
    if whole and images.left and first is not None:  # no turn says where the images belong
        shown = [{"type": "image", "image": reference} for reference in images.rest()]
        content = first["content"]
        first["content"] = shown + ([{"type": "text", "text": content}] if isinstance(content, str) else content or [])
    return {"messages": messages}


def _places(text: str, images: _Images, where: str) -> Any:
    """Splits a text into parts: each <image> in it becomes the next image. The text stays as it is if it contains no
    <image>, or if the record has no images."""
    if "<image>" not in text or not (images.left or images.values or images.endless):
        return text
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(_PLACE.split(text)):
        parts += [{"type": "image", "image": images.next(where)}] if i else []
        parts += [{"type": "text", "text": piece}] if piece.strip() else []
    return parts


def _parts(parts: Any, images: _Images, where: str) -> Any:
    """Replaces images in parts by references. An image inside a part is stored under its reference. An image part
    without an image takes the record's next image."""
    if not isinstance(parts, list):
        raise DocumentError("bad_row", f"{where}: expected a list of parts, found {parts!r:.80}")
    out: list[Any] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("image", "image_url"):
            value = part.get(kind)
            value = value.get("url") if kind == "image_url" and isinstance(value, Mapping) else value
            empty = value is None or isinstance(value, int) or value == {}
            out.append({"type": "image", "image": images.next(where) if empty else images.add(value)})
        else:
            out.append(part)
    return out


def _segments(found: Mapping[str, object], images: _Images) -> dict[str, object]:
    return {"segments": _parts(found["segments"], images, "segments")}


def _question(found: Mapping[str, object], images: _Images) -> dict[str, object]:
    question, answer = found["question"], found["answer"]
    if found.get("options") is not None and not (isinstance(answer, str) and not answer.isdigit()):
        answer = chosen(found["options"], answer, "answer")
    shown = images.rest() if not images.endless else ["0"]
    if len(shown) == 1:
        return {"image": shown[0], "question": question, "answer": answer}
    parts = [{"type": "image", "image": reference} for reference in shown]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return {"messages": [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}


def _instruction(found: Mapping[str, object], images: _Images) -> dict[str, object]:
    if (edited := found.get("edited")) is None and not images.endless:
        raise DocumentError("missing_image", "edited: expected an image, found null")
    shown = images.rest() if not images.endless else ["0"]
    # The picture comes last, so that the distance from its codes to the codes of the answer does not depend on the
    # text's length.
    asked = [{"type": "text", "text": found["instruction"]}]
    asked += [{"type": "image", "image": reference} for reference in shown]
    return {"segments": [*asked, {"type": "image", "image": images.add(edited)}], "prompt": len(asked)}


def _texts(found: Mapping[str, object], images: _Images) -> dict[str, object]:
    texts = found["texts"]
    if not isinstance(texts, list):
        raise DocumentError("bad_row", f"texts: expected a list, found {texts!r:.80}")
    shown, images.left = images.values, 0
    pictures = range(len(texts) if images.endless else len(shown))
    segments = []
    for text, number in itertools.zip_longest(texts, pictures):
        if text is not None:
            segments.append({"type": "text", "text": text})
        if number is not None and (images.endless or shown[number] is not None):
            segments.append({"type": "image", "image": str(number)})
    return {"segments": segments}


def _text(found: Mapping[str, object], images: _Images) -> dict[str, object]:
    text = found["text"]
    text = text[0] if isinstance(text, list) and len(text) == 1 else text
    shown = images.rest()
    if len(shown) == 1:
        return {"image": shown[0], "text": text}
    parts = [{"type": "text", "text": text}, *({"type": "image", "image": reference} for reference in shown)]
    return {"segments": parts} | ({"prompt": 1} if shown else {})


def _alone(found: Mapping[str, object], images: _Images) -> dict[str, object]:
    shown = [images.next("image")] if images.endless else images.rest()
    return {"segments": [{"type": "image", "image": reference} for reference in shown]}


_WRITERS = {
    "chosen": _pair,
    "messages": _messages,
    "segments": _segments,
    "instruction": _instruction,
    "question": _question,
    "texts": _texts,
    "text": _text,
    "images": _alone,
    "image": _alone,
}


def _meta(values: Mapping[str, object]) -> dict[str, object]:
    """The short values whose names have no meaning of their own in a row."""
    taken = {"image", "text", "question", "answer", "segments", "prompt", "messages", "id"}
    return {name: value for name, value in values.items() if name not in taken and _short(value)}


def _short(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= 256 and all(map(_short, value))
    return isinstance(value, str | int | float | bool) and not (isinstance(value, str) and len(value) > _LONGEST)
