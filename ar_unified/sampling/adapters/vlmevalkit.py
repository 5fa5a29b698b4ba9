"""OpenCompass' VLMEvalKit (from its repository): one prompt at a time.

from ar_unified.sampling.adapters.vlmevalkit import EngineVLM
vlmeval.config.supported_VLM["ours"] = lambda: EngineVLM(ar_unified.load("bundle"))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from vlmeval.vlm.base import BaseModel

from ar_unified.data import images
from ar_unified.sampling.adapters.harness import Harness
from ar_unified.sampling.model import Model


class EngineVLM(BaseModel):
    """Wraps a model for VLMEvalKit. `settings` are the settings that `Harness.answers` reads."""

    INTERLEAVE = True
    allowed_types = ["text", "image"]

    def __init__(self, model: Model, **settings: Any):
        super().__init__()
        self._model, self._settings = Harness(model), settings

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to [{"type": "text" | "image", "value": a text or a file}]; `dataset` is ignored."""
        content = [part["value"] if part["type"] == "text" else _image(part["value"]) for part in message]
        return self._model.answers([(content, self._settings)])[0]


def _image(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return Image.fromarray(images.decode(file.read()))
