"""Document <-> token ids: the one description of what may stand where, shared by data, loss and sampler.

    document   BOS parts EOS                          no turn
               BOS prompt-parts EOT answer-parts EOS  with a turn
    text       text pieces
    picture    BOI code*(h*w) EOI                                       fixed_grid(h, w)
               BOI side(h) side(w) (code*w EOL)*h EOI                   sized_rows(max_h, max_w)

Fixed grids are the way of Chameleon and LWM; sizes and line ends that of Emu3 and Lumina-mGPT. Side lengths
have tokens of their own, so that no text tokenizer's way with digits matters.

Axes: `h` `w` height and width of a picture in codes; `n` tokens of a document.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from ar_unified.automaton import Automaton
from ar_unified.document import TASKS, CodesPart, Document, DocumentError, Part, TextPart
from ar_unified.manifests import ManifestMismatch, require_same
from ar_unified.vocabulary import Role, Vocabulary


class GrammarError(ValueError):
    """What the grammar expected, what it found, and where.

    Attributes:
        position: index of the offending token (parse) or part (encode).
        expected, found: in words.
    """

    def __init__(self, position: int, expected: str, found: str, unit: str = "token"):
        super().__init__(f"{unit} {position}: expected {expected}, found {found}")
        self.position, self.expected, self.found = position, expected, found


class TextLost(GrammarError):
    """The text tokenizer does not give a text back as it was."""


class TextCodec(Protocol):
    """Lossless text <-> ids 0..text_size-1. If it has a `hash`, it must be the vocabulary's `text_hash`."""

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


LAYOUTS = ("grid", "rows")


@dataclass(frozen=True)
class ImageLayout:
    """How a picture is written. grid: always height x width codes; rows: any size up to height x width."""

    kind: Literal["grid", "rows"]
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise ValueError(f'image layout: expected kind "grid" or "rows", found {self.kind!r}')
        if self.height < 1 or self.width < 1:
            raise ValueError(f"image layout: expected at least 1 x 1, found {self.height} x {self.width}")

    @property
    def sized(self) -> bool:
        """Whether pictures say their size and end their lines."""
        return self.kind == "rows"

    @property
    def header(self) -> int:
        """Size tokens between BOI and the first code."""
        return 2 if self.sized else 0

    def body(self, height: Any, width: Any) -> Any:
        """Codes and line ends of a picture; ints or (traced) integer arrays."""
        return height * (width + 1) if self.sized else height * width

    def block(self, height: Any, width: Any) -> Any:
        """Length of a picture from BOI to EOI; ints or (traced) integer arrays."""
        return 2 + self.header + self.body(height, width)


def fixed_grid(height: int, width: int) -> ImageLayout:
    """Every picture has height x width codes, written without sizes or line ends."""
    return ImageLayout("grid", height, width)


def sized_rows(max_height: int, max_width: int) -> ImageLayout:
    """Pictures of any size up to max_height x max_width codes, which say their size and end every line."""
    return ImageLayout("rows", max_height, max_width)


TEXT_ALONE = fixed_grid(1, 1)


