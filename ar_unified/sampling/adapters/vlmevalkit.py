"""OpenCompass' VLMEvalKit (from its repository): one prompt at a time.

from ar_unified.sampling.adapters.vlmevalkit import EngineVLM
vlmeval.config.supported_VLM["ours"] = lambda: EngineVLM(engine, image_tokenizer)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from vlmeval.vlm.base import BaseModel

from ar_unified.data import images
from ar_unified.data.images import ImageCodec
from ar_unified.sampling.adapters.model import Model
from ar_unified.sampling.engine import Engine


class EngineVLM(BaseModel):
    """An engine as the kit's model; arguments as those of `adapters.model.Model`, `settings` as those of `answers`."""

    INTERLEAVE = True
    allowed_types = ["text", "image"]

    def __init__(
        self,
        engine: Engine,
        image_tokenizer: ImageCodec,
        resize: Callable[[np.ndarray], np.ndarray] | None = None,
        **settings: Any,
    ):
        super().__init__()
        self._model, self._settings = Model(engine, image_tokenizer, resize), settings

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to [{"type": "text" | "image", "value": a text or a file}]; `dataset` changes nothing."""
        content = [part["value"] if part["type"] == "text" else _picture(part["value"]) for part in message]
        return self._model.answers([(content, self._settings)])[0]


def _picture(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return Image.fromarray(images.decode(file.read()))
