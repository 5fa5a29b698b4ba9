"""The interface of all text tokenizers, ours and published ones. `find` finds the tokenizer's file in a folder.

A folder has at most one of the files in `FILES`. This file has exactly the bytes that were made or published.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ar_tokenizers.lossless import Loss

Lossy = Literal["refuse", "warn"]

SENTENCEPIECE, JSON, TIKTOKEN = FILES = ("text.model", "tokenizer.json", "text.tiktoken")


class Codec(Protocol):
    """Text to ids in [0, size) and back.

    Attributes:
      size: the number of ids, including ids that encoding never produces.
      hash: sha256 of everything that determines the ids of a text.
      losses: the ways in which the tokenizer loses text. If empty, decode(encode(text)) == text for every text without
        surrogates.
      file, data: the name of its file, one of FILES, and the file's content.
      symbols: special-looking pieces that text can spell. A language model may have learned to treat them as commands.
      piece_bytes: int32 [size], the number of UTF-8 bytes of text that each id stands for; 0 for ids that stand for no
        text.
    """

    @property
    def size(self) -> int:
        """How many ids there are."""

    @property
    def hash(self) -> str:
        """sha256 of everything that determines the ids of a text."""

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The ways in which the tokenizer loses text; empty if there are none."""

    @property
    def file(self) -> str:
        """The name of the tokenizer's file, one of FILES."""

    @property
    def data(self) -> bytes:
        """The content of the tokenizer's file."""

    @property
    def symbols(self) -> list[str]:
        """Special-looking pieces that text can spell."""

    @property
    def piece_bytes(self) -> np.ndarray:
        """int32 [size], the number of UTF-8 bytes that each id stands for."""

    def encode(self, text: str, /) -> list[int]:
        """The ids of a text. Raises ValueError for a text with a surrogate."""

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD. Raises ValueError for an invalid id."""

    def is_byte(self, id: int, /) -> bool:
        """Whether an id stands for one byte of a character that has no piece."""


def find(folder: Path) -> Path | None:
    """The file of the text tokenizer in a folder, or None. Raises ValueError if the folder has several."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"{folder}: expected one text tokenizer, found {names}: keep one of these files")
    return found[0] if found else None


def refuse_surrogates(text: str) -> None:
    """Raises ValueError for a character that has no UTF-8 form. The message names its position."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"position {error.start} of {text[:80]!r} is the surrogate U+{ord(text[error.start]):04X}, "
            "which is not a character; decode the text's source with errors='replace', or leave the text out"
        ) from error
