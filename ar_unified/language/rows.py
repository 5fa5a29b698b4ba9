"""Converts documents to JSON rows and back. All JSON parts, in data and in requests, are read here.

    {"image": "a.png", "text": "a cat"}                                          a captioned image
    {"image": "a.png", "question": "What is it?", "answer": "A cat."}            a question
    {"prompt": "What is a cat?", "answer": "An animal."}                         prompt and answer, each of any parts
    {"segments": [{"type": "text", "text": "..."}, {"type": "image", "image": "a.png"}], "prompt": 1}
    {"messages": [{"role": "user", "content": "Draw a cat."}, {"role": "assistant", "content": [...]}]}
    {"prompt": "Draw a cat.", "chosen": [{"type": "image", ...}], "rejected": "..."}   a preference pair

"prompt" is the number of segments that form the question; without it there are no turns. Roles are system (or
developer), user and assistant; content is a text or a list of parts, also in OpenAI's form ({"type": "image_url",
"image_url": {"url"}}).
A message with "weight": 0 is only read, not learned. All other keys become the document's `meta`.

The "prompt" of an answer or of a preference pair is a text, a list of parts or a list of messages (a pair may also have
this list as "messages"). An answer is a text, a list of parts, or the assistant's message. Training on a pair learns
only from its answers. If both answers are whole conversations, the last messages are the answers; the messages before
them must be the same and are the prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ar_unified.language.document import (
    CodesPart,
    Document,
    DocumentError,
    ImagePart,
    Part,
    Speaker,
    TextPart,
    TokensPart,
    Turn,
    check_text,
)
from ar_unified.manifests import Json

Image = TypeVar("Image")
LoadImage = Callable[[str], np.ndarray]
KEYS = {"id", "image", "text", "question", "answer", "segments", "prompt", "messages", "chosen", "rejected"}  # of a row
ANSWERS = ("chosen", "rejected")  # of a preference pair
_KINDS = ({"answer"}, {"segments"}, {"messages"}, {"image", "question", "answer"}, {"image", "text"})
_ROLES: dict[str, Speaker] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NO = ("tool_calls", "function_call", "audio")
BLOCKS = "\n\n"  # between adjacent texts, which are blocks of one text


class UnknownKeys(DocumentError):
    """The keys of a row match no kind of row, or two kinds ("bad_row")."""


def read_parts(content: object, image: Callable[[str, str], Image], where: str, tokens: bool = False) -> list[Any]:
    """Reads a text or a list of parts. Texts become TextPart, ids TokensPart, and images what `image` returns.

    Args:
        content: a text, or a list of {"type": "text" | "image" | "image_url" | "refusal" | "tokens", ...}; other keys
            of a part ("alt") are ignored.
        image: called with the reference to an image and the image's place in the JSON.
        tokens: whether parts may be ids.

    Adjacent texts are joined by a blank line.

    Raises:
        DocumentError: if the content, or a part of it, has no valid form.
    """
    if isinstance(content, str):
        check_text(content, where)
        return [TextPart(content)]
    if not isinstance(content, list):
        raise DocumentError("bad_row", f"{where}: expected a text or a list of parts, found {content!r:.80}")
    parts: list[Any] = []
    for i, part in enumerate(content):
        at = f"{where} {i}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "refusal"):
            check_text(part.get(kind), at)
            _append(parts, TextPart(str(part.get(kind))))
        elif kind in ("image", "image_url"):
            found = part.get(kind)
            reference = found.get("url") if kind == "image_url" and isinstance(found, Mapping) else found
            if not isinstance(reference, str) or not reference:
                raise DocumentError("bad_row", f"{at}: expected a reference to an image, found {reference!r:.80}", i)
            parts.append(image(reference, at))
        elif kind == "tokens" and tokens:
            ids = part.get("ids")
            if not isinstance(ids, list) or not ids or any(type(id) is not int for id in ids):
                raise DocumentError("bad_row", f"{at}: expected ids, a list of whole numbers, found {ids!r:.80}", i)
            parts.append(TokensPart(tuple(ids)))
        else:
            kinds = '"text", "image" or "tokens"' if tokens else '"text" or "image"'
            raise DocumentError("bad_row", f"{at}: expected type {kinds}, found {part!r:.80}", i)
    return parts


def read_messages(
    messages: object, image: Callable[[str, str], Image], where: str = "messages", tokens: bool = False
) -> list[tuple[Speaker, list[Any], bool | None]]:
    """(speaker, parts, trained) for each turn of a conversation. trained: whether the turn is learned; None means that
    its speaker decides.

    Successive messages of one role become one turn. If the assistant speaks first, an empty user turn is put before it.

    Raises:
        DocumentError: if the value is not a list of valid messages.
    """
    if not isinstance(messages, list) or not messages:
        raise DocumentError("bad_row", f"{where}: expected a list of at least one message, found {messages!r:.80}")
    turns: list[tuple[Speaker, list[Any], bool | None]] = []
    for i, message in enumerate(messages):
        at = f"{where} {i}"
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise DocumentError("bad_row", f"{at}: expected one of the roles {', '.join(_ROLES)}, found {role!r:.80}")
        for key in _NO:
            if message.get(key):
                reason = f"{at}: expected text and images, found {key}: tools and sound are not supported"
                raise DocumentError("bad_row", reason)
        content = message.get("content")
        if content is None and role == "assistant":
            content = message.get("refusal") or ""
        parts = [] if content == "" else read_parts(content, image, f"{at}: content", tokens)
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise DocumentError("bad_row", f"{at}: expected weight 0 or 1, found {weight!r:.80}")
        learned = None if weight is None else bool(weight)
        if turns and turns[-1][0] == _ROLES[role] and turns[-1][2] == learned:
            for part in parts:
                _append(turns[-1][1], part)
        else:
            if role == "assistant" and (not turns or turns[-1][0] == "system"):
                turns.append(("user", [], None))
            turns.append((_ROLES[role], parts, learned))
    return turns


def document_from_json(row: object, load_image: LoadImage) -> Document:
    """The document of one row, checked.

    Args:
        row: one parsed line.
        load_image: takes a reference and returns the image, uint8 [H, W, 3]; its exceptions are not caught.

    Raises:
        DocumentError: if the row matches no kind or two kinds (UnknownKeys), a field has a wrong type, or the document
            is invalid.
    """
    if not isinstance(row, Mapping):
        raise DocumentError("bad_row", f"expected an object, found {type(row).__name__}")

    def image(reference: str, where: str) -> ImagePart:
        return ImagePart(load_image(reference))

    rejected = None
    if any(key in row for key in ANSWERS):
        *turns, rejected = _preference(row, image)
    else:
        turns = [*_turns(row, image)]
    meta = {key: value for key, value in row.items() if key not in KEYS}
    document = Document(tuple(turns), id=str(row.get("id", "")), meta=meta, rejected=rejected)
    document.check()
    return document


def _turns(row: Mapping[str, Any], image: Callable[[str, str], ImagePart]) -> Sequence[Turn]:
    """The turns of a row, which must be one of _KINDS."""
    used = KEYS & row.keys() - {"id", "prompt"}
    if used not in _KINDS:
        kinds = ", ".join(f"{{{', '.join(sorted(kind))}}}" for kind in reversed(_KINDS))
        raise UnknownKeys("bad_row", f"expected the keys of one of {kinds}; found {{{', '.join(map(str, row))}}}")
    prompt = row.get("prompt")
    if "answer" in row and "question" not in row:
        if prompt in (None, "", []):
            raise DocumentError("no_prompt", "answer: expected a prompt in the same row, found none")
        return [*_asked(prompt, "prompt", image), _answer(row["answer"], "answer", image)]
    if "prompt" in row and ("segments" not in row or type(prompt) is not int):
        raise DocumentError("bad_prompt", f"prompt={prompt!r}: expected a whole number, together with segments")

    def one(key: str) -> Part:
        if key == "image":
            (part,) = read_parts([{"type": "image", "image": row[key]}], image, key)
            return part
        check_text(row[key], key)
        return TextPart(row[key])

    if "messages" in row:
        return [Turn(who, tuple(parts), learned) for who, parts, learned in read_messages(row["messages"], image)]
    if "segments" in row:
        return _segments(row["segments"], prompt, image)
    if "question" in row:
        return Turn("user", (one("image"), one("question"))), Turn("assistant", (one("answer"),))
    return Turn("user", (one("text"),)), Turn("assistant", (one("image"),))


def _preference(row: Mapping[str, Any], image: Callable[[str, str], ImagePart]) -> list[Turn]:
    """The question, the chosen answer, and the rejected answer."""
    if others := sorted(KEYS & row.keys() - {"id", "prompt", "messages", *ANSWERS}):
        raise DocumentError("bad_row", f"expected prompt or messages, chosen and rejected; found also {others[0]}")
    if missing := [key for key in ANSWERS if key not in row]:
        raise DocumentError("bad_row", f"expected chosen and rejected, found no {missing[0]}")
    if all(is_conversation(row[key]) for key in ANSWERS):
        asked, said = parted({key: row[key] for key in ("prompt", "messages") if key in row}, row)
        row = asked | said
    prompts = [key for key in ("prompt", "messages") if row.get(key) not in (None, "", [])]
    if len(prompts) != 1:
        kind, which = ("two_prompts", "both") if prompts else ("no_prompt", "neither")
        raise DocumentError(kind, f"expected prompt or messages, found {which}")
    if row["chosen"] == row["rejected"]:
        raise DocumentError("same_answers", f"expected two answers, found {row['chosen']!r:.80} twice")
    turns = [Turn(turn.speaker, turn.parts, False) for turn in _asked(row[prompts[0]], prompts[0], image)]
    return [*turns, *(_answer(row[key], key, image) for key in ANSWERS)]


def is_conversation(value: object) -> bool:
    """Whether the value is a list of at least one message."""
    said = isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)
    return said and all("role" in each or "from" in each for each in value)  # type: ignore[attr-defined]


def parted(
    asked: Mapping[str, Any], said: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The question and the two answers of a pair whose row has two conversations. These differ only in the last
    message.

    If the conversations have more than one message, the messages before the last are the question. The row may then
    repeat the question. A prompt may be the text of one of these messages; "messages" may equal the question or one of
    the two conversations.

    Args:
        asked: the row's "prompt" and "messages"; a key that the row lacks is absent.
        said: the row's "chosen" and "rejected".

    Raises DocumentError if messages before the last differ ("bad_row"), or `asked` is another question ("two_prompts").
    """
    chosen, rejected = (list(said[key]) for key in ANSWERS)
    if chosen[:-1] != rejected[:-1]:
        count = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)))
        raise DocumentError(
            "bad_row",
            f"expected chosen and rejected to differ only in the last message; they differ from message {count} on",
        )
    answers = {"chosen": chosen[-1:], "rejected": rejected[-1:]}
    before = chosen[:-1]
    if not before:
        return dict(asked), answers
    said_before = (each.get("content") or each.get("value") for each in before)
    texts = {each.strip() for each in said_before if isinstance(each, str)}
    for key, value in asked.items():
        again = value in (None, "", [], before)
        if key == "messages":
            again |= value in (chosen, rejected)
        elif isinstance(value, str):
            again |= value.strip() in texts
        if not again:
            raise DocumentError(
                "two_prompts",
                f"{key}: expected the same question as in chosen and rejected, or no {key}; found {value!r:.80}",
            )
    return {"messages": before}, answers


