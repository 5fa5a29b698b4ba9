"""Every layout with a small text tokenizer and a small codebook, and documents for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from ar_unified.language.document import CodesPart, Document, TextPart, Turn
from ar_unified.language.grammar import Grammar
from ar_unified.language.layouts import LAYOUTS, WITH_IMAGES, TurnMarks
from ar_unified.language.syntax import ImageLayout, vocabulary_for

CODEBOOK = 6
TEXTS = "0123456789*", "abc<vision>/", " .:YUSERIANTGouarehlpfstkbcdgimn", "y\n"


class Pieces:
    """One id for each of these pieces of text; the longest piece that fits is taken."""

    def __init__(self, *pieces):
        self.pieces = list(dict.fromkeys(pieces))

    def encode(self, text):
        ids, at = [], 0
        while at < len(text):
            piece = max((p for p in self.pieces if text.startswith(p, at)), key=len, default=None)
            if piece is None:
                raise ValueError(f"no piece for {text[at]!r}")
            ids.append(self.pieces.index(piece))
            at += len(piece)
        return ids

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


class Utf8:
    """One id for each byte of the text."""

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


class Latin:
    """One id for each character, so that different ids are different texts."""

    def encode(self, text):
        return list(text.encode("latin-1"))

    def decode(self, ids):
        return bytes(ids).decode("latin-1")


LETTERS = Pieces(*"".join(TEXTS))


def grammar_of(kind, height=None, width=None, depth=1, codec=LETTERS, text_size=None, codebook=CODEBOOK):
    """A grammar for images of 2 x 3 codes, or of up to 4 x 12. `width` counts positions with `depth` codes."""
    sized = LAYOUTS[kind].size is not None
    layout = ImageLayout(kind, height or (4 if sized else 2), (width or (12 if sized else 3)) * depth, depth)
    return Grammar(vocabulary_for(layout, text_size or len(codec.pieces), codebook), layout, codec)


def marked(kind):
    """Whether the ids of a layout tell its turns apart."""
    return isinstance(LAYOUTS[kind].turns, TurnMarks)


def counted(kind):
    """Whether a layout ends all turns with the same id, so that the id does not say whether a question or an answer
    ended."""
    return marked(kind) and LAYOUTS[kind].turns.ask == LAYOUTS[kind].end


every = pytest.mark.parametrize("kind", WITH_IMAGES)


def image(h, w, first=0):
    return CodesPart(((np.arange(h * w) + first) % CODEBOOK).astype(np.int32).reshape(h, w))


def sides(layout):
    """(smallest, largest, step) of the height and of the width that a layout can write, in codes."""
    least = layout.units if layout.sized else (layout.height, layout.width)
    return [(a, b, unit) for a, b, unit in zip(least, (layout.height, layout.width), layout.units, strict=True)]


UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=12)
LATIN = st.text(st.characters(max_codepoint=255), min_size=1, max_size=4)
LETTER = st.text(st.sampled_from(LETTERS.pieces), min_size=1, max_size=5)


@st.composite
def documents(draw, grammar, text=UNICODE, exchanges=3):
    """A random document without turns, or a conversation of up to `exchanges` exchanges, with or without a system turn.
    All sides have texts and images of all sizes, some turns are empty, and some are not learned."""

    def parts():
        out = []
        for kind in draw(st.lists(st.sampled_from("ti"), max_size=3)):
            if kind == "i":
                h, w = (unit * draw(st.integers(-(-a // unit), b // unit)) for a, b, unit in sides(grammar.layout))
                out.append(image(h, w, draw(st.integers(0, CODEBOOK - 1))))
            elif not out or not isinstance(out[-1], TextPart):
                out.append(TextPart(draw(text)))
        return tuple(out)

    count = draw(st.integers(0, exchanges))
    speakers = ["system"] * draw(st.booleans()) + ["user", "assistant"] * count if count else ["document"]
    trained = st.sampled_from([None, None, True, False])
    return Document(tuple(Turn(who, parts(), draw(trained)) for who in speakers))
