"""Request and Sample: the input and the output of the sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ar_unified.errors import UserError
from ar_unified.language import automaton
from ar_unified.language.document import Document, DocumentError, Part, TextPart, TokensPart, Turn, check_speakers
from ar_unified.manifests import Json
from ar_unified.sampling.decoding import Filter

MODES = {
    "text": automaton.TEXT,
    "image": automaton.IMAGE,
    "interleaved": automaton.FREE,
    "free": automaton.FREE,
}
CONTEXTS = ("empty_prompt", "bos_boi", "from_boi", "image_only", "negative_prompt")
# The settings of a request for which a config and a bundle have defaults.
DEFAULTS = (
    "guidance", "image_guidance", "context", "negative_prompt", "prompt_suffix", "repetition_penalty", "text", "image",
)  # fmt: skip
_MANY = 1 << 20  # more images than any budget allows


class RequestError(UserError):
    """One request is wrong; the rest of the job goes on."""


class TooLong(RequestError):
    """The prompt and the requested answer together exceed the engine's max_length."""


@dataclass(frozen=True)
class Request:
    """What to continue, and how.

    Attributes:
        id: names the request in samples and messages.
        parts: the prompt, which is text, images as codes of the image tokenizer, and token ids, in reading order.
        turn: whether to answer the prompt (True) or to continue the document that it begins (False).
        history: the turns before the prompt, such as a system turn, and questions with their answers.
        mode: "text": no images; "image": only images; "interleaved": text and at least one image; "free": the model
            chooses. In every mode, the grammar can parse the answer.
        n: how many samples.
        seed: 0 <= seed < 2**32; sample i of a request does not depend on n.
        max_tokens: budget of a sample, <eos> included; None: as many as its images need in mode "image", else as many
            as fit.
        stop: texts, or sequences of ids of text pieces. The answer ends before the first one that appears.
        min_images, max_images: images in a sample; None: exactly one in mode "image", at least one in "interleaved",
            any number in "free".
        image_size: (height, width) of every image in codes; None: the canvas's size, the fixed grid's, or the model's
            choice.
        canvas: int32 [h, w], codes that the first image must have, -1 where codes are drawn. This completes an image
            (its first rows are given) or repairs it (all but a hole is given).
        guidance: scale of classifier-free guidance on image codes; 1: no guidance, at no cost.
        image_guidance: a second scale, for the effect of the prompt's images alone (InstructPix2Pix, arXiv
            2211.09800). The logits become u + image_guidance (i - u) + guidance (c - i), where c are the logits of the
            request, u of `context` and i of the images alone. Chameleon uses guidance 3.0 and image_guidance 1.2.
            With 0, there is only one scale.
        context: the unconditional context of guidance, one of CONTEXTS. The current image follows it.
            "empty_prompt": <bos> <eot>, as trained by condition dropout. "bos_boi": <bos> (Chameleon, LWM).
            "from_boi": nothing (Lumina-mGPT). "image_only": the document without its text (Emu3.5).
            "negative_prompt": that text as the prompt (Emu3).
        negative_prompt: the text for the context "negative_prompt".
        prompt_suffix: a text appended to the text of a prompt for an image (mode "image", turn True), such as
            the quality words of Emu3-Gen. The unconditional contexts do not have it.
        repetition_penalty: the penalty on text pieces that the prompt or the answer already has; 1: none. Logits above
            0 are divided by it, others are multiplied by it (CTRL, arXiv 1909.05858).
        adapter: the name of one of the engine's adapters, used for drawing; "": none.
        text, image: how text (and control) tokens and image codes are drawn.
        meta: copied to the samples.
    """

    id: str
    parts: tuple[Part | TokensPart, ...]
    turn: bool = True
    history: tuple[Turn, ...] = ()
    mode: Literal["text", "image", "interleaved", "free"] = "free"
    n: int = 1
    seed: int = 0
    max_tokens: int | None = None
    stop: tuple[str | tuple[int, ...], ...] = ()
    min_images: int | None = None
    max_images: int | None = None
    image_size: tuple[int, int] | None = None
    canvas: np.ndarray | None = field(default=None, compare=False)
    guidance: float = 1.0
    image_guidance: float = 0.0
    context: Literal["empty_prompt", "bos_boi", "from_boi", "image_only", "negative_prompt"] = "empty_prompt"
    negative_prompt: str = ""
    prompt_suffix: str = ""
    repetition_penalty: float = 1.0
    adapter: str = ""
    text: Filter = Filter()
    image: Filter = Filter()
    meta: Mapping[str, Json] = field(default_factory=dict, compare=False)

    @classmethod
    def asking(cls, document: Document, **settings: Any) -> Request:
        """The request for the last answer of a document. Without turns, it is for the whole document."""
        asked = document.asked[-1].parts if document.asks else ()
        named = {"id": document.id} | settings
        return cls(parts=asked, turn=document.asks, history=document.asked[:-1], **named)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns before the answer."""
        return *self.history, Turn("user" if self.turn else "document", self.asked)  # type: ignore[arg-type]

    @property
    def asked(self) -> tuple[Part | TokensPart, ...]:
        """The prompt. In mode "image" with `turn` True, `prompt_suffix` is added if the prompt ends with text."""
        *before, last = self.parts or (None,)
        if not (self.prompt_suffix and self.turn and self.mode == "image" and isinstance(last, TextPart)):
            return self.parts
        return *before, TextPart(last.text + self.prompt_suffix)  # type: ignore[return-value]

    def check(self) -> None:
        """Raises RequestError that names the first field that no engine could serve."""
        if self.mode not in MODES:
            raise RequestError(f"mode: expected one of {', '.join(MODES)}, found {self.mode!r}")
        if self.history and not self.turn:
            raise RequestError(f"history: expected no turns with turn=false, found {len(self.history)}")
        if self.turn:
            try:
                check_speakers([*(turn.speaker for turn in self.history), "user", "assistant"])
            except DocumentError as error:
                raise RequestError(f"history: {error}") from None
        if self.n < 1:
            raise RequestError(f"n: expected at least 1 sample, found {self.n}")
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"seed: expected 0 <= seed < 2**32, found {self.seed}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens: expected at least 1, found {self.max_tokens}")
        for scale in ("guidance", "image_guidance"):
            value = getattr(self, scale)
            if not math.isfinite(value):
                raise RequestError(f"{scale}: expected a finite number, found {value}")
        if self.context not in CONTEXTS:
            raise RequestError(f"context: expected one of {', '.join(CONTEXTS)}, found {self.context!r}")
        if (self.context == "negative_prompt") != bool(self.negative_prompt):
            raise RequestError(
                'negative_prompt: expected a text if the context is "negative_prompt", and no text otherwise; '
                f"found {self.negative_prompt!r:.80} with {self.context!r}"
            )
        if self.image_guidance and self.context == "image_only":
            raise RequestError('context: expected another context with image_guidance, found "image_only"')
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise RequestError(f"repetition_penalty: expected a number > 0 (1: off), found {self.repetition_penalty}")
        if any(not stop for stop in self.stop):
            raise RequestError("stop: expected texts or lists of ids, found an empty text or list")
        self._check_images()
        try:
            self.text.check("text")
            self.image.check("image")
        except ValueError as error:
            raise RequestError(str(error)) from None

    def _check_images(self) -> None:
        least, most = self.images
        if not 0 <= least <= most or (self.mode == "image" and most < 1):
            raise RequestError(f"min_images, max_images: expected 0 <= min <= max, found {least} and {most}")
        if self.mode == "text" and least:
            raise RequestError(f'min_images: mode "text" makes no images, found {least}')
        if self.mode == "interleaved" and most < 1:
            raise RequestError('max_images: mode "interleaved" makes at least one image, found 0')
        if self.canvas is not None:
            found = f"{self.canvas.dtype} {list(self.canvas.shape)}"
            if self.canvas.dtype != np.int32 or self.canvas.ndim != 2:
                raise RequestError(f"canvas: expected codes int32 [h, w], found {found}")
            if self.mode == "text":
                raise RequestError('canvas: expected none with mode "text", which makes no images')
            if self.image_size not in (None, self.canvas.shape):
                raise RequestError(f"canvas: expected codes of image_size {self.image_size}, found {found}")

    @property
    def images(self) -> tuple[int, int]:
        """The fewest and the most images of a sample."""
        if self.mode == "text":
            return self.min_images or 0, self.max_images or 0
        least = self.min_images if self.min_images is not None else int(self.mode in ("image", "interleaved"))
        most = self.max_images if self.max_images is not None else max(least, 1) if self.mode == "image" else _MANY
        return least, most

    @property
    def contexts(self) -> int:
        """How many contexts are decoded: 1 without guidance, 2 with it, or 3 with `image_guidance`."""
        if self.mode == "text" or (self.guidance == 1 and self.image_guidance in (0, 1)):
            return 1
        return 3 if self.image_guidance else 2


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        request, index: sample `index` of `request`.
        tokens: int32 [n], the generated tokens, with <eos> unless a stop ended the sample.
        document: the document of these tokens, which has the parts after the prompt, with images as codes. None if
            there was an error.
        finish_reason: what ended the answer. "eos": the model; "length": the budget; "stop": one of `request.stop`;
            "error": see `error`.
        error: what went wrong, in words; "" if nothing.
        logprobs: float32 [n], the log-probability with which each token was drawn (`logprobs.py`), 0 where it was given
            or forced; None if the engine was not asked for them.
    """

    request: Request
    index: int
    tokens: np.ndarray
    document: Document | None
    finish_reason: Literal["eos", "length", "stop", "error"]
    error: str = ""
    logprobs: np.ndarray | None = None
