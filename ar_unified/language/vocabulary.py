"""The single id space, and the manifest that every artefact stores to identify it.

    [ text pieces | control tokens | size tokens 1..size_tokens | image codes | rest ], padded to a multiple of 128

The range of an id decides its role, so roles need no table and work inside a traced function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from ar_unified.manifests import Json, ManifestMismatch, require_same

VERSION = 2
CONTROLS = ("pad", "bos", "eos", "eot", "boi", "eoi", "eol")  # of our own layouts; eot ends a question
_ALIGNMENT = 128  # the logits' last axis then tiles and shards evenly


class Role(IntEnum):
    """What a token is used for. Each role has its own loss weight and metrics; PAD has neither."""

    PAD = 0
    TEXT = 1
    CONTROL = 2
    SIZE = 3
    IMAGE = 4


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the ranges, and hashes of the two tokenizers that they belong to. It is hashable, so it can be a
    static argument of jit.

    Attributes:
        text_size: number of text pieces; they keep the ids of the text tokenizer, 0..text_size-1.
        codebook_size: number of image codes; 0 means only text.
        size_tokens: number of size tokens; token n means a side of n units (`layouts.SizeTokens`). 0 if the layout has
            none.
        text_hash, image_hash: hashes of the tokenizers ("" if there is none yet).
        controls: names of the control tokens, in order; "pad", "bos" and "eos" among them.
        rest: how many ids after the image codes are never written but are part of the softmax, such as ids of a
            published table that its tokenizer never produces. None means as many as fill the padded width.

    Raises:
        ValueError: if a size is out of range, a control occurs twice, or "pad", "bos" or "eos" is missing.
    """

    text_size: int
    codebook_size: int
    size_tokens: int = 0
    text_hash: str = ""
    image_hash: str = ""
    controls: tuple[str, ...] = CONTROLS
    rest: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("text_size", 1), ("codebook_size", 0), ("size_tokens", 0), ("rest", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")
        if len(set(self.controls)) < len(self.controls) or not {"pad", "bos", "eos"} <= set(self.controls):
            raise ValueError(f"controls: expected pad, bos and eos, and each control only once; found {self.controls}")

    def control(self, name: str) -> int:
        """The id of a control token. Raises ValueError, which lists the control tokens that exist."""
        if name not in self.controls:
            raise ValueError(f"this vocabulary has no control token {name!r}, only {', '.join(self.controls)}")
        return self.text_size + self.controls.index(name)

    pad = property(lambda self: self.control("pad"))
    bos = property(lambda self: self.control("bos"))
    eos = property(lambda self: self.control("eos"))

    @property
    def control_offset(self) -> int:
        """Id of the first control token."""
        return self.text_size

    @property
    def size_offset(self) -> int:
        """Id of the size token for one unit."""
        return self.text_size + len(self.controls)

    @property
    def image_offset(self) -> int:
        """Id of image code 0."""
        return self.size_offset + self.size_tokens

    @property
    def rest_offset(self) -> int:
        """Id after the last image code."""
        return self.image_offset + self.codebook_size

    @property
    def used(self) -> int:
        """Number of ids that have a probability. The rows of the head after these are padding."""
        return self.size if self.rest is None else self.rest_offset + self.rest

    @property
    def size(self) -> int:
        """`used`, padded: the number of rows of the embedding table and of the head."""
        return -(-(self.rest_offset + (self.rest or 0)) // _ALIGNMENT) * _ALIGNMENT

    def role(self, ids: Any) -> Any:
        """The Role of every id, int32 of the same shape. Takes numpy or (traced) jax arrays and returns the same kind.

        The role depends only on the id, so digits of a size are TEXT here, while `Encoded.roles` gives SIZE. Ids that
        are never written (negative, rest, beyond the end) have role PAD.
        """

        def inside(role: Role) -> Any:
            there = self.ids(role)
            return (ids >= there.start) & (ids < there.stop) & (ids != self.pad)

        # The ranges are disjoint, so a sum selects the range of the id.
        return sum(inside(role).astype(np.int32) * np.int32(role) for role in Role if role != Role.PAD)

    def ids(self, role: Role) -> range:
        """All ids of a role. PAD has one id, which is a control token."""
        offsets = (0, self.control_offset, self.size_offset, self.image_offset, self.rest_offset)
        return range(self.pad, self.pad + 1) if role == Role.PAD else range(offsets[role - 1], offsets[role])

    def name(self, token: int) -> str:
        """An id in words, for messages: "<boi>", "text piece 17", "size 4", "image code 3"."""
        if 0 <= token < self.text_size:
            return f"text piece {token}"
        if self.control_offset <= token < self.size_offset:
            return f"<{self.controls[token - self.control_offset]}>"
        if self.size_offset <= token < self.image_offset:
            return f"size {token - self.size_offset + 1}"
        if self.image_offset <= token < self.rest_offset:
            return f"image code {token - self.image_offset}"
        return f"id {token}, which no document contains"

    def manifest(self) -> dict[str, Json]:
        """Everything that two artefacts must agree on, as JSON values. `Grammar.manifest` adds to it."""
        return {
            "version": VERSION,
            "text_size": self.text_size,
            "text_hash": self.text_hash,
            "codebook_size": self.codebook_size,
            "image_hash": self.image_hash,
            "size_tokens": self.size_tokens,
            "controls": {name: self.control(name) for name in self.controls},
            "offsets": {
                "text": 0,
                "control": self.control_offset,
                "size": self.size_offset,
                "image": self.image_offset,
                "rest": self.rest_offset,
            },
            "used": self.used,
            "size": self.size,
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary that a manifest describes.

        Raises:
            ManifestMismatch: if a field is missing, or this version would assign ids that differ from the manifest's.
        """
        fields = ("text_size", "codebook_size", "size_tokens", "text_hash", "image_hash")
        for name in (*fields, "controls", "used", "size"):
            if name not in manifest:
                raise ManifestMismatch(name, f"manifest has no {name!r}: it is not a vocabulary manifest")
        vocabulary = cls(**{name: manifest[name] for name in fields}, controls=tuple(manifest["controls"]))
        if manifest["used"] != vocabulary.used:
            vocabulary = cls(
                **{name: manifest[name] for name in fields},
                controls=vocabulary.controls,
                rest=max(0, manifest["used"] - vocabulary.rest_offset),
            )
        ours = vocabulary.manifest()
        found = {key: value for key, value in manifest.items() if key in ours}
        require_same(ours, found, expected_from="this version of ar_unified", found_from="manifest")
        return vocabulary