def _asked(content: object, where: str, image: Callable[[str, str], ImagePart]) -> list[Turn]:
    """The turns before an answer."""
    if where == "messages" or (isinstance(content, list) and isinstance(content[0], Mapping) and "role" in content[0]):
        return [Turn(who, tuple(parts), learned) for who, parts, learned in read_messages(content, image, where)]
    return [Turn("user", tuple(read_parts(content, image, where)))]


def _answer(content: object, where: str, image: Callable[[str, str], ImagePart]) -> Turn:
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping) and "role" in content[0]:
        content = content[0]
    if isinstance(content, Mapping):
        if content.get("role") != "assistant":
            raise DocumentError("bad_row", f"{where}: expected the assistant's message, found {content!r:.80}")
        content = content.get("content")
    parts = () if content in (None, "", []) else tuple(read_parts(content, image, where))
    if all(isinstance(part, TextPart) and not part.text.strip() for part in parts):
        raise DocumentError("empty_answer", f"{where}: the answer is empty")
    return Turn("assistant", parts)


def _segments(segments: object, prompt: int | None, image: Callable[[str, str], ImagePart]) -> tuple[Turn, ...]:
    if not isinstance(segments, list) or not segments:
        raise DocumentError("bad_row", "segments: expected a list with at least one segment")
    if prompt is None:
        return (Turn("document", tuple(read_parts(segments, image, "segment"))),)
    if not 0 <= prompt <= len(segments):
        raise DocumentError("bad_prompt", f"prompt={prompt}: expected a number of segments, 0..{len(segments)}")
    asked, answer = (tuple(read_parts(part, image, "segment")) for part in (segments[:prompt], segments[prompt:]))
    return Turn("user", asked), Turn("assistant", answer)


