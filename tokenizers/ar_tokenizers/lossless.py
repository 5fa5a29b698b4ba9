"""What in a SentencePiece model loses text: its own settings say why, and short texts that do not come back say how.

The settings travel in every model file; sentencepiece_model.proto (github.com/google/sentencepiece) numbers them. They
are read here as they are stored, since the reader that SentencePiece brings works with the newest protobuf only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SPACE = "\u2581"  # what SentencePiece writes for a space
# Characters that SentencePiece cannot be shown in training as what they are: it reads U+2581 as a space, and leaves out
# every text with U+2585, which it writes for unknown characters.
RESERVED = SPACE + "\u2585"

# Field numbers, of NormalizerSpec and of TrainerSpec; a type of piece and one of model.
_NAME, _CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 1, 2, 3, 4
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_USER_DEFINED, _BPE = 4, 2

# Texts that a model may lose. The parts of one are encoded apart and decoded together.
_CHARACTERS = ("\uff46\uff55\uff4c\uff4c \ufb01 e\u0301 \u00e9 \u2126",)
_LINES = ("line\n\n\tindented\r\n",)
_SPACES = ("  two  spaces ",)
_JOINED = ("a red", "dish star")
_RARE = ("\U0001f9ee\U000e0001 \ufeff",)
_CONTROLS = ("nul \0 and \x01",)
_SPACE_SIGNS = (f"{SPACE}a{SPACE}b ",)
_NAMES = ("<unk> <s> <0x0A>",)
_PROBES = (_CHARACTERS, _LINES, _SPACES, _JOINED, _RARE, _CONTROLS, _SPACE_SIGNS, _NAMES)


@dataclass(frozen=True)
class Loss:
    """One way in which a model loses text.

    Attributes:
      cause: the setting of the model and what it does.
      text, back: an example and what comes back of it; both "" where no probe shows it.
    """

    cause: str
    text: str = ""
    back: str = ""

    def __str__(self) -> str:
        return self.cause + (f": {self.text!r} comes back as {self.back!r}" if self.text else "")


def find_losses(
    model_bytes: bytes, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> tuple[Loss, ...]:
    """Every setting of a SentencePiece model that loses text, with an example; none: the model is lossless.

    A setting counts even where no probe shows it. A text that does not come back though no setting says so counts too.
    """
    trainer, normalizer, denormalizer = (_settings(model_bytes, part) for part in (2, 3, 5))
    rules = [
        (
            normalizer.get(_CHARSMAP),
            f"normalizer_spec.name = {normalizer.get(_NAME, b'').decode()!r} rewrites characters",
            (_CHARACTERS, _LINES, _CONTROLS),
        ),
        (
            normalizer.get(_REMOVE_EXTRA_WHITESPACES, True),
            "normalizer_spec.remove_extra_whitespaces drops spaces at both ends and all but one of several",
            (_SPACES,),
        ),
        (
            normalizer.get(_ADD_DUMMY_PREFIX, True),
            "normalizer_spec.add_dummy_prefix adds a space to every text, so that texts encoded apart do not join",
            (_JOINED, _SPACE_SIGNS),
        ),
        (
            not trainer.get(_BYTE_FALLBACK, False),
            "trainer_spec.byte_fallback is off: a character without a piece becomes <unk>",
            (_RARE, _CONTROLS),
        ),
        (
            denormalizer.get(_CHARSMAP),
            f"denormalizer_spec.name = {denormalizer.get(_NAME, b'').decode()!r} rewrites what is decoded",
            (_CHARACTERS,),
        ),
    ]

    def example(probes: Sequence[Sequence[str]]) -> tuple[str, str] | None:
        for parts in probes:
            text, back = "".join(parts), decode([id for part in parts for id in encode(part)])
            if back != text:
                return text, back
        return None

    found = tuple(Loss(cause, *(example(probes) or ())) for does, cause, probes in rules if does)
    if not found and (lost := example(_PROBES)):
        found = (Loss("no setting of the model says why", *lost),)
    return found


def reachable_symbols(model_bytes: bytes) -> list[str]:
    """The user-defined symbols that text can spell, blanks left out.

    They lose nothing, and are text like any other here: begin, end and image tokens stand outside the text's ids. But
    weights that were trained to take such a piece for a command will take it for one when a user writes it.
    """
    pieces = (dict(_fields(piece)) for field, piece in _fields(model_bytes) if field == 1)
    symbols = [piece[1].decode() for piece in pieces if piece.get(3) == _USER_DEFINED]
    return [symbol for symbol in symbols if symbol.replace(SPACE, " ").strip()]


def is_bpe(model_bytes: bytes) -> bool:
    """Whether a SentencePiece model merges pairs of pieces (BPE)."""
    return _settings(model_bytes, 2).get(_MODEL_TYPE) == _BPE


def _settings(model_bytes: bytes, part: int) -> dict[int, Any]:
    """The fields of one part of a model: 2 trainer_spec, 3 normalizer_spec, 5 denormalizer_spec."""
    return dict(_fields(b"".join(value for field, value in _fields(model_bytes) if field == part)))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a protocol buffer: whole numbers as int, everything else as bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        tag = number()
        if tag & 7 == 0:
            yield tag >> 3, number()
        else:
            length = {1: 8, 5: 4}.get(tag & 7) or number()
            yield tag >> 3, message[at : at + length]
            at += length
