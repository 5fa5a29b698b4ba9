"""The one id space and the manifest that ties every artefact to it.

    [ text pieces | control tokens | side lengths 1..max_side | image codes | reserved, to a multiple of 128 ]

A token's role follows from the range its id lies in: roles need no table and work inside a traced function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from ar_unified.manifests import ManifestMismatch, require_same

VERSION = 1
CONTROLS = ("pad", "bos", "eos", "eot", "boi", "eoi", "eol")  # eot: end of turn, between prompt and answer
_ALIGNMENT = 128  # so that the logits' last axis tiles and shards evenly


class Role(IntEnum):
    """What a token is for. Loss weights and metrics are per role; PAD has neither."""

    PAD = 0
    TEXT = 1
    CONTROL = 2
    SIZE = 3
    IMAGE = 4


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the ranges, and hashes of the two tokenizers they belong to. Hashable: a static jit argument.

    Attributes:
        text_size: number of text pieces; their ids are those of the text tokenizer, 0..text_size-1.
        codebook_size: number of image codes; 0: text alone.
        max_side: largest height or width, in codes, that a size token can say; 0 for layouts without sizes.
        text_hash, image_hash: of the tokenizers ("" where there is none yet).

    Raises:
        ValueError: a size out of range.
    """

    text_size: int
    codebook_size: int
    max_side: int = 0
    text_hash: str = ""
    image_hash: str = ""

    def __post_init__(self) -> None:
        for name, least in (("text_size", 1), ("codebook_size", 0), ("max_side", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, found {getattr(self, name)}")

    def _control(self, name: str) -> int:
        return self.text_size + CONTROLS.index(name)

    pad = property(lambda self: self._control("pad"))
    bos = property(lambda self: self._control("bos"))
    eos = property(lambda self: self._control("eos"))
    eot = property(lambda self: self._control("eot"))
    boi = property(lambda self: self._control("boi"))
    eoi = property(lambda self: self._control("eoi"))
    eol = property(lambda self: self._control("eol"))

    @property
    def size_offset(self) -> int:
        """Id of side length 1."""
        return self.text_size + len(CONTROLS)

    @property
    def image_offset(self) -> int:
        """Id of image code 0."""
        return self.size_offset + self.max_side

    @property
    def used(self) -> int:
        """Number of ids without the reserved ones, which stand behind them."""
        return self.image_offset + self.codebook_size

    @property
    def size(self) -> int:
        """Number of ids, reserved ones included: the width of the embedding table and of the logits."""
        return -(-self.used // _ALIGNMENT) * _ALIGNMENT

    def role(self, ids: Any) -> Any:
        """The Role of every id, int32 of the same shape; numpy in, numpy out; traced jax arrays likewise.

        Ids that are never produced (negative, reserved, beyond the end) have role PAD.
        """
        text = (ids >= 0) & (ids < self.text_size)
        control = (ids > self.pad) & (ids < self.size_offset)
        side = (ids >= self.size_offset) & (ids < self.image_offset)
        image = (ids >= self.image_offset) & (ids < self.image_offset + self.codebook_size)
        roles = ((text, Role.TEXT), (control, Role.CONTROL), (side, Role.SIZE), (image, Role.IMAGE))
        # The ranges are disjoint, so a sum picks the one that holds.
        return sum(inside.astype(np.int32) * np.int32(role) for inside, role in roles)

    def name(self, token: int) -> str:
        """An id in words, for messages: "<boi>", "text piece 17", "side 4", "image code 3"."""
        if 0 <= token < self.text_size:
            return f"text piece {token}"
        if self.text_size <= token < self.size_offset:
            return f"<{CONTROLS[token - self.text_size]}>"
        if self.size_offset <= token < self.image_offset:
            return f"side {token - self.size_offset + 1}"
        if self.image_offset <= token < self.image_offset + self.codebook_size:
            return f"image code {token - self.image_offset}"
        return f"id {token}, which nothing uses"

    def manifest(self) -> dict[str, Any]:
        """Everything two artefacts must agree on, as JSON values. `Grammar.manifest` adds "grammar" to it."""
        return {
            "version": VERSION,
            "text_size": self.text_size,
            "text_hash": self.text_hash,
            "codebook_size": self.codebook_size,
            "image_hash": self.image_hash,
            "max_side": self.max_side,
            "controls": {name: self._control(name) for name in CONTROLS},
            "offsets": {"text": 0, "control": self.pad, "size": self.size_offset, "image": self.image_offset},
            "size": self.size,
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary a manifest describes.

        Raises:
            ManifestMismatch: a field is missing, or this version would give out other ids than it says.
        """
        fields = ("text_size", "codebook_size", "max_side", "text_hash", "image_hash")
        for name in fields:
            if name not in manifest:
                raise ManifestMismatch(name, f"manifest has no {name!r}: it is not a vocabulary manifest")
        vocabulary = cls(**{name: manifest[name] for name in fields})
        found = {key: value for key, value in manifest.items() if key != "grammar"}
        here = "this version of ar_unified"
        require_same(vocabulary.manifest(), found, expected_from=here, found_from="manifest")
        return vocabulary
