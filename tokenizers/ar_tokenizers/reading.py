"""Reads any text tokenizer from its file."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ar_tokenizers.codec import Codec, Lossy
from ar_tokenizers.published import PublishedTokenizer
from ar_tokenizers.text import TextTokenizer


def codec(file: str, data: bytes, *, lossy: Lossy = "refuse", text_ids: Collection[int] | None = None) -> Codec:
    """The tokenizer in `data`. The file's name says its format: *.json, *.tiktoken, or else SentencePiece.

    text_ids: the ids that text may be encoded with; None means all ids that the file allows for text. Raises ValueError
    if the data is not a tokenizer, or if it loses text and `lossy` does not allow that.
    """
    if file.endswith(".json"):
        return PublishedTokenizer.from_json(data, lossy=lossy, text_ids=text_ids)
    if file.endswith(".tiktoken"):
        return PublishedTokenizer.from_tiktoken(data, lossy=lossy, text_ids=text_ids)
    return TextTokenizer(data, lossy=lossy, text_ids=text_ids)


def load_codec(path: str | os.PathLike[str], *, lossy: Lossy = "refuse") -> Codec:
    """Calls `codec` with a file's content. Raises OSError, or ValueError with the file's name."""
    try:
        return codec(os.path.basename(path), Path(path).read_bytes(), lossy=lossy)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
