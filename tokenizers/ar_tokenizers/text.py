"""A lossless SentencePiece text tokenizer: decode(encode(text)) == text for every text without surrogates.

The model has only these pieces: one <unk> that encoding never produces (characters without a piece become bytes),
newline, tab, 256 bytes, and the learned pieces. Begin, end and image tokens are only in the language model's
vocabulary, so no text can produce them.

SentencePiece writes a space as U+2581 and reads every U+2581 in a piece back as a space. A U+2581 in the text is
therefore encoded as its three bytes, which come back as they were. SentencePiece reserves U+2581 and U+2585
(`lossless.RESERVED`). So training texts are cut at these characters, as at line ends, and no piece crosses a cut.

The settings are those of LLaMA's tokenizers (BPE, identity normalisation, byte fallback, split digits) without the
dummy prefix. So if the parts of a text are encoded separately, their ids, one part after another, decode to the whole
text.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import io
import os
import random
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from ar_tokenizers.codec import SENTENCEPIECE, Lossy, refuse_surrogates
from ar_tokenizers.files import write_bytes
from ar_tokenizers.lossless import (
    RESERVED,
    SPACE,
    Loss,
    find_losses,
    is_bpe,
    only_spelling,
    reachable_symbols,
    refusal,
)

ModelType = Literal["bpe", "unigram"]
_LONGEST = 1 << 16  # characters per training line: SentencePiece drops longer lines, so they are cut here
# A block has at least 500 characters and ends at the end of a line or word.
_BLOCK = re.compile(r"(?s).{500}.*?(?:(?<=\n)|(?<! )(?= )|\Z)|.+")
_AS_LINE_ENDS = str.maketrans(dict.fromkeys(RESERVED, "\n"))
_ACROSS = re.compile(rf"(?s)\n.|.\n|[^{SPACE}]{SPACE}")  # matches a piece that can cross the border of two blocks


class TextTokenizer:
    """Text to ids in [0, size) and back.

    Args:
      model_bytes: a serialised SentencePiece model.
      lossy: what to do with a model that loses text (because of a normaliser such as nmt_nfkc, a dummy prefix, or no
        byte fallback): "refuse" it, or "warn": accept it, and list the losses in `losses`.
      text_ids: the ids that text may be encoded with; other user-defined symbols are never used. None: all ids.

    Attributes:
      losses: the ways in which the model loses text; empty for models from `train`.
      size: the number of ids.
      hash: sha256 of the model.
      model_bytes: the model.

    Raises:
      ValueError: the bytes are not a SentencePiece model, or the model loses text and `lossy` does not allow it.
    """

    file = SENTENCEPIECE

    def __init__(self, model_bytes: bytes, *, lossy: Lossy = "refuse", text_ids: Collection[int] | None = None) -> None:
        if lossy not in ("refuse", "warn"):
            raise ValueError(f"lossy: expected refuse or warn, got {lossy!r}")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
            self._model = model_bytes if text_ids is None else only_spelling(model_bytes, text_ids)
            if self._model != model_bytes:
                self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise ValueError(f"these {len(model_bytes)} bytes are not a SentencePiece model: {error}") from error
        self.model_bytes = model_bytes
        self.hash = hashlib.sha256(model_bytes).hexdigest()
        self.size = int(self._processor.get_piece_size())
        pieces = [self._processor.id_to_piece(i) for i in range(self.size)]
        spelled = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_as_bytes = spelled if all(map(self._processor.is_byte, spelled)) else []
        self._in_blocks = False
        self.losses: tuple[Loss, ...] = find_losses(model_bytes, self.encode, self.decode)
        if self.losses and lossy == "refuse":
            raise ValueError(refusal(self.losses))
        # If no piece crosses the end of a word or line, text before that border does not change the ids after it.
        self._in_blocks = is_bpe(model_bytes) and not self.losses and not any(map(_ACROSS.search, pieces))

    @functools.cached_property
    def piece_bytes(self) -> np.ndarray:
        """int32 [size]: the number of UTF-8 bytes that each id stands for, needed to convert nats per token to bits per
        byte."""
        processor = self._processor
        return np.array(
            [
                0
                if processor.is_unknown(i) or processor.is_control(i)
                else 1
                if processor.is_byte(i)
                else len(processor.id_to_piece(i).replace(SPACE, " ").encode())
                for i in range(self.size)
            ],
            np.int32,
        )

    def is_byte(self, id: int) -> bool:
        """Whether an id stands for one byte of a character that has no piece."""
        return bool(self._processor.is_byte(id))

    @property
    def data(self) -> bytes:
        """The content of the tokenizer's file: the model."""
        return self.model_bytes

    @property
    def symbols(self) -> list[str]:
        """User-defined symbols that text can spell (`lossless.reachable_symbols`)."""
        return reachable_symbols(self._model)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in [0, size). Only a model that loses text produces <unk>.

        SentencePiece's time for BPE grows faster than the length of the text, so long texts are encoded in blocks of
        words. The ids are the same, and encoding is 2.6 times as fast (experiments/benchmarks/text_tokenizer.py).

        Raises:
          ValueError: the text has a surrogate, which is no character and has no UTF-8 form.
        """
        try:
            if SPACE not in text or not self._space_as_bytes:
                return self._encode(text)
            first, *rest = map(self._encode, text.split(SPACE))
            return first + [id for part in rest for id in (*self._space_as_bytes, *part)]
        except (RuntimeError, UnicodeEncodeError) as error:
            refuse_surrogates(text)
            raise ValueError(f"SentencePiece refused {text[:80]!r}: {error}") from error

    def _encode(self, text: str) -> list[int]:
        if len(text) <= 500 or not self._in_blocks:
            return self._processor.encode(text)
        return [id for block in _BLOCK.findall(text) for id in self._processor.encode(block)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of any ids in [0, size). Bytes that are not UTF-8, and <unk>, become U+FFFD.

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
        model_type: ModelType = "bpe",
        character_coverage: float = 0.99995,
        max_bytes: int = 100_000_000,
    ) -> TextTokenizer:
        """Trains a tokenizer. The same texts, settings and SentencePiece version give the same model, byte for byte.

        Args:
          texts: are read once, and may be larger than memory. Only a random sample is kept; long texts are cut into
            parts of 65,536 characters before sampling.
          vocab_size: the largest number of pieces. A corpus with fewer possible pieces gives a smaller `size` and no
            error.
          model_type: "bpe", or "unigram" (many times slower).
          character_coverage: the share of characters that get a piece; others are encoded as bytes without loss.
          max_bytes: how many bytes of text are kept. Peak memory is this number times 22 (bpe) or 31 (unigram) for
            text made of words. For random Chinese characters, the worst case of text without spaces, it is this number
            times 93 or 19 (experiments/benchmarks/text_tokenizer.py).

        Raises:
          ValueError: there is no text, or only line ends, tabs and the like; a text has a surrogate; or vocab_size is
            too small for the 259 fixed pieces and the characters.
        """
        model, kept = io.BytesIO(), _draw(texts, max_bytes)
        if not kept:
            raise ValueError("there is no text to train a tokenizer on: every text is empty")
        if not any(text.strip("\n\t\0") for text in kept):
            signs = " and ".join(f"U+{ord(sign):04X}" for sign in RESERVED)
            raise ValueError(
                f"there is nothing to learn from {len(kept)} texts: they contain only line ends, tabs, NUL, and "
                f"{signs}, which SentencePiece reserves"
            )
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(kept),
                model_writer=model,
                model_type=model_type,
                vocab_size=max(vocab_size, 1),  # with less than 1, SentencePiece does not say how many it needs
                hard_vocab_limit=False,
                normalization_rule_name="identity",
                byte_fallback=True,
                split_digits=True,
                # Pieces that cross spaces (SuperBPE, arXiv:2503.13423) give fewer tokens. But if "red star" is one
                # piece, it shares nothing with "red circle", and a small model does not learn to find the star.
                split_by_whitespace=True,
                allow_whitespace_only_pieces=True,
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                required_chars=SPACE,  # spaces need a piece even if the corpus has none
                character_coverage=character_coverage,
                # Line ends and tabs get their own pieces, because learned pieces would join them with words.
                user_defined_symbols=["\n", "\t"],
                unk_id=0,
                unk_surface="\ufffd",
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                max_sentence_length=4 * _LONGEST,  # in bytes
                minloglevel=2,
            )
        except RuntimeError as error:
            if found := re.search(r"required_chars\. (\d+) vs (\d+)", str(error)):
                raise ValueError(
                    f"vocab_size {vocab_size} is too small: this corpus needs at least {found[2]} (259 fixed pieces "
                    "and its characters). Raise vocab_size or lower character_coverage"
                ) from error
            raise ValueError(f"SentencePiece could not train on {len(kept)} texts: {error}") from error
        return cls(model.getvalue())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to one file, completely or not at all."""
        write_bytes(path, self.model_bytes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, lossy: Lossy = "refuse") -> TextTokenizer:
        """Reads a file that `save` wrote, or any SentencePiece model. Raises OSError, or ValueError with the file's
        name."""
        try:
            return cls(Path(path).read_bytes(), lossy=lossy)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def _draw(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Returns the texts in parts of at most _LONGEST characters, in order: all of them, or a random sample of at least
    one part if they have more than max_bytes.

    The sample consists of the parts with the smallest random numbers, so memory never holds more than the sample.
    """
    kept: list[tuple[float, int, str]] = []  # a heap, the largest number first
    size, random_number = 0, random.Random(0).random
    for place, part in enumerate(_parts(texts)):
        heapq.heappush(kept, (-random_number(), place, part))
        size += len(part.encode())
        while size > max_bytes and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode())
    return [part for _, part in sorted((place, part) for _, place, part in kept)]


def _parts(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        refuse_surrogates(text)
        text = text.translate(_AS_LINE_ENDS) if any(character in text for character in RESERVED) else text
        yield from (text[start : start + _LONGEST] for start in range(0, len(text), _LONGEST))
