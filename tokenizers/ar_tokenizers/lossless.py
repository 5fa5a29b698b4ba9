"""Finds the ways in which a SentencePiece model loses text. The causes are the model's settings; the examples are short
texts that decoding does not restore.

Every model file contains the settings. Their field numbers are in sentencepiece_model.proto
(github.com/google/sentencepiece). This module reads them from the bytes, because the reader in SentencePiece works only
with the newest protobuf.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SPACE = "\u2581"  # what SentencePiece writes for a space
# Characters that SentencePiece cannot learn as they are: it reads U+2581 as a space, and leaves out every text with
# U+2585, which it writes for unknown characters.
RESERVED = SPACE + "\u2585"

# Field numbers of NormalizerSpec and of TrainerSpec, the value of a piece type, and the value of a model type.
_NAME, _CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 1, 2, 3, 4
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_CONTROL, _USER_DEFINED, _BPE = 3, 4, 2

# The probes: texts that a model may lose. The parts of a text are encoded separately and decoded together.
CHARACTERS = ("\uff46\uff55\uff4c\uff4c \ufb01 e\u0301 \u00e9 \u2126",)
LINES = ("line\n\n\tindented\r\n",)
SPACES = ("  two  spaces ",)
JOINED = ("a red", "dish star")
RARE = ("\U0001f9ee\U000e0001 \ufeff",)
CONTROLS = ("nul \0 and \x01",)
SPACE_SIGNS = (f"{SPACE}a{SPACE}b ",)
NAMES = ("<unk> <s> <0x0A>",)
_PROBES = (CHARACTERS, LINES, SPACES, JOINED, RARE, CONTROLS, SPACE_SIGNS, NAMES)


@dataclass(frozen=True)
class Loss:
    """One way in which a model loses text.

    Attributes:
      cause: the model's setting, and what it does.
      text, back: an example, and the text that decoding gives back; both "" if no probe (a text of this module) shows
        the loss.
    """

    cause: str
    text: str = ""
    back: str = ""

    def __str__(self) -> str:
        return self.cause + (f": {self.text!r} comes back as {self.back!r}" if self.text else "")


def find_losses(
    model_bytes: bytes, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> tuple[Loss, ...]:
    """All settings of a SentencePiece model that lose text, each with an example if one was found. If the result is
    empty, the model is lossless.

    A setting is listed even if no probe shows its effect. A text that is not restored is listed even if no setting
    explains it.
    """
    trainer, normalizer, denormalizer = (_settings(model_bytes, part) for part in (2, 3, 5))
    rules = [
        (
            normalizer.get(_CHARSMAP),
            f"normalizer_spec.name = {normalizer.get(_NAME, b'').decode()!r} rewrites characters",
            (CHARACTERS, LINES, CONTROLS),
        ),
        (
            normalizer.get(_REMOVE_EXTRA_WHITESPACES, True),
            "normalizer_spec.remove_extra_whitespaces drops spaces at both ends, and keeps one of several in a row",
            (SPACES,),
        ),
        (
            normalizer.get(_ADD_DUMMY_PREFIX, True),
            "normalizer_spec.add_dummy_prefix adds a space to every text, so separately encoded texts get "
            "spaces between them",
            (JOINED, SPACE_SIGNS),
        ),
        (
            not trainer.get(_BYTE_FALLBACK, False),
            "trainer_spec.byte_fallback is off: a character without a piece becomes <unk>",
            (RARE, CONTROLS),
        ),
        (
            denormalizer.get(_CHARSMAP),
            f"denormalizer_spec.name = {denormalizer.get(_NAME, b'').decode()!r} rewrites decoded text",
            (CHARACTERS,),
        ),
    ]

    return shown([(cause, probes) for does, cause, probes in rules if does], encode, decode)


def shown(
    rules: Sequence[tuple[str, Sequence[Sequence[str]]]],
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> tuple[Loss, ...]:
    """One Loss for each (cause, probes) in `rules`. Its example is the first probe that decoding does not restore.

    If there are no rules, but decoding does not restore a probe of this module, the result is one loss with this probe.
    """

    def example(probes: Sequence[Sequence[str]]) -> tuple[str, str] | None:
        for parts in probes:
            text, back = "".join(parts), decode([id for part in parts for id in encode(part)])
            if back != text:
                return text, back
        return None

    found = tuple(Loss(cause, *(example(probes) or ())) for cause, probes in rules)
    if not found and (lost := example(_PROBES)):
        found = (Loss("no setting of the model explains why a text changes", *lost),)
    return found


def refusal(losses: Sequence[Loss]) -> str:
    """The message for a tokenizer that is refused because it loses text. It says how it loses text, and what to do."""
    return (
        "this text tokenizer loses text.\n"
        + "".join(f"  {loss}\n" for loss in losses)
        + 'Train another with TextTokenizer.train, or accept this one with lossy="warn" (in a config: '
        "text_tokenizer.lossy). Documents that decoding does not restore are then left out and counted"
    )


def reachable_symbols(model_bytes: bytes) -> list[str]:
    """The user-defined symbols that text can spell, except those made only of spaces.

    They lose no text. Here they are ordinary text, because begin, end and image tokens have ids of their own. But a
    language model may have learned to treat such a piece as a command. Then it also obeys when a user writes the piece.
    """
    pieces = (dict(_fields(piece)) for field, piece in _fields(model_bytes) if field == 1)
    symbols = [piece[1].decode() for piece in pieces if piece.get(3) == _USER_DEFINED]
    return [symbol for symbol in symbols if symbol.replace(SPACE, " ").strip()]


def only_spelling(model_bytes: bytes, text_ids: Collection[int]) -> bytes:
    """Returns the model with the types of some pieces changed: each user-defined symbol that is not in `text_ids`
    becomes a control piece, as <s> is.

    Text that looks like a control piece is then spelled with other pieces.
    """
    out, id = [], 0
    for field, value in _fields(model_bytes):
        if field == 1:
            if dict(_fields(value)).get(3) == _USER_DEFINED and id not in text_ids:
                value += bytes((3 << 3, _CONTROL))  # if a field is there twice, the last one counts
            id += 1
        out.append(_number(field << 3 | 2) + _number(len(value)) + value)
    return b"".join(out)


def _number(value: int) -> bytes:
    """The encoding of a whole number in a protocol buffer."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def is_bpe(model_bytes: bytes) -> bool:
    """Whether a SentencePiece model merges pairs of pieces (BPE)."""
    return _settings(model_bytes, 2).get(_MODEL_TYPE) == _BPE


def _settings(model_bytes: bytes, part: int) -> dict[int, Any]:
    """The fields of one part of a model (2 is trainer_spec, 3 normalizer_spec, 5 denormalizer_spec)."""
    return dict(_fields(b"".join(value for field, value in _fields(model_bytes) if field == part)))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The number and the value of every field of a protocol buffer. Whole numbers are int; all other values are
    bytes."""
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
