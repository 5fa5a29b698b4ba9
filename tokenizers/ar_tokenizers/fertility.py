"""Counts how many tokens a text tokenizer needs for texts, and checks whether decoding restores the texts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ar_tokenizers.codec import Codec


@dataclass
class Fertility:
    """Counts over the texts of one language or source.

    For parallel texts, compare `tokens` of two languages to see how many more tokens one of them needs
    (arXiv:2305.15425).

    Attributes:
      bytes, characters, tokens: the numbers of UTF-8 bytes, Unicode code points and ids.
      byte_tokens: the number of ids that stand for one byte of a character without a piece.
      failed: the number of texts that decoding does not restore.
      first_failure: a dict about the first text that decoding does not restore; empty if there is none. "origin" is
        where the text is from; "text" and "back" are its part around the first difference, before encoding and after
        decoding.
    """

    texts: int = 0
    bytes: int = 0
    characters: int = 0
    tokens: int = 0
    byte_tokens: int = 0
    failed: int = 0
    first_failure: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float:
        """The mean number of UTF-8 bytes per token; 0 without text."""
        return self.bytes / max(self.tokens, 1)

    @property
    def tokens_per_character(self) -> float:
        """The mean number of tokens per character; 0 without text."""
        return self.tokens / max(self.characters, 1)

    @property
    def byte_share(self) -> float:
        """The share of tokens that stand for one byte."""
        return self.byte_tokens / max(self.tokens, 1)

    def add(self, tokenizer: Codec, text: str, origin: str = "") -> None:
        """Counts one text. Raises ValueError for a text with a surrogate."""
        ids = tokenizer.encode(text)
        self.texts += 1
        self.bytes += len(text.encode())
        self.characters += len(text)
        self.tokens += len(ids)
        self.byte_tokens += sum(map(tokenizer.is_byte, ids))
        if (back := tokenizer.decode(ids)) != text:
            self.failed += 1
            at = len(os.path.commonprefix([text, back]))
            shown = slice(max(0, at - 10), at + 30)
            self.first_failure = self.first_failure or dict(origin=origin, text=text[shown], back=back[shown])

    def to_json(self) -> dict[str, object]:
        """Every count and ratio as JSON values."""
        ratios = ("bytes_per_token", "tokens_per_character", "byte_share")
        return vars(self) | {name: round(getattr(self, name), 4) for name in ratios}


def table(rows: Mapping[str, Fertility]) -> str:
    """A table with one line per name. Below, each name with failed texts has one more line, which shows the first
    failed text."""
    width = max([8, *map(len, rows)])
    lines = [f"{'':<{width}}     bytes    tokens  bytes/token  tokens/char  byte tokens  come back"]
    for name, row in rows.items():
        back = "all" if not row.failed else f"{row.texts - row.failed} of {row.texts}"
        lines.append(
            f"{name:<{width}} {row.bytes:>9} {row.tokens:>9}  {row.bytes_per_token:>11.2f}  "
            f"{row.tokens_per_character:>11.3f}  {row.byte_share:>10.2%}   {back}"
        )
    for name, row in rows.items():
        if row.failed:
            lines.append("{}: {origin}: {text!r} comes back as {back!r}".format(name, **row.first_failure))
    return "\n".join(lines)
