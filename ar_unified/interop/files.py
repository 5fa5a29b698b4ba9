"""Finds the config, the text tokenizer and the weights among the files of a download."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from ar_tokenizers.codec import Codec
from ar_tokenizers.reading import load_codec

from ar_unified.errors import UserError, about
from ar_unified.interop.ids import Language
from ar_unified.interop.sources import Source, inside, open_source, read_json
from ar_unified.language.border import MappedCodec
from ar_unified.language.grammar import Grammar

_KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_TOKENIZERS = ("tokenizer.json", "text_tokenizer.json", "emu3.tiktoken", "tokenizer.model", "text.tiktoken")


class Files:
    """The arguments of `ar-unified import`, and which of them were read.

    Args:
        folder: the folder of the weights.
        text, image: files or folders of the tokenizers, if they are elsewhere.
        theta: RoPE's base, if the files do not say it.
        size: height and width of the largest image, in codes.
    """

    def __init__(
        self,
        folder: Path,
        text: Path | None = None,
        image: Path | None = None,
        theta: float | None = None,
        size: tuple[int, int] | None = None,
    ):
        self.folder = folder
        self._given = {"text": text, "image": image, "theta": theta, "size": size}
        self._read: set[str] = set()

    def _take(self, name: str) -> Any:
        self._read.add(name)
        return self._given[name]

    text: Path | None = property(lambda self: self._take("text"))  # type: ignore[assignment]
    image: Path | None = property(lambda self: self._take("image"))  # type: ignore[assignment]
    theta: float | None = property(lambda self: self._take("theta"))  # type: ignore[assignment]
    size: tuple[int, int] | None = property(lambda self: self._take("size"))  # type: ignore[assignment]

    def require_read(self) -> None:
        """Raises UserError for an argument that was given but not read. Call it after the model was opened."""
        flags = {"theta": "--rope-theta"}
        if unread := [name for name, value in self._given.items() if value is not None and name not in self._read]:
            raise UserError(
                f"{flags.get(unread[0], f'--{unread[0]}')} does nothing for {self.folder}, because the files there "
                "already give this value or do not need it: leave the flag out"
            )

    @cached_property
    def source(self) -> Source:
        """The tensors of the folder. Raises UserError if they cannot be read."""
        return open_source(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises UserError if it cannot be read."""
        return read_json(self.find("config.json"))

    def find(self, *names: str, folder: Path | None = None) -> Path:
        """The path of the first of these files that exists. Raises UserError if none exists."""
        folder = folder or (self.folder if self.folder.is_dir() else self.folder.parent)
        for name in names:
            if (folder / name).exists():
                return inside(folder, name)
        raise UserError(f"{folder}: expected {' or '.join(names)}, found none")

    @cached_property
    def text_file(self) -> Path:
        """The text tokenizer's file. Raises UserError if there is none."""
        if self.text is not None and self.text.is_file():
            return self.text
        try:
            return self.find(*_TOKENIZERS, folder=self.text)
        except UserError as error:
            raise UserError(f"{error}; if the text tokenizer is elsewhere, name it with --text") from error

    @cached_property
    def codec(self) -> Codec:
        """The text tokenizer, with the published ids."""
        with about("text tokenizer"):
            return load_codec(self.text_file, lossy="warn")

    @cached_property
    def text_ids(self) -> list[int]:
        """Published ids that stand for text, ascending."""
        return np.flatnonzero(self.codec.piece_bytes).tolist()

    @cached_property
    def names(self) -> Mapping[str, int]:
        """The published id of each token by its name. Raises UserError for a file that is no text tokenizer."""
        data = self.codec.data  # this opens the file, and raises if something is wrong with it
        if self.text_file.suffix == ".json":
            spec = read_json(self.text_file)
            model, added = spec.get("model"), spec.get("added_tokens")
            vocab = model.get("vocab") if isinstance(model, dict) else None
            if not isinstance(vocab, dict) or not isinstance(added, list):
                raise UserError(f"{self.text_file}: expected model.vocab and added_tokens, as in a tokenizer.json")
            return vocab | {token["content"]: token["id"] for token in added if isinstance(token, dict)}
        if self.text_file.suffix == ".model":
            processor = sentencepiece.SentencePieceProcessor(model_proto=data)
            return {processor.id_to_piece(id): id for id in range(processor.get_piece_size())}
        return {}

    def record(self) -> dict[str, object]:
        """What an export needs: the content of each JSON file that is listed in _KEPT and exists, and the name of the
        text tokenizer's file."""
        folder = self.folder if self.folder.is_dir() else self.folder.parent
        there = [name for name in _KEPT if (folder / name).exists()]
        return {
            "files": {name: read_json(inside(folder, name)) for name in there},
            "text_file": self.text_file.name,
        }

    def grammar(self, language: Language, image_hash: str = "") -> Grammar:
        """The grammar of a language. Its text tokenizer uses our ids. Warns if the tokenizer loses text."""
        vocabulary = language.vocabulary
        with about(str(self.text_file)):
            text = MappedCodec.of(
                self.text_file.name, self.codec.data, language.border, vocabulary.text_size, lossy="warn"
            )
        vocabulary = dataclasses.replace(vocabulary, text_hash=text.hash, image_hash=image_hash)
        return Grammar(vocabulary, language.layout, text)
