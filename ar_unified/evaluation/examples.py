"""The questions to a model in an evaluation, its answers, and their scores. `Codec` converts images to codes and back.

Axes: H, W height and width of an image in pixels, h, w in codes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ar_tokenizers.image.metrics import psnr

from ar_unified.data.images import ImageCodec, by_size, draws_none
from ar_unified.language.document import CodesPart, Document, ImagePart, Part

KINDS = ("text_to_image", "edit", "image_to_text", "caption", "story", "next_image", "next_text")  # kinds of questions
ANSWERED_IN_WORDS = ("image_to_text", "caption", "next_text")


@dataclass(frozen=True)
class Example:
    """One question put to the model.

    Attributes:
        kind: one of KINDS, or "turn".
        document: the held-out document.
        prompt: the parts shown to the model, with images as pixels.
        expected: the real image, uint8 [H, W, 3], or the text.
        got: the model's image or text; None if it did not parse.
        reconstruction: the image tokenizer's reconstruction of an expected image.
        correct: whether the checker says that the answer is right; None without a checker.
    """

    kind: str
    document: Document
    prompt: tuple[Part, ...]
    expected: np.ndarray | str
    got: np.ndarray | str | None = None
    reconstruction: np.ndarray | None = None
    correct: bool | None = None


@dataclass
class Scores:
    """For each metric, how many answers were right and how many questions were asked."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    psnr: list[float] = field(default_factory=list)  # PSNR in dB of the images that were compared with the real image

    def add(self, name: str, ok: bool) -> None:
        """Counts one question for the metric `name`, and its answer if it is right."""
        self.asked[name] += 1
        self.right[name] += bool(ok)

    def metrics(self) -> dict[str, Any]:
        """{name: share of right answers, ..., "counts": {name: number of questions}}."""
        shares = {name: self.right[name] / n for name, n in self.asked.items()}
        return {**shares, "counts": dict(self.asked)}


class Codec:
    """Converts pixels to codes and back, in batches of images of one size, and remembers the results. Without a
    decoder, it only makes codes."""

    def __init__(self, tokenizer: ImageCodec):
        self.tokenizer, self.draws = tokenizer, not draws_none(tokenizer)
        self.codes: dict[str, np.ndarray] = {}  # by the hash of the pixels
        self.pixels: dict[str, np.ndarray] = {}  # by the hash of the codes
        self.psnr: list[float] = []  # PSNR in dB of each learnt image's reconstruction

    def learn_pixels(self, images: Iterable[np.ndarray]) -> None:
        """Encodes uint8 [H, W, 3] images, and decodes their codes, too."""
        new = {_key(image): image for image in images}
        self.codes.update(zip(new, by_size(self.tokenizer.encode, list(new.values())), strict=True))
        if not self.draws:
            return
        self.learn_codes(self.codes[key] for key in new)
        self.psnr += [float(psnr(image, self.decode(self.codes[key]))) for key, image in new.items()]

    def learn_codes(self, codes: Iterable[np.ndarray]) -> None:
        """Decodes int32 [h, w] codes."""
        new = {_key(c): c for c in codes}
        new = {key: c for key, c in new.items() if key not in self.pixels}
        self.pixels.update(zip(new, by_size(self.tokenizer.decode, list(new.values())), strict=True))

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """The codes, int32 [h, w], of pixels that were given to `learn_pixels`."""
        return self.codes[_key(pixels)]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The pixels, uint8 [H, W, 3], of codes that were given to `learn_codes`."""
        return self.pixels[_key(codes)]

    def encoded(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """The parts with codes in place of pixels. The pixels must have been given to `learn_pixels`."""
        return tuple(CodesPart(self.encode(part.pixels)) if isinstance(part, ImagePart) else part for part in parts)


def _key(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
