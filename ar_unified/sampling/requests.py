"""A row of a requests file -> a request, or what is wrong with it in one line.

    {"id": "cat", "prompt": "a cat"}                                             a picture of that text
    {"content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}], "mode": "text"}
    {"prompt": "a cat", "n": 4, "seed": 7, "guidance": 3, "image_size": [32, 48], "image": {"temperature": 0.9}}
    {"prompt": "a cat", "canvas": {"image": "a.png", "mask": "hole.png"}}        that picture, drawn anew where white
    {"prompt": "a cat", "canvas": {"image": "a.png", "top": 64}}                 that picture, below its first 64 pixels

Parts of "content" are texts, pictures and {"type": "tokens", "ids": [...]}. Pictures are files under the requests'
folder, or data: URLs. Sizes are in pixels. Everything but "prompt" or "content" is optional; `sampling.request` says
what the settings mean, and `defaults` of a job has the same keys.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified.data import images
from ar_unified.data.files import FileError
from ar_unified.data.images import Cells
from ar_unified.document import TextPart
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.formats import Row, read_rows
from ar_unified.sampling.request import CONTEXTS, MODES, Request, RequestError, TokensPart

_SETTINGS: dict[str, tuple[type, ...]] = {
    "mode": (str,),
    "turn": (bool,),
    "n": (int,),
    "seed": (int,),
    "max_tokens": (int,),
    "stop": (str, list),
    "min_images": (int,),
    "max_images": (int,),
    "image_size": (int, list, tuple),
    "guidance": (int, float),
    "image_guidance": (int, float),
    "context": (str,),
    "negative_prompt": (str,),
    "repetition_penalty": (int, float),
    "text": (Mapping,),
    "image": (Mapping,),
}
_FILTER: dict[str, tuple[type, ...]] = {"temperature": (int, float), "top_k": (int,), "top_p": (int, float)}
_CANVAS: dict[str, tuple[type, ...]] = {"image": (str,), "mask": (str,), "top": (int,)}
_PART = {"text": "text", "image": "image", "tokens": "ids"}  # type of a part -> the key of what it holds
_MOST = {"n": 100_000, "seed": 2**32}  # of whole numbers; others fit an int32
_NAMES = {"Mapping": "object", "tuple": "list", "dict": "object"}  # what JSON calls them
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # names a folder, too


class PictureError(RequestError):
    """A picture cannot be read now. The request may be right: its file may be put in order."""


@dataclass(frozen=True)
class Picture:
    """A picture of a prompt that was not opened yet: its `name`, and how to get the bytes."""

    name: str
    read: Callable[[str], bytes]

    def load(self) -> np.ndarray:
        """uint8 [H, W, 3]. Raises PictureError or RequestError naming it and what is wrong."""
        where = f"image {self.name!r:.80}"
        try:
            return images.decode(self.read(self.name))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        except (images.ImageError, FileError) as error:
            raise PictureError(f"{where}: {error.reason}") from None
        except (OSError, RuntimeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise PictureError(f"{where}: cannot be read: {reason}") from None


@dataclass(frozen=True)
class Canvas:
    """A picture to be completed: below its first `top` pixels, or where `mask` is white."""

    image: Picture
    mask: Picture | None = None
    top: int = 0


@dataclass(frozen=True)
class Line:
    """One entry of a requests file.

    Attributes:
        number: of its row, from 1. id: its own, else its number; a folder of pictures is named after it.
        content: text, ids, and pictures. canvas: what the answer's first picture starts from.
        request: without parts and canvas yet; None if there is an `error`.
        retry: whether the error may be gone when the job is run again.
    """

    number: int
    id: str
    content: tuple[TextPart | TokensPart | Picture, ...] = ()
    canvas: Canvas | None = None
    request: Request | None = None
    error: str = ""
    retry: bool = False


def read_requests(
    paths: str | Path | Sequence[str | Path],
    *,
    cells: Cells,
    defaults: Mapping[str, Any] | None = None,
    links: bool = False,
) -> list[Line]:
    """Every request of the files, in order; those that cannot be read have an `error`.

    Args:
        paths: a file or folder that `formats.read_rows` reads, or several, numbered on.
        cells: the image tokenizer, or whatever says what a code stands for.
        defaults: settings of requests that do not say.
        links: whether links that lead out of the requests' folder are followed.

    Raises:
        RequestError: a setting of `defaults` is wrong, or a tar or JSON file is broken. OSError: it cannot be read.
    """
    settings = dict(defaults or {})
    _settings(settings, cells, "defaults")
    lines: list[Line] = []
    seen: dict[str, int] = {}
    before = 0
    for path in [paths] if isinstance(paths, str | Path) else paths:
        number = before
        for row in read_rows(path, links):
            number = before + row.number
            lines.append(_line(row, number, cells, settings, seen))
        before = number
    return lines


def _line(row: Row, number: int, cells: Cells, settings: Mapping[str, Any], seen: dict[str, int]) -> Line:
    id = f"{number:06d}"
    try:
        id = _id(row.data, id)
        if id in seen:
            raise RequestError(f"id {id!r} is that of line {seen[id]} already: give every request its own")
        seen[id] = number
        if row.error:
            raise RequestError(row.error)
        content = _content(row.data, row.load)
        return Line(number, id, content, _canvas(row.data, row.load), _request(row.data, id, cells, settings))
    except RequestError as error:
        return Line(number, id, error=str(error))


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
        if isinstance(value, int) and abs(value) >= _MOST.get(key, 2**31):
            raise RequestError(f"{where}{key}: expected less than {_MOST.get(key, 2**31)}, found {value!r:.40}")


def _content(row: Mapping[str, Any], read: Callable[[str], bytes]) -> tuple[TextPart | TokensPart | Picture, ...]:
    if ("prompt" in row) == ("content" in row):
        raise RequestError('expected either "prompt" (a text) or "content" (a list of parts)')
    if "prompt" in row:
        return (_text(row["prompt"], "prompt"),)
    if not isinstance(row["content"], list) or not row["content"]:
        raise RequestError(f"content: expected a list of at least one part, found {row['content']!r:.80}")
    parts: list[TextPart | TokensPart | Picture] = []
    for i, part in enumerate(row["content"]):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PART:
            raise RequestError(f"content {i}: expected type {', '.join(map(repr, _PART))}, found {part!r:.80}")
        _known(part, {"type": (), _PART[kind]: ()}, f"content {i}: ")
        found = part.get(_PART[kind])
        if kind == "text":
            text = _text(found, f"content {i}")
            if parts and isinstance(parts[-1], TextPart):  # blocks of one text, as in documents
                text = TextPart(f"{parts.pop().text}\n\n{text.text}")  # type: ignore[union-attr]
            parts.append(text)
        elif kind == "tokens":
            if not isinstance(found, list) or not found or any(type(id) is not int for id in found):
                raise RequestError(f"content {i}: expected ids, a list of whole numbers, found {found!r:.80}")
            parts.append(TokensPart(tuple(found)))
        elif isinstance(found, str) and found:
            parts.append(Picture(found, read))
        else:
            raise RequestError(f"content {i}: expected the name of a picture file, found {found!r:.80}")
    return tuple(parts)


def _canvas(row: Mapping[str, Any], read: Callable[[str], bytes]) -> Canvas | None:
    canvas = row.get("canvas")
    if canvas is None:
        return None
    if not isinstance(canvas, dict) or "image" not in canvas or ("mask" in canvas) == ("top" in canvas):
        raise RequestError(f'canvas: expected an object with "image" and either "mask" or "top", found {canvas!r:.80}')
    _known(canvas, _CANVAS, "canvas: ")
    _typed(canvas, _CANVAS, "canvas.")
    mask = Picture(canvas["mask"], read) if "mask" in canvas else None
    return Canvas(Picture(canvas["image"], read), mask, canvas.get("top", 0))


def _text(text: Any, where: str) -> TextPart:
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{where}: expected a text, found {text!r:.80}")
    return TextPart(text)


def _request(row: Mapping[str, Any], id: str, cells: Cells, defaults: Mapping[str, Any]) -> Request:
    _known(row, {"id": (), "prompt": (), "content": (), **_SETTINGS, "canvas": (), "meta": ()}, "")
    own = {key: value for key, value in row.items() if key in _SETTINGS}
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise RequestError(f"meta: expected object, found {meta!r:.80}")
    _typed(own, _SETTINGS, "")
    merged = dict(defaults) | own
    for modality in ("text", "image"):
        if modality in own:
            merged[modality] = {**defaults.get(modality, {}), **own[modality]}
    if merged.get("context") != "negative_prompt" and "negative_prompt" not in own:
        merged.pop("negative_prompt", None)  # the default's, which belongs to the default's context
    settings = _settings(merged, cells, "")
    settings.setdefault("mode", "image" if "prompt" in row else "free")
    # Requests that name no seed still draw differently from each other, and alike in every run.
    settings.setdefault("seed", int.from_bytes(hashlib.sha256(id.encode()).digest()[:4], "big"))
    request = Request(id, (), meta=meta, **settings)
    request.check()
    return request


def _settings(row: Mapping[str, Any], cells: Cells, where: str) -> dict[str, Any]:
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
    if "stop" in row:
        settings["stop"] = _stop(row["stop"], where)
    if row.get("guidance", 1) != 1 or "image_guidance" in row:
        if "context" not in row:
            raise RequestError(
                f"{where}guidance: a scale needs the context it compares with: one of {', '.join(CONTEXTS)}"
            )
    if "image_size" in row:
        settings["image_size"] = _codes(row["image_size"], cells, where)
    return settings


def _stop(stop: Any, where: str) -> tuple[str | tuple[int, ...], ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if any(not isinstance(s, str) and not (isinstance(s, list) and all(type(i) is int for i in s)) for s in stops):
        raise RequestError(f"{where}stop: expected a text, or a list of texts and lists of ids, found {stop!r:.80}")
    return tuple(s if isinstance(s, str) else tuple(s) for s in stops)


def _codes(size: Any, cells: Cells, where: str) -> tuple[int, int]:
    """Pixels, one number or [height, width], as codes."""
    sides = [size, size] if isinstance(size, int) else list(size)
    factor = cells.factor
    if len(sides) != 2 or any(type(side) is not int or side < 1 or side % factor for side in sides):
        raise RequestError(
            f"{where}image_size: expected [height, width] in pixels, multiples of {factor}, found {size!r}"
        )
    return sides[0] // factor, sides[1] // factor * cells.codes_per_position
