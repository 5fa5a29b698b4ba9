"""Converts documents to ids and back. Data, loss and sampler share this one definition of what is valid.

The layout (`layouts`) says how images and turns are written. `ImageLayout` says how large images are.

Axes: `h` `w` height and width of an image in codes; `n` number of tokens in a document.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from ar_unified.language import encoded
from ar_unified.language.automaton import DONE, PARTS, Automaton, Opened
from ar_unified.language.document import CodesPart, Document, DocumentError, Part, TextPart, Turn
from ar_unified.language.encoded import Encoded
from ar_unified.language.layouts import Text, TurnFrames, TurnMarks
from ar_unified.language.reading import GrammarError, Reader, find, half_open
from ar_unified.language.syntax import ImageLayout, Syntax
from ar_unified.language.turns import Around, answered, arranged, counted, joined_texts
from ar_unified.language.vocabulary import Role, Vocabulary
from ar_unified.manifests import Json, ManifestMismatch, require_same


class TextLost(GrammarError):
    """Encoding and decoding a text with the text tokenizer changes it."""


class TextCodec(Protocol):
    """Converts text to ids 0..text_size-1 and back without loss. If it has a `hash`, this must equal the vocabulary's
    `text_hash`.
    """

    def encode(self, text: str, /) -> list[int]:
        """The ids of a text."""

    def decode(self, ids: Sequence[int], /) -> str:
        """The text that ids stand for."""


class Break(NamedTuple):
    """Where a prompt breaks off. `begin`: the position where an unfinished image at the prompt's end begins, or an
    unfinished `open` that is text; if there is neither, the prompt's length. `opened`: the automaton's state at the end
    of the prompt.
    """

    begin: int
    opened: Opened


class Grammar:
    """A vocabulary, a way to write images and turns, and a text tokenizer.

    A vocabulary without image codes has no images, and its image layout `TEXT_ALONE` is never used.

    Raises:
        ValueError: if the layout needs a token that the vocabulary lacks.
        ManifestMismatch: if the codec's `hash` or `size` differs from the vocabulary's.
    """

    def __init__(self, vocabulary: Vocabulary, layout: ImageLayout, text_codec: TextCodec):
        for field, ours in (("hash", vocabulary.text_hash), ("size", vocabulary.text_size)):
            theirs = getattr(text_codec, field, ours)
            if theirs != ours:
                raise ManifestMismatch(
                    f"text_{field}",
                    f"vocabulary was made for a text tokenizer with {field} {ours!r}, "
                    f"the given tokenizer has {field} {theirs!r}: use the tokenizer of the same run",
                )
        self.vocabulary, self.layout, self.text_codec = vocabulary, layout, text_codec
        self.syntax = Syntax.of(vocabulary, layout, lambda text: self.text_codec.encode(text))
        self._fitting: set[tuple[int, ...]] = set()  # sizes that were checked

    # ---- documents to ids ----------------------------------------------------------------------------------------

    def encode(self, document: Document) -> Encoded:
        """The document as ids and marks. Its parts must be TextPart or CodesPart.

        Raises:
            GrammarError: if the document is invalid, or the layout, the codebook or the text tokenizer cannot represent
                a part.
        """
        try:
            document.check()
        except DocumentError as error:
            found = str(error).removeprefix(f"part {error.part}: ")
            raise GrammarError(error.part, "a valid document", f"an invalid one: {found}", unit="part") from error
        return self._joined(document.turns)

    def prompt(self, turns: Sequence[Turn]) -> np.ndarray:
        """The ids that a sampler starts from, int32 [n]. It then answers the turns, or continues text without turns.

        Raises GrammarError like `encode`.
        """
        asked = turns[-1].speaker != "document"
        document = Document((*turns, Turn("assistant"))) if asked else Document(tuple(turns))
        return self.encode(document).tokens[: -1 - len(self.tail)]

    def history(self, turns: Sequence[Turn]) -> np.ndarray:
        """Finished turns as ids, int32 [n], in the form they have before another turn. Raises GrammarError like
        `encode`."""
        found = self._joined(turns).tokens
        return found[: len(found) - len(self.tail)]

    @cached_property
    def tail(self) -> np.ndarray:
        """The ids after the end of a document, int32 [n]. They are never sampled; most layouts have none."""
        return np.array([self.vocabulary.control(name) for name in self.layout.record.tail], np.int32)

    def parts(self, parts: Sequence[Part]) -> np.ndarray:
        """Consecutive parts as ids, int32 [n], in the form they have in a document. Raises GrammarError like
        `encode`."""
        return self.prompt([Turn("document", tuple(parts))])[1:]

    @cached_property
    def unconditional(self) -> Encoded:
        """The ids before an image that has no prompt. Condition dropout trains on them, and guidance uses them."""
        out = encoded.Writer()
        out.turn("user", learned=False)
        for part in self.layout.record.unconditional:
            if isinstance(part, Text):
                out.add(self.text_codec.encode(part.text), Role.TEXT)
            else:
                out.add([self.vocabulary.control(part)], Role.CONTROL)
        return out.written()

    def image(self, codes: np.ndarray) -> np.ndarray:
        """An image of codes int32 [h, w] as ids, int32 [n]. Raises GrammarError like `encode`."""
        self._check_codes(codes, 0)
        return self.syntax.write(codes)[0]

    def image_tokens(self, height: int, width: int) -> int:
        """Length of an image of height x width codes. Raises GrammarError like `check_size`."""
        self.check_size(height, width)
        return self.syntax.block(height, width)

    def check_size(self, height: int, width: int, position: int = 0) -> None:
        """Raises GrammarError if no image of height x width codes can be written. `position`: the part's index."""
        most, (rows, columns) = self.layout, self.layout.units
        expected = ""
        if not most.sized:
            if (height, width) != (most.height, most.width):
                expected = f"an image of exactly {most.height} x {most.width} codes (resize and crop it)"
        elif not (1 <= height <= most.height and 1 <= width <= most.width):
            expected = f"an image of at most {most.height} x {most.width} codes (resize or crop it)"
        elif height % rows or width % columns:
            expected = f"an image whose sides are multiples of {rows} and {columns} codes (resize or crop it)"
        if expected:
            raise GrammarError(position, expected, f"{height} x {width}", unit="part")

    def _joined(self, turns: Sequence[Turn]) -> Encoded:
        """The turns, concatenated. Two adjacent texts must not together form the beginning of an image (`_text` checks
        only single texts).
        """
        writer = self._writer(turns)
        found, opening = writer.written(), self.syntax.open
        if self.syntax.spelled:
            text = np.where(found.roles == Role.TEXT, found.tokens, -1)
            if (at := find(text, opening)) >= 0:
                mark = self.text_codec.decode(opening)
                raise GrammarError(at, f"turns whose joined texts do not contain {mark!r}", "the beginning of an image")
        return found

    def _writer(self, turns: Sequence[Turn]) -> encoded.Writer:
        out = encoded.Writer()
        at = 0
        for turn, pieces in arranged(turns, self.layout.record.turns, self._around):
            out.turn(turn.speaker, turn.learned)
            for piece in pieces:
                if isinstance(piece, list):
                    out.add(piece, Role.CONTROL)
                elif isinstance(piece, TextPart):
                    out.add(self._text(at, piece.text), Role.TEXT)
                elif isinstance(piece, CodesPart):
                    self._check_codes(piece.codes, at)
                    out.image(*self.syntax.write(piece.codes))
                else:
                    raise GrammarError(at, "codes (the image tokenizer makes them)", "pixels", unit="part")
                at += not isinstance(piece, list)
        out.add(self._around.tail, Role.CONTROL)
        return out

    @property
    def begins(self) -> list[int]:
        """The ids that a document may begin with."""
        return self._around.begin + self._around.open

    @cached_property
    def _around(self) -> Around:
        v, record = self.vocabulary, self.layout.record
        turns = record.turns
        asks = (turns.ask,) if isinstance(turns, TurnMarks) else getattr(turns, "answer", ())
        opens = (turns.open,) if isinstance(turns, TurnFrames) else ()
        begin, open_, names = ([v.control(name) for name in each] for each in ((record.begin,), opens, asks))
        return Around(begin, open_, names, [self.syntax.end], self.tail.tolist())

    def _text(self, i: int, text: str) -> list[int]:
        try:
            ids = self.text_codec.encode(text)
        except ValueError as error:
            raise GrammarError(i, "a text that the tokenizer can encode", str(error), unit="part") from error
        if ids and (min(ids) < 0 or max(ids) >= self.vocabulary.text_size):
            expected = f"ids 0..{self.vocabulary.text_size - 1} from the text tokenizer"
            raise GrammarError(i, expected, f"{ids!r:.80} for {text!r:.80}", unit="part")
        back = self.text_codec.decode(ids)
        if back != text:
            at = len(os.path.commonprefix([text, back]))
            expected = f"a text that decodes unchanged, with {text[at : at + 20]!r} at character {at}"
            raise TextLost(i, expected, repr(back[at : at + 20]), unit="part")
        opening = self.syntax.open
        if self.syntax.spelled and find(np.append(ids, opening[:-1]), opening) >= 0:
            mark = self.text_codec.decode(opening)
            raise GrammarError(i, f"a text without {mark!r}, which begins an image", repr(text)[:80], unit="part")
        return ids

    def _check_codes(self, codes: np.ndarray, i: int) -> None:
        v = self.vocabulary
        if not v.codebook_size:
            raise GrammarError(i, "a text (this vocabulary has no image codes)", "an image", unit="part")
        if codes.shape not in self._fitting:
            self.check_size(codes.shape[0], codes.shape[1], i)
            self._fitting.add(codes.shape)
        if codes.min() < 0 or codes.max() >= v.codebook_size:
            expected = f"codes 0..{v.codebook_size - 1} (the image tokenizer's codebook)"
            raise GrammarError(i, expected, f"{codes.min()}..{codes.max()}", unit="part")

    # ---- ids to documents ----------------------------------------------------------------------------------------

    def parse(self, tokens: np.ndarray | Sequence[int]) -> Document:
        """The document of ids that come from `encode`, or from a sampler with the automaton. It is the exact inverse of
        `encode`, except for layouts that separate turns by text: those give one turn without a speaker.

        Args:
            tokens: [n] ids, without padding.

        Raises:
            GrammarError: if a token is not valid at its place. The error has the position of the first such token.
        """
        turns, at, _ = self._read(np.asarray(tokens), whole=True)
        if turns is None:
            raise GrammarError(at, self.vocabulary.name(self.syntax.end), _END)
        return Document(turns)

    def breaks_off(self, tokens: np.ndarray) -> Break:
        """Where the first ids of a document, [n], break off. Raises GrammarError if no document can begin with them."""
        _, _, found = self._read(np.asarray(tokens), whole=False)
        return found

    def texts(self, tokens: np.ndarray) -> list[tuple[int, int]]:
        """(begin, end) of each run of text in the first ids of a document, [n]. Digits of a size are not text."""
        return [(item.begin, item.end) for item in Reader(self.syntax, tokens).items(1) if item.kind == "text"]

    def _read(self, ids: np.ndarray, whole: bool) -> tuple[tuple[Turn, ...] | None, int, Break]:
        """The turns of ids (None if they do not end as a document does), how far the ids were read, and where they
        break off."""
        v, record, ends = self.vocabulary, self.layout.record, self.syntax.end
        reader = Reader(self.syntax, ids)
        asks = v.control(record.turns.ask) if isinstance(record.turns, TurnMarks) else None
        unsaid = self._around.open + (self._around.asks if asks is None else [])
        if not len(ids) or ids[0] not in self.begins:
            raise GrammarError(0, " or ".join(map(v.name, self.begins)), reader.found(0))
        asked: list[tuple[Part, ...]] = []  # turns that have no answer yet
        turns: list[Turn] = []
        parts: list[Part] = []
        closed, half, at, tail = False, 0, 1, self.tail.tolist()
        for item in reader.items(1):
            at = item.end
            id = int(ids[item.begin])
            if closed and tail and id == tail[0]:
                tail.pop(0)
                continue
            if closed and (len(tail) < len(self.tail) or (turns and turns[-1].speaker == "document")):
                raise GrammarError(item.begin, _END, v.name(id))
            closed, half = False, 0
            if item.kind == "text":
                half = half_open(self.syntax, ids[item.begin :]) if item.end == len(ids) else 0
                if text := self.text_codec.decode([int(i) for i in ids[item.begin : item.end]]):
                    parts.append(TextPart(text))  # pieces that were sampled one after the other may not be valid text
            elif item.opened is not None:
                if whole:
                    raise GrammarError(len(ids), "the rest of an image", _END)
                return None, at, Break(item.begin, item.opened)
            elif item.codes is not None:
                parts.append(CodesPart(item.codes))
            elif id == asks and (asks == ends or len(asked) < (1 if turns else 2)):
                asked.append(tuple(parts))
                parts, closed = [], asks == ends
            elif id == ends and asks is None:  # perhaps the end of an answer before another turn
                closed = True
            elif id == ends and (asked or not turns):
                turns += answered(asked, tuple(parts))
                asked, parts, closed = [], [], True
            elif id not in unsaid:
                turn = f", {v.name(asks)}" if asks is not None and len(asked) < (1 if turns else 2) else ""
                end = f" or {v.name(ends)}" if asked or not turns else ""
                raise GrammarError(item.begin, f"text, {self._opening()}{turn}{end}", v.name(id))
        if closed and tail and whole:
            raise GrammarError(at, v.name(tail[0]), _END)
        if closed and asks is None:
            turns = [Turn("document", joined_texts(parts))]
        elif closed and asks == ends:
            turns = counted(asked)
        # If a question may end with `end`, too, the document may go on after it.
        ended = closed and asks != ends and ids[0] not in self._around.open
        opened = Opened(DONE) if ended else Opened(PARTS, half)
        return tuple(turns) if closed else None, at, Break(len(ids) - half, opened)

    def _opening(self) -> str:
        opening = self.syntax.open
        return repr(self.text_codec.decode(opening)) if self.syntax.spelled else self.vocabulary.name(opening[0])

    # ---- ids to ids: how the data loader changes an encoded document; all O(n) ------------------------------------

    def drop_prompt(self, document: Encoded) -> Encoded:
        """The empty prompt, followed by the last answer. Raises GrammarError if the document has no turns (for these
        documents, there is `drop_context`)."""
        return encoded.joined([self.unconditional, document[int(self._borders(document)[-1]) :]])

    def drop_context(self, document: Encoded, image: int) -> Encoded:
        """The empty prompt, followed by the part of the document that begins with image number `image` of `own_images`.

        Raises GrammarError if there is no such image.
        """
        images = document.own_images
        if not 0 <= image < len(images):
            raise GrammarError(len(document), f"an image number {image}", f"{len(images)} images")
        begin = int(images[image])
        rest = document.marks[begin:].copy()
        rest[0] |= encoded.TURN
        own = np.cumsum((rest & encoded.TURN) > 0) == 1
        rest[own] |= encoded.mark(0, "assistant", trained=False)
        return encoded.joined([self.unconditional, Encoded(document.tokens[begin:], rest)])

    def swap_turn(self, document: Encoded) -> Encoded:
        """Swaps the last question and its answer, so that a pair is read in the other direction.

        Raises GrammarError if there are no turns, or if text separates them.
        """
        self._borders(document)
        if not self.can_swap:
            raise GrammarError(0, "turns separated by ids", "turns separated by text")
        return encoded.swapped(document)

    @property
    def can_swap(self) -> bool:
        """Whether `swap_turn` is possible with this layout."""
        return isinstance(self.layout.record.turns, TurnMarks)

    def _borders(self, document: Encoded) -> np.ndarray:
        borders = document.turns
        if len(borders) < 2:
            raise GrammarError(len(document), "a document with turns", "a document without turns")
        return borders

    # ---- the automaton and the manifest -----------------------------------------------------------------------

    @cached_property
    def automaton(self) -> Automaton:
        """The same grammar as an automaton with integer state, for constrained decoding on the device."""
        return Automaton(self.syntax)

    def manifest(self) -> dict[str, Json]:
        """The vocabulary's manifest and this grammar, as plain JSON values."""
        record = {"record": dataclasses.asdict(self.layout.record)}
        return self.vocabulary.manifest() | {"layout": _plain(dataclasses.asdict(self.layout) | record)}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], text_codec: TextCodec) -> Grammar:
        """The grammar that a manifest describes.

        Raises:
            ManifestMismatch: if a field is missing or unknown here, or `text_codec` is another tokenizer.
        """
        vocabulary = Vocabulary.from_manifest(manifest)
        try:
            fields = (field.name for field in dataclasses.fields(ImageLayout))
            layout = ImageLayout(**{name: manifest["layout"][name] for name in fields})
            grammar = cls(vocabulary, layout, text_codec)
        except ManifestMismatch:
            raise
        except (KeyError, TypeError, ValueError) as error:
            message = f"manifest has no layout that this version can read: {error!r}"
            raise ManifestMismatch("layout", message) from error
        here = "this version of ar_unified"
        require_same(grammar.manifest(), manifest, expected_from=here, found_from="manifest")
        return grammar


_END = "the end of the sequence"


def _plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value