class Grammar:
    """One vocabulary, one way to write pictures, one text tokenizer.

    A vocabulary without image codes has no pictures: of the layout, `TEXT_ALONE`, nothing is ever written.

    Raises:
        ValueError: the vocabulary has no side length for the layout's largest picture.
        ManifestMismatch: the codec's `hash` or `size` is not what the vocabulary was made for.
    """

    def __init__(self, vocabulary: Vocabulary, layout: ImageLayout, text_codec: TextCodec):
        longest = max(layout.height, layout.width)
        if layout.sized and vocabulary.max_side < longest:
            raise ValueError(
                f"vocabulary.max_side: expected at least {longest} for sized rows up to "
                f"{layout.height} x {layout.width} codes, found {vocabulary.max_side}"
            )
        for field, ours in (("hash", vocabulary.text_hash), ("size", vocabulary.text_size)):
            theirs = getattr(text_codec, field, ours)
            if theirs != ours:
                raise ManifestMismatch(
                    f"text_{field}",
                    f"vocabulary was made for a text tokenizer with {field} {ours!r}, "
                    f"the one given has {field} {theirs!r}: use the tokenizer of the same run",
                )
        self.vocabulary, self.layout, self.text_codec = vocabulary, layout, text_codec

    # ---- documents to tokens ---------------------------------------------------------------------

    def encode(self, document: Document) -> np.ndarray:
        """The document as int32 [n]. Its parts are TextPart or CodesPart.

        Raises:
            GrammarError: the document is invalid, or layout, codebook or text tokenizer cannot carry a part.
        """
        turn = document.prompt is not None
        border = document.prompt if document.prompt is not None else len(document.parts)
        blocks = self._blocks(document)
        prompt, answer = blocks[:border], blocks[border:]
        v = self.vocabulary
        return np.concatenate([[v.bos], *prompt, [v.eot] * turn, *answer, [v.eos]]).astype(np.int32)

    def prompt_tokens(self, parts: Sequence[Part], *, turn: bool) -> np.ndarray:
        """What the sampler is given, int32 [n]: BOS and the parts, and EOT if they are to be answered.

        Without a turn the sampler goes on with the document. Raises GrammarError like `encode`.
        """
        return self.encode(Document(tuple(parts), prompt=len(parts) if turn else None))[:-1]

    @property
    def unconditional(self) -> np.ndarray:
        """The empty prompt, int32 [2]. Condition dropout trains on it; guidance compares with it."""
        return np.array([self.vocabulary.bos, self.vocabulary.eot], np.int32)

    def image_tokens(self, height: int, width: int) -> int:
        """Length of a picture of height x width codes, BOI to EOI. Raises GrammarError like `check_size`."""
        self.check_size(height, width)
        return self.layout.block(height, width)

    def check_size(self, height: int, width: int, position: int = 0) -> None:
        """Raises GrammarError if no picture of height x width codes can be written; `position`: its part."""
        most = self.layout
        if most.sized:
            if not (1 <= height <= most.height and 1 <= width <= most.width):
                expected = f"a picture of at most {most.height} x {most.width} codes (resize or crop it)"
                raise GrammarError(position, expected, f"{height} x {width}", unit="part")
        elif (height, width) != (most.height, most.width):
            expected = f"a picture of exactly {most.height} x {most.width} codes (resize and crop it)"
            raise GrammarError(position, expected, f"{height} x {width}", unit="part")

    def _blocks(self, document: Document) -> list[np.ndarray]:
        try:
            document.check()
        except DocumentError as error:
            found = str(error).removeprefix(f"part {error.part}: ")
            raise GrammarError(error.part, "a valid document", found, unit="part") from error
        return [
            self._text(i, part.text) if isinstance(part, TextPart) else self._picture(i, part)
            for i, part in enumerate(document.parts)
        ]

    def _text(self, i: int, text: str) -> np.ndarray:
        ids = self.text_codec.encode(text)
        if ids and (min(ids) < 0 or max(ids) >= self.vocabulary.text_size):
            expected = f"ids 0..{self.vocabulary.text_size - 1} from the text tokenizer"
            raise GrammarError(i, expected, f"{ids!r:.80} for {text!r:.80}", unit="part")
        back = self.text_codec.decode(ids)
        if back != text:
            at = len(os.path.commonprefix([text, back]))
            expected = f"a text the tokenizer gives back, {text[at : at + 20]!r} at character {at}"
            raise TextLost(i, expected, repr(back[at : at + 20]), unit="part")
        return np.asarray(ids, np.int32)

    def _picture(self, i: int, part: Part) -> np.ndarray:
        if not isinstance(part, CodesPart):
            raise GrammarError(i, "codes (the image tokenizer makes them)", "pixels", unit="part")
        if not self.vocabulary.codebook_size:
            raise GrammarError(i, "a text (this vocabulary is of text alone)", "a picture", unit="part")
        v, codes = self.vocabulary, part.codes
        h, w = codes.shape
        self.check_size(h, w, i)
        if codes.min() < 0 or codes.max() >= v.codebook_size:
            expected = f"codes 0..{v.codebook_size - 1} (the image tokenizer's codebook)"
            raise GrammarError(i, expected, f"{codes.min()}..{codes.max()}", unit="part")
        header: list[int] = []
        body = codes + v.image_offset
        if self.layout.sized:
            header = [v.size_offset + h - 1, v.size_offset + w - 1]
            body = np.concatenate([body, np.full((h, 1), v.eol)], axis=1)
        return np.concatenate([[v.boi], header, body.ravel(), [v.eoi]])

    # ---- tokens to documents ---------------------------------------------------------------------

    def parse(self, tokens: np.ndarray | Sequence[int]) -> Document:
        """The document that `encode`, or a sampler under the automaton, wrote. Exact inverse of `encode`.

        Args:
            tokens: [n] ids from BOS to EOS, without padding.

        Raises:
            GrammarError: with the position of the first token that cannot stand where it stands.
        """
        v, ids = self.vocabulary, np.asarray(tokens)
        self._expect(ids, 0, v.bos)
        texts = np.append(v.role(ids) == Role.TEXT, False)
        parts: list[Part] = []
        prompt: int | None = None
        at = 1
        while at < len(ids) and ids[at] != v.eos:
            if texts[at]:
                end = at + int(np.argmin(texts[at:]))
                text = self.text_codec.decode([int(i) for i in ids[at:end]])
                if text:  # a sampled run of pieces may stand for nothing
                    parts.append(TextPart(text))
                at = end
            elif ids[at] == v.boi:
                codes, at = self._parse_picture(ids, at + 1)
                parts.append(CodesPart(codes))
            elif ids[at] == v.eot and prompt is None:
                prompt, at = len(parts), at + 1
            else:
                turn = "" if prompt is not None else ", <eot>"
                raise GrammarError(at, f"text, <boi>{turn} or <eos>", v.name(int(ids[at])))
        self._expect(ids, at, v.eos)
        if at + 1 < len(ids):
            raise GrammarError(at + 1, "the end of the sequence", v.name(int(ids[at + 1])))
        return Document(tuple(parts), prompt)

    def _parse_picture(self, ids: np.ndarray, at: int) -> tuple[np.ndarray, int]:
        """The codes int32 [h, w] of the picture whose BOI stands before `at`, and where it ends."""
        v, layout = self.vocabulary, self.layout
        h, w = layout.height, layout.width
        if layout.sized:
            h, w = self._parse_side(ids, at, "height", h), self._parse_side(ids, at + 1, "width", w)
            at += 2
        body = ids[at : at + layout.body(h, w)]
        line = w + 1 if layout.sized else w
        column = np.arange(len(body)) % line
        right = np.where(column == w, body == v.eol, v.role(body) == Role.IMAGE)
        k = len(body) if right.all() else int(np.argmin(right))
        if k < layout.body(h, w):
            row, col = divmod(k, line)
            expected = f"{'<eol>' if col == w else 'an image code'} (row {row}, column {col} of {h} x {w})"
            raise GrammarError(at + k, expected, self._found(ids, at + k))
        self._expect(ids, at + k, v.eoi)
        return (body[column < w].reshape(h, w) - v.image_offset).astype(np.int32), at + k + 1

    def _parse_side(self, ids: np.ndarray, at: int, name: str, most: int) -> int:
        side = int(ids[at]) - self.vocabulary.size_offset + 1 if at < len(ids) else 0
        if not 1 <= side <= most:
            raise GrammarError(at, f"a side token for the {name}, 1..{most}", self._found(ids, at))
        return side

    def _expect(self, ids: np.ndarray, at: int, token: int) -> None:
        if at >= len(ids) or ids[at] != token:
            raise GrammarError(at, self.vocabulary.name(token), self._found(ids, at))

    def _found(self, ids: np.ndarray, at: int) -> str:
        return self.vocabulary.name(int(ids[at])) if at < len(ids) else "the end of the sequence"

    # ---- tokens to tokens: what data does to a document it has already encoded; all O(n) ---------

    def task(self, tokens: np.ndarray) -> int:
        """Index into TASKS, as `Document.task` has it. tokens: int [n], an encoded document."""
        pictures = np.flatnonzero(tokens == self.vocabulary.boi)
        turn = np.flatnonzero(tokens == self.vocabulary.eot)
        if not turn.size:
            return TASKS.index("interleaved" if pictures.size else "text")
        if np.any(pictures == turn[0] + 1):
            return TASKS.index("text_to_image")
        return TASKS.index("image_to_text" if np.any(pictures < turn[0]) else "text")

    def drop_prompt(self, tokens: np.ndarray) -> np.ndarray:
        """The same answer after the empty prompt. tokens: int [n] with a turn; returns int32 [m].

        Raises GrammarError if there is no turn (see `drop_context`).
        """
        return np.concatenate([self.unconditional, tokens[self._turn(tokens) + 1 :]]).astype(np.int32)

    def drop_context(self, tokens: np.ndarray, image_index: int) -> np.ndarray:
        """The document from a chosen picture on, after the empty prompt. tokens: int [n]; returns int32 [m].

        Raises GrammarError if there is no such picture, or if it belongs to the prompt of a turn.
        """
        pictures = np.flatnonzero(tokens == self.vocabulary.boi)
        if not 0 <= image_index < len(pictures):
            raise GrammarError(len(tokens), f"a picture number {image_index}", f"{len(pictures)} pictures")
        rest = tokens[pictures[image_index] :]
        if np.any(rest == self.vocabulary.eot):
            raise GrammarError(int(pictures[image_index]), "a picture outside the prompt", "one inside it")
        return np.concatenate([self.unconditional, rest]).astype(np.int32)

    def swap_turn(self, tokens: np.ndarray) -> np.ndarray:
        """Prompt and answer exchanged: a pair read the other way. tokens: int [n]; returns int32 [n].

        Raises GrammarError if there is no turn.
        """
        turn = self._turn(tokens)
        bos, prompt, eot, answer, eos = np.split(tokens, [1, turn, turn + 1, len(tokens) - 1])
        return np.concatenate([bos, answer, eot, prompt, eos]).astype(np.int32)

    def _turn(self, tokens: np.ndarray) -> int:
        turn = np.flatnonzero(tokens == self.vocabulary.eot)
        if not turn.size:
            raise GrammarError(len(tokens), "a document with a turn (<eot> after the prompt)", "none")
        return int(turn[0])

    # ---- what ties it to everything else ---------------------------------------------------------

    @cached_property
    def automaton(self) -> Automaton:
        """The same grammar as integer state, for constrained decoding on the device."""
        return Automaton(self.vocabulary, self.layout)

    def manifest(self) -> dict[str, Any]:
        """The vocabulary's manifest and this grammar: plain JSON values."""
        return self.vocabulary.manifest() | {"grammar": asdict(self.layout)}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], text_codec: TextCodec) -> Grammar:
        """The grammar a manifest describes.

        Raises:
            ManifestMismatch: a field is missing or unknown here, or `text_codec` is another tokenizer.
        """
        vocabulary = Vocabulary.from_manifest(manifest)
        try:
            layout = ImageLayout(**{name: manifest["grammar"][name] for name in ("kind", "height", "width")})
            grammar = cls(vocabulary, layout, text_codec)
        except (KeyError, TypeError) as error:
            message = f"manifest has no grammar that this version can read: {error!r}"
            raise ManifestMismatch("grammar", message) from error
        here = "this version of ar_unified"
        require_same(grammar.manifest(), manifest, expected_from=here, found_from="manifest")
        return grammar
