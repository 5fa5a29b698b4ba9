"""Turns a row of a requests file into a request, or into a one-line error.

    {"id": "cat", "prompt": "a cat"}                                             an image of that text
    {"content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}], "mode": "text"}
    {"messages": [{"role": "user", "content": "Draw a cat."}, {"role": "assistant", "content": [...]}, ...]}
    {"prompt": "a cat", "n": 4, "seed": 7, "guidance": 3, "image_size": [32, 48], "image": {"temperature": 0.9}}
    {"prompt": "a cat", "canvas": {"image": "a.png", "mask": "hole.png"}}        a.png, redrawn where the mask is white
    {"prompt": "a cat", "canvas": {"image": "a.png", "top": 64}}                 a.png, redrawn below its first 64 rows

Parts of "content", and of the content of messages, are texts, images and {"type": "tokens", "ids": [...]}. Images
are files under the requests' folder, or data: URLs. Sizes are in pixels. Every row needs one of "prompt", "content" and
"messages"; all other keys are optional. `sampling.request` explains the settings, and the `defaults` of a job have the
same keys.

A row's own columns (`sampling.columns`) are kept in "meta", with one warning for each file. An id may be any text; the
request's folder of images is named after it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified.data import images
from ar_unified.data.files import FileError
from ar_unified.data.images import Cells
from ar_unified.language.document import DocumentError, TextPart, Turn, check_speakers
from ar_unified.language.rows import read_messages, read_parts
from ar_unified.manifests import Json
from ar_unified.sampling import openai_batch
from ar_unified.sampling.columns import CANVAS, FILTER, SETTINGS, Names, check_keys, digest, elsewhere, own_columns
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.formats import Row, read_rows
from ar_unified.sampling.openai_batch import Asked
from ar_unified.sampling.request import CONTEXTS, MODES, Request, RequestError

_MOST = {"n": 100_000, "seed": 2**32}  # upper bounds; other whole numbers must fit an int32
_NAMES = {"Mapping": "object", "tuple": "list", "dict": "object"}  # maps Python's names of types to JSON's


class PromptImageError(RequestError):
    """An image cannot be read now. The request itself may be right, and will work once the file is repaired."""


@dataclass(frozen=True)
class PromptImage:
    """An image of a prompt before it is opened: its `name`, and a function that loads its bytes."""

    name: str
    read: Callable[[str], bytes]

    def load(self) -> np.ndarray:
        """The pixels, uint8 [H, W, 3]. Raises PromptImageError or RequestError that names the image and what is wrong
        with it.
        """
        where = f"image {self.name!r:.80}"
        try:
            return images.decode(self.read(self.name))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        except (images.ImageError, FileError) as error:
            raise PromptImageError(f"{where}: {error.reason}") from None
        except (OSError, RuntimeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise PromptImageError(f"{where}: cannot be read: {reason}") from None


@dataclass(frozen=True)
class Canvas:
    """An image that the model completes. It draws the part below the first `top` rows of pixels, or the part where
    `mask` is white.
    """

    image: PromptImage
    mask: PromptImage | None = None
    top: int = 0


@dataclass(frozen=True)
class Line:
    """One entry of a requests file.

    Attributes:
        number: the number of its row, from 1.
        id: the row's id, or else its number.
        name: the name of its folder of images, which is the id if that can be a folder's name.
        content: the parts of the prompt: text, ids, and images.
        history: the earlier turns, which may have images, too.
        canvas: an image that the answer's first image completes.
        request: the request, still without parts and canvas; None if there is an `error`.
        retry: whether the request may succeed if the job is run again.
        batch: what an answer in OpenAI's format repeats, if the row is a line of an OpenAI batch.
        prompt_tokens: the number of prompt tokens, known once the request has its parts.
    """

    number: int
    id: str
    name: str
    content: tuple[Any, ...] = ()
    history: tuple[Turn, ...] = ()
    canvas: Canvas | None = None
    request: Request | None = None
    error: str = ""
    retry: bool = False
    batch: Asked | None = None
    prompt_tokens: int = 0


def read_requests(
    paths: str | Path | Sequence[str | Path],
    *,
    cells: Cells,
    defaults: Mapping[str, Json] | None = None,
    links: bool = False,
    warn: Callable[[str], object] = warnings.warn,
) -> list[Line]:
    """Every request of the files, in order; requests that cannot be read have an `error`.

    Args:
        paths: a file or folder that `formats.read_rows` reads, or several, whose rows are numbered consecutively.
        cells: the image tokenizer, or another object that knows how many pixels a code stands for.
        defaults: values for settings that a request does not give.
        links: whether to follow links that lead out of the requests' folder.
        warn: called once for each file with columns that are no settings, and once for each file with entries that are
            no prompts.

    Raises:
        RequestError: if a setting of `defaults` is wrong, a tar, JSON or table file is broken, or a file contains no
            request.
        OSError: if a file cannot be read.
    """
    settings = dict(defaults or {})
    _settings(settings, cells, "defaults")
    lines: list[Line] = []
    names = Names()
    before = 0
    for path in [paths] if isinstance(paths, str | Path) else paths:
        number = before
        left: Counter[str] = Counter()
        own: dict[str, None] = {}
        for row in read_rows(path, lambda kind, left=left: left.update([kind]), links):  # type: ignore[misc]
            number = before + row.number
            lines.append(_line(row, number, cells, settings, names, own))
        if number == before:
            raise RequestError(f"{path}: expected at least one request, found none")
        before = number
        if left:
            warn(
                f"{path}: left out, because they are not prompts: {_shown(f'{kind} ({n})' for kind, n in left.items())}"
            )
        if own:
            called = [f"{key} is {elsewhere(key)} here" for key in own if elsewhere(key)]
            hint = f" (settings have other names: {_shown(called)})" if called else ""
            warn(f"{path}: columns that are no settings are kept in meta: {_shown(own)}{hint}")
    return lines


def choose_adapters(
    lines: Sequence[Line], names: Collection[str], warn: Callable[[str], object]
) -> tuple[list[Line], dict[str, Json]]:
    """Gives the requests their adapters. `names` are the loaded ones.

    The "model" of a line of an OpenAI batch may be the name of an adapter. If one adapter is loaded and no request
    names any, all requests get it, because otherwise it would have been loaded in vain. `warn` is called with what was
    not named.

    Returns the lines, and {"adapter": NAME} if all requests got the same one in this way, else {}.

    Raises RequestError if several adapters are loaded and no request names any.
    """
    if not names:
        return list(lines), {}
    found = [_adapted(line, line.batch.model) if line.batch and line.batch.model in names else line for line in lines]
    asked = [line.request for line in found if line.request]
    named = Counter(request.adapter for request in asked)
    without = named.pop("", 0)
    several = ", ".join(repr(name) for name in names)
    if asked and not named:
        if len(names) > 1:
            raise RequestError(
                f'adapter: expected requests that name one of {several}, found none: add "adapter": NAME to a line, or '
                "a column adapter to a table; or load only one adapter, which all requests then use"
            )
        (name,) = names
        warn(f"no request names an adapter, so all are drawn with {several}")
        return [_adapted(line, name) for line in found], {"adapter": name}
    if idle := [repr(name) for name in names if name not in named]:
        warn(f"adapter {', '.join(idle)}: loaded, but no request names it")
    if without:
        warn(f"{without} of {len(asked)} requests name no adapter and are drawn with the plain model")
    return found, {}


def _adapted(line: Line, name: str) -> Line:
    """The line with this adapter, unless it has an error or names another."""
    if line.request is None or line.request.adapter:
        return line
    return replace(line, request=replace(line.request, adapter=name))


def _shown(names: Iterable[str]) -> str:
    first = [f"{name:.60}" for name in islice(names, 21)]
    return ", ".join(first[:20] + ["..."] * (len(first) > 20))


def _line(
    row: Row, number: int, cells: Cells, settings: Mapping[str, Json], names: Names, own: dict[str, None]
) -> Line:
    """The entry of a row; the row's own columns are added to `own`."""
    id = name = f"{number:06d}"
    batch = openai_batch.asked(row.data)
    try:
        id = _id(row.data, "custom_id" if batch else "id", id)
        name = names.add(id, number)
        if row.error:
            raise RequestError(row.error)
        data = openai_batch.request(row.data) if batch else row.data
        *history, asked = _turns(data, row.load)
        canvas, request = _canvas(data, row.load), request_of(data, id, cells, settings, row.foreign)
        own.update(dict.fromkeys(own_columns(data, foreign=row.foreign)))
        return Line(number, id, name, asked.parts, tuple(history), canvas, request, batch=batch)
    except RequestError as error:
        return Line(number, id, name, error=str(error), batch=batch)


