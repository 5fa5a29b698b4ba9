"""Shows documents as a model would see them, in words for a terminal and as tokens for a page. Grammar, tokenizer and
size may each be missing.

Axes: `H` `W` height and width in pixels, `h` `w` in codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ar_unified.data.images import ImageCodec, Resize, draws_none, for_single
from ar_unified.data.items import printable
from ar_unified.data.prepare.cutting import can_be_split, split
from ar_unified.data.sizes import default_resize
from ar_unified.language.document import CodesPart, Document, ImagePart, Part, TextPart
from ar_unified.language.encoded import Encoded
from ar_unified.language.grammar import Grammar
from ar_unified.language.vocabulary import Role


@dataclass(frozen=True)
class Token:
    """One id of a document, or all codes of an image. A token has a text, a Role, and a flag that says whether it is
    learned.

    original, image: uint8 [H, W, 3], only for an image token. `original` is the image that was encoded, and `image` is
        what its codes decode to. Each is None for other tokens, or if this image is not known or cannot be made.
    """

    text: str
    role: Role
    learned: bool
    original: np.ndarray | None = None
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Shown:
    """A document for a person to look at.

    Attributes:
        turns: in order, each speaker with the texts and images, uint8 [H, W, 3], of the turn. The speaker may be
            "document" (there is no speaker), or "rejected" (the answer of a preference pair that the assistant should
            not give).
        count: how many tokens the document has; 0 if that is not known. `tokens` may be only the first of them.
    """

    origin: str
    task: str
    turns: list[tuple[str, list[str | np.ndarray]]]
    count: int = 0
    tokens: list[Token] = field(default_factory=list)


MOST = 400  # maximum number of tokens of a document on a page


class View:
    """Shows documents with a grammar, an image tokenizer and a size. Each of the three may be missing."""

    def __init__(
        self, grammar: Grammar | None = None, tokenizer: ImageCodec | None = None, resize: Resize | None = None
    ):
        if resize is None and grammar is not None and tokenizer is not None:
            resize = default_resize(grammar.layout, tokenizer)
        self.grammar, self.resize = grammar, resize
        self.tokenizer = None if tokenizer is None else for_single(tokenizer)
        self._known: tuple[Document, Document] | None = None  # the last document of `_real`, and its result

    def encoded(self, document: Document) -> Encoded | None:
        """The ids and marks of the document; None without a grammar, or if the document has images and there is no
        size. The images are blank, because only their sizes matter.
        """
        blank = self._blank(document)
        return None if blank is None or self.grammar is None else self.grammar.encode(blank)

    def lengths(self, document: Document, found: Encoded, max_tokens: int | None) -> list[int]:
        """The number of tokens in each of the documents that `prepare` would make from `document`. found: the result of
        `encoded` for `document`.
        """
        blank = self._blank(document)
        if not max_tokens or len(found) <= max_tokens or blank is None or not can_be_split(document):
            return [len(found)]
        assert self.grammar is not None
        pieces = (len(piece) for _, piece in split(blank, self.grammar, max_tokens))
        return [length for length in pieces if length <= max_tokens]

    def _blank(self, document: Document) -> Document | None:
        resize, tokenizer = self.resize, self.tokenizer
        if resize is None and any(isinstance(part, ImagePart) for each in document.answered for part in each.parts):
            return None

        def blank(pixels: np.ndarray) -> np.ndarray:
            assert resize is not None
            h, w = resize.target(*pixels.shape[:2])
            factor, depth = (tokenizer.factor, tokenizer.codes_per_position) if tokenizer else (resize.factor, 1)
            return np.zeros((h // factor, w // factor * depth), np.int32)

        return _coded(document, blank)

    def words(self, document: Document) -> str:
        """The document in words, with <image H x W> for images. Then its tokens, if there are a grammar and a
        tokenizer.
        """
        lines = [f"({printable(document.origin)}, {document.task})"]
        for speaker, said in _turns(document):
            if document.asks:
                lines.append(f"<{speaker}>")
            for part in said:
                if isinstance(part, TextPart):
                    rest = f" ... ({len(part.text)} characters)" if len(part.text) > 400 else ""
                    lines.append(part.text[:400] + rest)
                elif isinstance(part, ImagePart):
                    lines.append("<image {} x {}>".format(*part.pixels.shape))
        if (real := self._real(document)) is not None and self.grammar is not None:
            words = [_word(int(token), self.grammar) for token in self.grammar.encode(real).tokens]
            short = words if len(words) <= 96 else [*words[:64], f"... ({len(words) - 80} tokens) ...", *words[-16:]]
            lines.append(f"{len(words)} tokens: " + "|".join(short))
        return "\n".join(lines)

    def shown(self, document: Document) -> Shown:
        """The document as it is, and as tokens if there are a grammar and a tokenizer."""
        turns: list[tuple[str, list[str | np.ndarray]]] = []
        for speaker, said in _turns(document):
            parts = [part for part in said if not isinstance(part, CodesPart)]
            turns.append((speaker, [p.text if isinstance(p, TextPart) else p.pixels for p in parts]))
        real = self._real(document)
        if real is None or self.grammar is None:
            return Shown(document.origin, document.task, turns)
        found = self.grammar.encode(real)
        codes = [part.codes for part in real.parts if isinstance(part, CodesPart)]
        assert self.resize is not None
        originals = [self.resize(part.pixels) for part in document.parts if isinstance(part, ImagePart)]
        return Shown(document.origin, document.task, turns, len(found), list(self._tokens(found, codes, originals)))

    def read(self, found: Encoded, origin: str, task: str) -> Shown:
        """A document that was read from prepared shards. Without a grammar, its ids are shown as numbers."""
        turns: list[tuple[str, list[str | np.ndarray]]] = []
        codes: list[np.ndarray] = []
        if self.grammar is not None:
            document = self.grammar.parse(found.tokens)
            codes = [part.codes for part in document.parts if isinstance(part, CodesPart)]
            for turn in document.turns:
                parts = [part.text if isinstance(part, TextPart) else "" for part in turn.parts]
                turns.append((turn.speaker, [part for part in parts if part]))
        return Shown(origin, task, turns, len(found), list(self._tokens(found, codes)))

    def _tokens(
        self, found: Encoded, codes: Sequence[np.ndarray], originals: Sequence[np.ndarray] = ()
    ) -> Iterator[Token]:
        """The first ids of a document; all codes of an image are one Token. codes: [h, w] of each image, if known."""
        roles, learned, image = found.roles, found.trained, -1
        begins, until, given = set(found.images.tolist()), -1, 0
        for at in range(len(found)):
            if at in begins:
                image += 1
            if roles[at] == Role.IMAGE:
                if at < until:
                    continue
                until = min((start for start in begins if start > at), default=len(found))
                last = np.flatnonzero(roles[at:until] == Role.IMAGE)[-1]
                until = at + int(last) + 1
                known = 0 <= image < len(codes)
                shape = "{} x {} codes".format(*codes[image].shape) if known else "codes"
                original = originals[image] if image < len(originals) else None
                decoded = self._decoded(codes[image]) if known else None
                yield Token(shape, Role.IMAGE, bool(learned[at]), original, decoded)
            elif at >= until:
                token = int(found.tokens[at])
                text = str(token) if self.grammar is None else _word(token, self.grammar)
                yield Token(text, Role(int(roles[at])), bool(learned[at]))
            given += 1
            if given >= MOST:
                return

    def _decoded(self, codes: np.ndarray) -> np.ndarray | None:
        if self.tokenizer is None or draws_none(self.tokenizer):
            return None
        return np.asarray(self.tokenizer.decode(codes[None]))[0]

    def _real(self, document: Document) -> Document | None:
        """The document with the codes of its images; None without an image tokenizer."""
        tokenizer, resize = self.tokenizer, self.resize
        if self.grammar is None or tokenizer is None or resize is None:
            return None
        if self._known is None or self._known[0] is not document:  # `words` and `shown` both need the result
            codes = _coded(document, lambda pixels: np.asarray(tokenizer.encode(resize(pixels)[None]), np.int32)[0])
            self._known = document, codes
        return self._known[1]


def _turns(document: Document) -> list[tuple[str, tuple[Part, ...]]]:
    """The turns; for a preference pair, also the rejected answer."""
    said = [(str(turn.speaker), turn.parts) for turn in document.turns]
    return [*said, *([] if document.rejected is None else [("rejected", document.rejected.parts)])]


def _coded(document: Document, codes: Callable[[np.ndarray], np.ndarray]) -> Document:
    return document.changed(lambda part: CodesPart(codes(part.pixels)) if isinstance(part, ImagePart) else part)


def _word(token: int, grammar: Grammar) -> str:
    if token < grammar.vocabulary.text_size:
        return repr(grammar.text_codec.decode([token]))[1:-1]
    return f"<{grammar.vocabulary.name(token).strip('<>')}>"
