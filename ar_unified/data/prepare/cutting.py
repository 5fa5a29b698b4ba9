"""Cuts a document that is too long for a row into several documents that fit."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from ar_unified.language.document import Document, Part, TextPart, Turn
from ar_unified.language.encoded import Encoded
from ar_unified.language.grammar import Grammar

_WORD = re.compile(r"\s*\S+(?:\s+\Z)?|\s+")  # a word with the spaces before it, because most tokenizers join them
Unit = TypeVar("Unit")
_SPARE = 8  # room for the tokens of a document that are not text
_JOINER = "\u200d"
_SKIN = range(0x1F3FB, 0x1F400)  # skin tones, which change the emoji before them


def can_be_split(document: Document) -> bool:
    """Whether a document may be cut. A single question and answer may not, because half an answer is useless. A longer
    conversation may, because it can go on in another document.
    """
    return not document.asks or sum(turn.speaker == "user" for turn in document.turns) > 1


def split(document: Document, grammar: Grammar, max_tokens: int) -> list[tuple[Document, Encoded]]:
    """Cuts a document into pieces, each as long as possible, and returns each piece with its ids.

    A document is cut between its parts (texts and images) if possible. A text that is too long is cut between
    paragraphs, and a paragraph that is too long between lines. A line that is too long is cut before a word, and a word
    that is too long between characters, as in languages without spaces. Only line ends at a cut are lost. A
    conversation is cut between an answer and the next question; each piece begins with the system's turn. If an image,
    a character or a question is too long by itself, its piece is too long, too. The parts of the document are TextParts
    and CodesParts.
    """
    known: dict[Document, Encoded] = {}  # pieces that were tried and fitted; most of the final pieces are among them

    def encoded(piece: Document) -> Encoded:
        if piece not in known:
            found = grammar.encode(piece)
            if len(found) > max_tokens:
                return found
            known.clear()
            known[piece] = found
        return known[piece]

    if document.asks:
        pieces = _conversations(document, lambda piece: len(encoded(piece)) <= max_tokens)
    else:
        pieces = _texts(document, lambda piece: len(encoded(piece)) <= max_tokens, max_tokens)
    return [(piece, encoded(piece)) for piece in pieces]


def _conversations(document: Document, fits: Callable[[Document], bool]) -> Iterator[Document]:
    system = document.turns[:1] if document.turns[0].speaker == "system" else ()
    rest = document.turns[len(system) :]
    exchanges = [rest[i : i + 2] for i in range(0, len(rest), 2)]

    def piece(exchanges: Sequence[tuple[Turn, ...]]) -> Document:
        return replace(document, turns=(*system, *(turn for exchange in exchanges for turn in exchange)))

    for run in _runs(exchanges, lambda run: fits(piece(run))):
        yield piece(run)


def _texts(document: Document, fitting: Callable[[Document], bool], max_tokens: int) -> Iterator[Document]:
    def fits(units: Sequence[Part]) -> bool:
        return fitting(Document.of(_joined(units), origin=document.origin))

    def short(text: str) -> bool:  # no tokenizer makes many more tokens than there are bytes
        return len(text.encode()) <= max_tokens - _SPARE or fits([TextPart(text)])

    units: list[Part] = []
    for part in document.parts:
        if isinstance(part, TextPart):
            units += [TextPart(text) for text in _units(part.text, short)]
        else:
            units.append(part)
    pieces = (_stripped(_joined(units), document.origin) for units in _runs(units, fits))
    yield from (piece for piece in pieces if piece.parts)


def _units(text: str, short: Callable[[str], bool]) -> Iterator[str]:
    """Splits a text into units that are never cut. The units in order, joined, give the text again."""
    for paragraph in filter(None, re.split(r"(?<=\n\n)", text)):
        for line in [paragraph] if short(paragraph) else paragraph.splitlines(keepends=True):
            for word in [line] if short(line) else _WORD.findall(line):
                yield from [word] if short(word) else characters(word)


def characters(text: str) -> list[str]:
    """Splits a text into what a reader sees as single characters: accents, joiners and skin tones stay with the
    character before them.

    It follows the common rules of Unicode's grapheme clusters (UAX #29). But it may cut inside a flag, or inside a
    Korean syllable that is written as single letters.
    """
    found: list[str] = []
    for character in text:
        after = unicodedata.category(character).startswith("M") or character == _JOINER or ord(character) in _SKIN
        if found and (after or found[-1].endswith(_JOINER)):
            found[-1] += character
        else:
            found.append(character)
    return found


def _runs(units: Sequence[Unit], fits: Callable[[Sequence[Unit]], bool]) -> Iterator[Sequence[Unit]]:
    """Yields groups of successive units. Each group has at least one unit, and is as large as possible. Sizes are found
    by doubling and halving, because there may be millions of units.

    The search assumes that if a group fits, every part of it fits, too. This may be wrong by a token or two, so a group
    may be a little shorter than possible, but never too long.
    """
    at = 0
    while at < len(units):
        rest = len(units) - at
        count, most = 1, 2
        while most <= rest and fits(units[at : at + most]):
            count, most = most, 2 * most
        most = min(most, rest + 1)
        while most - count > 1:
            middle = (count + most) // 2
            count, most = (middle, most) if fits(units[at : at + middle]) else (count, middle)
        yield units[at : at + count]
        at += count


def _joined(units: Sequence[Part]) -> list[Part]:
    parts: list[Part] = []
    texts: list[str] = []
    for unit in [*units, None]:
        if isinstance(unit, TextPart):
            texts.append(unit.text)
            continue
        if texts:
            parts.append(TextPart("".join(texts)))
            texts = []
        parts += [unit] if unit else []
    return parts


def _stripped(parts: list[Part], origin: str) -> Document:
    """A piece without the line ends at its start and end, because the cut replaces them."""
    parts = list(parts)
    for edge, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if parts and isinstance(part := parts[edge], TextPart):
            text = strip(part.text, "\n")
            parts[edge : edge + 1 or None] = [TextPart(text)] if text else []
    return Document.of(tuple(parts), origin=origin)