def document_to_json(document: Document, save_image: Callable[[np.ndarray], str]) -> dict[str, object]:
    """A document as a row of a JSONL file. The inverse of `document_from_json`.

    Args:
        document: text and images (ImagePart; codes have to be decoded first).
        save_image: stores pixels uint8 [H, W, 3] and returns the reference that goes into the row.

    Raises:
        DocumentError: if the document is invalid or has codes; if a document without turns has no parts, or its
            `trained` is not None; or if a key of `meta` is also a key of rows.
    """
    document.check()
    if document.rejected is not None:
        return _preference_row(document, save_image)
    turns = [write_parts(turn.parts, save_image) for turn in document.turns]
    speakers = [turn.speaker for turn in document.turns]
    shapes = ["".join(part["type"][0] for part in parts) for parts in turns]
    learned = [turn.trained for turn in document.turns]
    row: dict[str, object]
    if speakers == ["document"]:
        if not turns[0] or learned != [None]:
            raise DocumentError("bad_row", "a document without turns needs a part, and its `trained` must be None")
        row = {"segments": turns[0]}
    elif speakers != ["user", "assistant"] or learned != [None, None] or not document.parts:
        row = {"messages": [_message(turn, parts) for turn, parts in zip(document.turns, turns, strict=True)]}
    elif shapes == ["t", "i"]:
        row = {"image": turns[1][0]["image"], "text": turns[0][0]["text"]}
    elif shapes == ["it", "t"]:
        row = {"image": turns[0][0]["image"], "question": turns[0][1]["text"], "answer": turns[1][0]["text"]}
    else:
        row = {"segments": [*turns[0], *turns[1]], "prompt": len(turns[0])}
    return row | _named(document)


