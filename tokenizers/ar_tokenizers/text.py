"""A lossless SentencePiece text tokenizer: decode(encode(text)) == text for every text without surrogates.

The pieces are all there is in the model: one <unk> that encoding never produces (bytes stand in for characters that
have no piece), newline and tab as pieces of their own, 256 bytes, and what was learned. Begin, end and image tokens
live outside, in the one vocabulary of the model that reads the text, so that no text can spell them.

SentencePiece writes a space as U+2581 and reads every U+2581 in a piece back as a space. A U+2581 in the text is
therefore encoded as its three bytes, which come back as they were.

Settings after the tokenizers of LLaMA (BPE, identity normalisation, byte fallback, split digits), without the dummy
prefix: pieces of text that are encoded apart and joined decode to the joined text.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from ar_tokenizers.files import write_whole

_SPACE = "\u2581"  # what SentencePiece writes for a space
_LONGEST = 1 << 16  # characters SentencePiece is shown at once; it drops longer lines, so they are cut here

# What a normaliser, a dummy prefix or a missing byte fallback would lose, one kind of loss a probe.
_PROBES = (
    "  two  spaces ",
    "line\n\n\tindented\r\n",
    "\uff46\uff55\uff4c\uff4c \ufb01 e\u0301 \u00e9 \u2126",
    "\U0001f9ee\U000e0001 \ufeff",
    "nul \0 and \x01",
    f"{_SPACE}a{_SPACE}b ",
    "<unk> <s> <0x0A>",
)


class TextTokenizer:
    """Text to ids in [0, size) and back.

    Args:
      model_bytes: a serialised SentencePiece model.

    Raises:
      ValueError: the bytes are no SentencePiece model, or the model loses text (a normaliser such as nmt_nfkc, a dummy
        prefix, or no byte fallback).
    """

    def __init__(self, model_bytes: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise ValueError(f"these {len(model_bytes)} bytes are no SentencePiece model: {error}") from error
        self.model_bytes = model_bytes
        self.hash = hashlib.sha256(model_bytes).hexdigest()
        self.size = int(self._processor.get_piece_size())
        self._space_as_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        for probe in _PROBES:
            if (found := self.decode(self.encode(probe))) != probe:
                raise ValueError(
                    f"this text model loses text: {probe!r} comes back as {found!r}. Train with TextTokenizer.train, "
                    "or with normalization_rule_name=identity, byte_fallback, remove_extra_whitespaces=false, "
                    "allow_whitespace_only_pieces and add_dummy_prefix=false"
                )

    @functools.cached_property
    def piece_bytes(self) -> np.ndarray:
        """int32 [size]: UTF-8 bytes of text that each id stands for; what turns nats per token into bits per byte."""
        processor = self._processor
        return np.array(
            [
                0 if processor.is_unknown(i) else 1 if processor.is_byte(i) else len(self.decode([i]).encode())
                for i in range(self.size)
            ],
            np.int32,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in [0, size) and never <unk>.

        Raises:
          ValueError: the text has a surrogate, which is no character and has no UTF-8 form.
        """
        try:
            if _SPACE not in text:
                return self._processor.encode(text)
            first, *rest = (self._processor.encode(part) for part in text.split(_SPACE))
            return first + [id for part in rest for id in (*self._space_as_bytes, *part)]
        except (RuntimeError, UnicodeEncodeError) as error:
            _refuse_surrogates(text)
            raise ValueError(f"SentencePiece refused {text[:80]!r}: {error}") from error

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of any ids in [0, size). Bytes that are no UTF-8, and <unk>, come back as U+FFFD.

        Raises:
          ValueError: an id is outside [0, size).
        """
        pieces = np.asarray(ids, dtype=np.int64)
        try:
            return self._processor.decode(pieces.tolist())
        except IndexError as error:
            bad = pieces[(pieces < 0) | (pieces >= self.size)]
            raise ValueError(f"text ids must be in [0, {self.size}); found {bad[:8].tolist()}") from error

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        model_type: Literal["bpe", "unigram"] = "bpe",
        character_coverage: float = 0.99995,
        max_texts: int = 2_000_000,
    ) -> TextTokenizer:
        """Learn a tokenizer. The same texts, settings and SentencePiece version give the same model, byte for byte.

        Args:
          texts: read once; may be larger than memory, of which `max_texts` drawn at random are kept.
          vocab_size: how many pieces at most. A corpus with less to learn gives a smaller `size`, not an error.
          model_type: "bpe", or "unigram" (slower, and far hungrier for memory).
          character_coverage: the share of characters that get a piece; the rest are spelled in bytes, losing nothing.
          max_texts: more than 100; 2e6 short texts need a few GB.

        Raises:
          ValueError: no text, a text with a surrogate, or a vocab_size that has no room for the 259 fixed pieces and
            the characters.
        """
        if max_texts <= 100:
            raise ValueError(f"max_texts must be more than 100, got {max_texts}")
        model, reader = io.BytesIO(), _Reader(texts)
        sentencepiece.set_random_generator_seed(0)  # else SentencePiece shuffles differently each time
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(reader),
                model_writer=model,
                model_type=model_type,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                normalization_rule_name="identity",
                byte_fallback=True,
                split_digits=True,
                # Pieces over spaces (SuperBPE, arXiv:2503.13423) are fewer, but where "red star" is one, it shares
                # nothing with "red circle", and a small model that has to find the star does not get off the ground.
                split_by_whitespace=True,
                allow_whitespace_only_pieces=True,
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                character_coverage=character_coverage,
                # Their own pieces: learned ones would glue words to line ends.
                user_defined_symbols=["\n", "\t"],
                unk_id=0,
                unk_surface="\ufffd",
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                max_sentence_length=4 * _LONGEST,  # in bytes
                input_sentence_size=max_texts,
                shuffle_input_sentence=True,
                minloglevel=2,
            )
        except RuntimeError as error:
            if reader.error is not None:  # SentencePiece turns it into a RuntimeError and drops its type
                raise reader.error from None
            if not reader.count:
                raise ValueError("there is no text to train a tokenizer on: every text is empty") from error
            if found := re.search(r"required_chars\. (\d+) vs (\d+)", str(error)):
                raise ValueError(
                    f"vocab_size {vocab_size} is too small: this corpus needs at least {found[2]} (259 fixed pieces "
                    "and its characters). Raise vocab_size or lower character_coverage"
                ) from error
            raise ValueError(f"SentencePiece could not train on {reader.count} texts: {error}") from error
        return cls(model.getvalue())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one file, whole or not at all."""
        write_whole(path, self.model_bytes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextTokenizer:
        """Read what `save` wrote, or any lossless SentencePiece model. Raises ValueError naming the file."""
        try:
            return cls(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


class _Reader:
    """Hands texts to the trainer: without the empty, in parts it does not drop, and keeping what went wrong."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.count, self.error = texts, 0, None  # type: Iterable[str], int, BaseException | None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                _refuse_surrogates(text)
                self.count += bool(text)
                yield from (text[start : start + _LONGEST] for start in range(0, len(text), _LONGEST))
        except BaseException as error:
            self.error = error
            raise


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"position {error.start} of {text[:80]!r} is the surrogate U+{ord(text[error.start]):04X}, "
            "which is no character; decode the text's source with errors='replace' or leave it out"
        ) from error
