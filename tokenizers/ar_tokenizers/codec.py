"""The interface of every text tokenizer, ours and the published ones; and which file of a folder is one.

A folder has at most one of the files `FILES`, byte for byte as it was made or published.
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
      size: how many ids there are, including those that no text is spelled with.
      hash: sha256 of all that decides which ids a text gets.
      losses: how it loses text; none: decode(encode(text)) == text for every text without surrogates.
      file, data: its file's name, one of FILES, and what is in it.
      symbols: pieces that text can spell but that weights may have learned to treat as commands.
      piece_bytes: int32 [size], UTF-8 bytes of text that each id stands for; 0 for those of no text.
    """

    @property
    def size(self) -> int:
        """How many ids there are."""

    @property
    def hash(self) -> str:
        """sha256 of all that decides which ids a text gets."""

    @property
    def losses(self) -> tuple[Loss, ...]:
        """How it loses text; none: it does not."""

    @property
    def file(self) -> str:
        """The name of its file, one of FILES."""

    @property
    def data(self) -> bytes:
        """What is in that file."""

    @property
    def symbols(self) -> list[str]:
        """Special-looking pieces that text can spell."""

    @property
    def piece_bytes(self) -> np.ndarray:
        """int32 [size], UTF-8 bytes that each id stands for."""

    def encode(self, text: str, /) -> list[int]:
        """Raises ValueError for a text with a surrogate."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Bytes that are no UTF-8 come back as U+FFFD. Raises ValueError for an id that is none."""

    def is_byte(self, id: int, /) -> bool:
        """Whether an id stands for one byte of a character that has no piece."""


def find(folder: Path) -> Path | None:
    """The file of a folder's text tokenizer; None if there is none. Raises ValueError for more than one."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder}: expected one text tokenizer, found {' and '.join(path.name for path in found)}")
    return found[0] if found else None


def refuse_surrogates(text: str) -> None:
    """Raises ValueError, with its position, for a character that has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"position {error.start} of {text[:80]!r} is the surrogate U+{ord(text[error.start]):04X}, "
            "which is no character; decode the text's source with errors='replace' or leave it out"
        ) from error