def _preference_row(document: Document, save_image: Callable[[np.ndarray], str]) -> dict[str, object]:
    assert document.rejected is not None
    asked = [_message(Turn(turn.speaker), write_parts(turn.parts, save_image)) for turn in document.asked]
    chosen, rejected = (write_parts(turn.parts, save_image) for turn in (document.turns[-1], document.rejected))
    return {"messages": asked, "chosen": chosen, "rejected": rejected} | _named(document)


def _named(document: Document) -> dict[str, Json]:
    """The document's `id` and `meta`, as keys of a row."""
    taken = sorted(KEYS & document.meta.keys())
    if taken:
        raise DocumentError("bad_row", f"meta key {taken[0]!r} is a field of the row itself: rename it")
    return ({"id": document.id} if document.id else {}) | dict(document.meta)


def write_parts(parts: Sequence[Part], save_image: Callable[[np.ndarray], str]) -> list[dict[str, str]]:
    """Parts in the form that `read_parts` reads. Raises DocumentError for codes."""
    out = []
    for i, part in enumerate(parts):
        if isinstance(part, TextPart):
            out.append({"type": "text", "text": part.text})
        elif isinstance(part, CodesPart):
            raise DocumentError("bad_row", f"part {i}: codes cannot be written: decode them first", i)
        else:
            out.append({"type": "image", "image": save_image(part.pixels)})
    return out


def _message(turn: Turn, parts: list[dict[str, str]]) -> dict[str, Json]:
    content: Any = parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
    weight = {} if turn.trained is None else {"weight": int(turn.trained)}
    return {"role": turn.speaker, "content": content} | weight


def _append(parts: list[Any], part: object) -> None:
    if isinstance(part, TextPart) and parts and isinstance(parts[-1], TextPart):
        part = TextPart(f"{parts.pop().text}{BLOCKS}{part.text}")
    parts.append(part)
