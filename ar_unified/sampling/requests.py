"""A file of requests, one JSON object a line, and what is wrong with the lines that cannot be served.

    {"id": "cat", "prompt": "a cat"}                                             a picture of that text
    {"content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}], "mode": "text"}
    {"prompt": "a cat", "n": 4, "seed": 7, "guidance": 3, "image_size": [32, 48], "image": {"temperature": 0.9}}

Pictures are files under the requests' folder. Sizes are in pixels. Everything but "prompt" or "content" is optional;
`defaults` of a job has the same keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified.data import images
from ar_unified.document import TextPart
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.request import MODES, Request, RequestError

_SETTINGS: dict[str, tuple[type, ...]] = {
    "mode": (str,),
    "turn": (bool,),
    "n": (int,),
    "seed": (int,),
    "max_tokens": (int,),
    "min_images": (int,),
    "max_images": (int,),
    "image_size": (int, list, tuple),
    "guidance": (int, float),
    "text": (Mapping,),
    "image": (Mapping,),
}
_FILTER: dict[str, tuple[type, ...]] = {"temperature": (int, float), "top_k": (int,), "top_p": (int, float)}
_NAMES = {"Mapping": "object", "tuple": "list"}  # what JSON calls them
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # names a folder, too


@dataclass(frozen=True)
class Line:
    """One line of a requests file.

    Attributes:
        number: from 1. id: its own, else its number; a folder of pictures is named after it.
        content: text, and names of picture files. request: without parts yet; None if there is an `error`.
    """

    number: int
    id: str
    content: tuple[TextPart | Path, ...] = ()
    request: Request | None = None
    error: str = ""


def read_requests(path: str | Path, *, factor: int, defaults: Mapping[str, Any] | None = None) -> list[Line]:
    """Every line that is not blank, in order; those that cannot be read have an `error`.

    Args:
        path: the JSONL file. factor: pixels a side of one code.
        defaults: settings of requests that do not say.

    Raises:
        RequestError: a setting of `defaults` is wrong. OSError: the file cannot be read.
    """
    path, settings = Path(path), dict(defaults or {})
    _settings(settings, factor, "defaults")
    lines: list[Line] = []
    seen: dict[str, int] = {}
    for number, data in enumerate(path.read_bytes().split(b"\n"), 1):
        if not data.strip():
            continue
        id = f"{number:06d}"
        try:
            row = _object(data)
            id = _id(row, id)
            if id in seen:
                raise RequestError(f"id {id!r} is that of line {seen[id]} already: give every request its own")
            seen[id] = number
            lines.append(Line(number, id, _content(row), _request(row, id, factor, settings)))
        except RequestError as error:
            lines.append(Line(number, id, error=str(error)))
    return lines


def load_picture(folder: Path, name: Path) -> np.ndarray:
    """A picture under the requests' folder as uint8 [H, W, 3]. Raises RequestError naming it and what is wrong."""
    try:
        file = (folder / name).resolve()
        if name.is_absolute() or not file.is_relative_to(folder.resolve()):
            raise RequestError(f"image {str(name)!r}: expected a file inside the folder of the requests")
        return images.decode(file.read_bytes())
    except images.ImageError as error:
        raise RequestError(f"image {str(name)!r}: {error.reason}") from None
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"image {str(name)!r}: cannot be read: {reason}") from None


def _object(data: bytes) -> dict[str, Any]:
    try:
        row = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"expected UTF-8, found byte {data[error.start]:#04x} at {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"expected one JSON object, found {data[:40]!r}: {error}") from None
    if not isinstance(row, dict):
        raise RequestError(f"expected a JSON object, found {type(row).__name__}")
    return row


def _id(row: Mapping[str, Any], default: str) -> str:
    id = row.get("id", default)
    id = str(id) if type(id) is int else id
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise RequestError(f"id: expected letters, digits, '.', '_' and '-', at most 100, found {id!r:.120}")
    return id


def _known(row: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> None:
    unknown = [key for key in row if key not in keys]
    if unknown:
        raise RequestError(f"{where}unknown key {unknown[0]!r}; known: {', '.join(keys)}")


def _typed(row: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], where: str) -> None:
    for key, value in row.items():
        wanted = types[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            names = " or ".join(dict.fromkeys(_NAMES.get(t.__name__, t.__name__) for t in wanted))
            raise RequestError(f"{where}{key}: expected {names}, found {value!r:.80}")


def _content(row: Mapping[str, Any]) -> tuple[TextPart | Path, ...]:
    if ("prompt" in row) == ("content" in row):
        raise RequestError('expected either "prompt" (a text) or "content" (a list of parts)')
    if "prompt" in row:
        return (_text(row["prompt"], "prompt"),)
    if not isinstance(row["content"], list):
        raise RequestError(f"content: expected a list of parts, found {type(row['content']).__name__}")
    parts: list[TextPart | Path] = []
    for i, part in enumerate(row["content"]):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image"):
            raise RequestError(f'content {i}: expected type "text" or "image", found {part!r:.80}')
        _known(part, {"type": (), kind: ()}, f"content {i}: ")
        if kind == "text":
            parts.append(_text(part.get("text"), f"content {i}"))
        elif isinstance(part.get("image"), str) and part["image"]:
            parts.append(Path(part["image"]))
        else:
            raise RequestError(f"content {i}: expected the name of a picture file, found {part.get('image')!r:.80}")
    return tuple(parts)


def _text(text: Any, where: str) -> TextPart:
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{where}: expected a text, found {text!r:.80}")
    return TextPart(text)


def _request(row: Mapping[str, Any], id: str, factor: int, defaults: Mapping[str, Any]) -> Request:
    _known(row, {"id": (), "prompt": (), "content": (), **_SETTINGS, "meta": ()}, "")
    own = {key: value for key, value in row.items() if key in _SETTINGS}
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise RequestError(f"meta: expected object, found {meta!r:.80}")
    _typed(own, _SETTINGS, "")
    merged = dict(defaults) | own
    for modality in ("text", "image"):
        if modality in own:
            merged[modality] = {**defaults.get(modality, {}), **own[modality]}
    settings = _settings(merged, factor, "")
    settings.setdefault("mode", "image" if "prompt" in row else "free")
    # Requests that name no seed still draw differently from each other, and alike in every run.
    settings.setdefault("seed", int.from_bytes(hashlib.sha256(id.encode()).digest()[:4], "big"))
    request = Request(id, (), meta=meta, **settings)
    request.check()
    return request


def _settings(row: Mapping[str, Any], factor: int, where: str) -> dict[str, Any]:
    """Keyword arguments of a Request."""
    where = f"{where}: " if where else ""
    _known(row, _SETTINGS, where)
    _typed(row, _SETTINGS, where)
    settings = dict(row)
    for modality in ("text", "image"):
        if modality in row:
            _known(row[modality], _FILTER, f"{where}{modality}: ")
            _typed(row[modality], _FILTER, f"{where}{modality}.")
            settings[modality] = Filter(**row[modality])
    if "mode" in row and row["mode"] not in MODES:
        raise RequestError(f"{where}mode: expected one of {', '.join(MODES)}, found {row['mode']!r}")
    if "image_size" in row:
        settings["image_size"] = _codes(row["image_size"], factor, where)
    return settings


def _codes(size: Any, factor: int, where: str) -> tuple[int, int]:
    """Pixels, one number or [height, width], as codes."""
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or any(type(side) is not int or side < 1 or side % factor for side in sides):
        raise RequestError(
            f"{where}image_size: expected [height, width] in pixels, multiples of {factor}, found {size!r}"
        )
    return sides[0] // factor, sides[1] // factor