def _id(row: Mapping[str, Json], key: str, default: str) -> str:
    id = row.get(key)
    if id is None or id == "":
        return default
    if isinstance(id, bool) or not isinstance(id, str | int | float):
        raise RequestError(f"{key}: expected a text or a number, found {id!r:.120}")
    return str(id)


def _typed(row: Mapping[str, Json], types: Mapping[str, tuple[type, ...]], where: str) -> None:
    for key, value in row.items():
        wanted = types[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            names = " or ".join(dict.fromkeys(_NAMES.get(t.__name__, t.__name__) for t in wanted))
            raise RequestError(f"{where}{key}: expected {names}, found {value!r:.80}")
        if isinstance(value, int) and abs(value) >= _MOST.get(key, 2**31):
            raise RequestError(f"{where}{key}: expected less than {_MOST.get(key, 2**31)}, found {value!r:.40}")


def _turns(row: Mapping[str, Json], read: Callable[[str], bytes]) -> tuple[Turn, ...]:
    """The turns before the answer; their images are PromptImages."""
    said = [key for key in ("prompt", "content", "messages") if key in row]
    if len(said) != 1:
        raise RequestError('expected either "prompt" (a text), "content" (a list of parts) or "messages" (turns)')
    if "prompt" in row:
        return (Turn("user", (_text(row["prompt"], "prompt"),)),)

    def image(name: str, where: str) -> Any:
        return PromptImage(name, read)

    try:
        if "messages" in row:
            found = read_messages(row["messages"], image, tokens=True)
            turns = tuple(Turn(who, tuple(parts)) for who, parts, _ in found)
            check_speakers([*(turn.speaker for turn in turns), "assistant"])
            return turns
        parts = read_parts(row["content"], image, "content", tokens=True)
    except DocumentError as error:
        raise RequestError(str(error)) from None
    if not parts:
        raise RequestError(f"content: expected a list of at least one part, found {row['content']!r:.80}")
    return (Turn("user", tuple(parts)),)


def _canvas(row: Mapping[str, Json], read: Callable[[str], bytes]) -> Canvas | None:
    canvas = row.get("canvas")
    if canvas is None:
        return None
    if isinstance(canvas, dict):
        check_keys(canvas, CANVAS, "canvas: ")
    if not isinstance(canvas, dict) or "image" not in canvas or ("mask" in canvas) == ("top" in canvas):
        raise RequestError(f'canvas: expected an object with "image" and either "mask" or "top", found {canvas!r:.80}')
    _typed(canvas, CANVAS, "canvas.")
    mask = PromptImage(canvas["mask"], read) if "mask" in canvas else None
    return Canvas(PromptImage(canvas["image"], read), mask, canvas.get("top", 0))


def _text(text: object, where: str) -> TextPart:
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{where}: expected a text, found {text!r:.80}")
    return TextPart(text)


def request_of(
    row: Mapping[str, Any], id: str, cells: Cells, defaults: Mapping[str, Any], foreign: bool = False
) -> Request:
    """The settings of a row as a Request without parts. Raises RequestError for the first wrong setting."""
    columns = own_columns(row, foreign=foreign)
    own = {key: value for key, value in row.items() if key in SETTINGS and key not in columns}
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise RequestError(f"meta: expected an object, found {meta!r:.80}")
    twice = [key for key in columns if key in meta]
    if twice:
        raise RequestError(f"meta: {twice[0]!r:.80} is both in meta and in the row: remove one of them")
    _typed(own, SETTINGS, "")
    merged = dict(defaults) | own
    for modality in ("text", "image"):
        if modality in own:
            merged[modality] = {**defaults.get(modality, {}), **own[modality]}
    # A default that needs another setting is dropped if the request changes that setting.
    if merged.get("context") != "negative_prompt" and "negative_prompt" not in own:
        merged.pop("negative_prompt", None)
    if (own.get("guidance") == 1 or own.get("context") == "image_only") and "image_guidance" not in own:
        merged.pop("image_guidance", None)
    settings = _settings(merged, cells, "")
    settings.setdefault("mode", "image" if "prompt" in row else "free")
    # Requests without a seed get different seeds, which are the same in every run.
    settings.setdefault("seed", int.from_bytes(digest(id)[:4], "big"))
    request = Request(id, (), meta={**columns, **meta}, **settings)
    request.check()
    return request


def _settings(row: Mapping[str, Any], cells: Cells, where: str) -> dict[str, Any]:
    """Keyword arguments of a Request."""
    where = f"{where}: " if where else ""
    check_keys(row, SETTINGS, where)
    _typed(row, SETTINGS, where)
    settings = dict(row)
    for modality in ("text", "image"):
        if modality in row:
            check_keys(row[modality], FILTER, f"{where}{modality}: ")
            _typed(row[modality], FILTER, f"{where}{modality}.")
            settings[modality] = Filter(**row[modality])
    if "mode" in row and row["mode"] not in MODES:
        raise RequestError(f"{where}mode: expected one of {', '.join(MODES)}, found {row['mode']!r}")
    if "stop" in row:
        settings["stop"] = _stop(row["stop"], where)
    if row.get("guidance", 1) != 1 or row.get("image_guidance", 0):
        if "context" not in row:
            raise RequestError(
                f"{where}context: expected one of {', '.join(CONTEXTS)}, because guidance needs it; found none"
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
    """Converts a size in pixels, one number or [height, width], to height and width in codes."""
    sides = [size, size] if isinstance(size, int) else list(size)
    factor = cells.factor
    if len(sides) != 2 or any(type(side) is not int or side < 1 or side % factor for side in sides):
        raise RequestError(
            f"{where}image_size: expected [height, width] in pixels, multiples of {factor}, found {size!r}"
        )
    return sides[0] // factor, sides[1] // factor * cells.codes_per_position
