"""A stand-in for VLMEvalKit's `vlmeval.vlm.base.BaseModel`: what it does with a message before a model gets it.

Written from the kit's source: a message is a text, an object {"type", "value"}, or a list of these. A text in a list
that names an image file is that image. Types outside `allowed_types` are refused. Then `generate_inner` gets a list of
objects.
"""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Any


class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        raise NotImplementedError

    def generate(self, message: Any, dataset: str | None = None) -> str:
        parts = message if isinstance(message, list) else [message]
        assert parts and all(isinstance(part, type(parts[0])) for part in parts), f"Invalid input type: {message}"
        objects = [dict(part) if isinstance(part, dict) else _object(part) for part in parts]
        for part in objects:
            assert part["type"] in self.allowed_types, f"Invalid input type: {part['type']}"
        return self.generate_inner(objects, dataset)


def _object(text: str) -> dict[str, str]:
    kind = (mimetypes.guess_type(text)[0] or "").partition("/")[0]
    named = kind in ("image", "video") and Path(text).is_file()
    return {"type": kind if named else "text", "value": text}
