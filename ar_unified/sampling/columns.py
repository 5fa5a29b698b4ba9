"""Sorts the keys of a row into settings, misspelled settings and the row's own columns, and makes a folder name from
the row's id.

A key that is clearly not a setting ("category", "prompt_id") is the row's own column and is kept in `meta`. A key that
resembles a setting ("guidence", "imageSize"), or is another system's name for it ("guidance_scale"), is an error that
names our setting. Tables and the metadata of shards were not written for this program. In these files, only
misspellings are errors; other systems' names for settings are kept in `meta`, too.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping

from ar_unified.manifests import Json
from ar_unified.sampling.request import RequestError

SETTINGS: dict[str, tuple[type, ...]] = {
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
    "prompt_suffix": (str,),
    "repetition_penalty": (int, float),
    "adapter": (str,),
    "text": (Mapping,),
    "image": (Mapping,),
}
FILTER: dict[str, tuple[type, ...]] = {"temperature": (int, float), "top_k": (int,), "top_p": (int, float)}
CANVAS: dict[str, tuple[type, ...]] = {"image": (str,), "mask": (str,), "top": (int,)}
ROW = ("id", "prompt", "content", "messages", *SETTINGS, "canvas", "meta")  # the keys of a request

# Names of settings in other systems, without "_"
_ELSEWHERE = {
    **dict.fromkeys(("guidancescale", "cfg", "cfgscale", "classifierfreeguidance", "guidanceweight"), "guidance"),
    **dict.fromkeys(("numimages", "nimages", "numsamples", "nsamples"), "n"),
    **dict.fromkeys(("numimagesperprompt", "numreturnsequences"), "n"),
    **dict.fromkeys(("maxnewtokens", "maxlength", "maxcompletiontokens"), "max_tokens"),
    **dict.fromkeys(("width", "height", "size", "resolution", "aspectratio"), "image_size"),
    **dict.fromkeys(("negative", "negprompt"), "negative_prompt"),
    **dict.fromkeys(("stopsequences", "stopstrings"), "stop"),
    **dict.fromkeys(("frequencypenalty", "presencepenalty"), "repetition_penalty"),
}
_ORDINARY = {"model"}  # words that resemble a setting ("mode") but are no misspelling
_ALIKE = 0.85  # difflib's least ratio of a misspelling: "sed" and "seed" have 0.86, "step" and "stop" 0.75

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,98}[A-Za-z0-9_-]|[A-Za-z0-9]")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # reserved on Windows, with any suffix


def own_columns(row: Mapping[str, Json], *, foreign: bool = False) -> dict[str, Json]:
    """The row's own columns.

    foreign: whether the row was written for other programs. Raises RequestError for the first key that may be a
    mistaken setting.
    """
    own = {key: value for key, value in row.items() if key not in ROW or (foreign and _no_filter(key, value))}
    for key in own:
        suggestion = _suggestion(key, row, foreign) if key not in ROW else ""
        if suggestion:
            raise RequestError(
                f'unknown key {key!r:.60}: did you mean {suggestion}? If it is a column of your own, put it into "meta"'
            )
    return own


def check_keys(row: Mapping[str, Json], known: Iterable[str], where: str) -> None:
    """Raises RequestError for the first key that is not in `known`. The row's own columns are errors, too."""
    names = list(known)
    for key in row:
        if key not in names:
            near = nearly(key, names)
            meant = f": did you mean {near!r}?" if near else ""
            raise RequestError(f"{where}unknown key {key!r:.60}{meant or '; known: ' + ', '.join(names)}")


def elsewhere(key: str) -> str:
    """Our name for the setting that other systems call `key`; "" if there is none."""
    return _ELSEWHERE.get(_plain(key), "")


def nearly(key: str, known: Iterable[str]) -> str:
    """The name in `known` that `key` misspells, or "". "prompt_en" and "seed2" are not misspellings."""
    if key in _ORDINARY or key[-1:].isdigit():
        return ""
    spelled = re.sub(r"\W", "_", key).casefold().strip("_")
    best, at = "", _ALIKE
    for name in known:
        same = _plain(key) == _plain(name) or _swapped(spelled, name)
        ratio = 1.0 if same else difflib.SequenceMatcher(None, spelled, name).ratio()
        if ratio >= at:
            best, at = name, ratio
    return best


def _no_filter(key: str, value: object) -> bool:
    """Whether this is a column named "text" or "image" whose value is not a dict of settings."""
    return key in ("text", "image") and not isinstance(value, Mapping)


def _suggestion(key: str, row: Mapping[str, Json], foreign: bool) -> str:
    if elsewhere(key) and not foreign:
        return repr(elsewhere(key))
    near = nearly(key, ROW)
    if near and near not in row:  # a row that also has the key `near` does not misspell it
        return repr(near)
    inner = nearly(key, FILTER)
    if inner and not foreign:
        return f'"text": {{"{inner}": ...}} or "image": {{"{inner}": ...}}'
    return ""


def _plain(key: str) -> str:
    return re.sub(r"[\W_]", "", key).casefold()


def _swapped(a: str, b: str) -> bool:
    """Whether the two words differ by one swap of adjacent letters, as in "mdoe" and "mode"."""
    return len(a) == len(b) and any(a[:i] + a[i + 1] + a[i] + a[i + 2 :] == b for i in range(len(a) - 1))


# ---- ids --------------------------------------------------------------------------------------------------------


class Names:
    """Names the folder of images for each id. The name is the id itself if that is a valid name on every file system.

    Otherwise it combines the id's letters and digits with a hash. The same requests in the same order get the same
    names.
    """

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._taken: set[str] = set()

    def add(self, id: str, number: int) -> str:
        """The name for the id of row `number`. Raises RequestError if another row has that id."""
        if id in self._ids:
            raise RequestError(f"id {id!r:.120}: line {self._ids[id]} already has this id: give each request its own")
        self._ids[id] = number
        name = id if _NAME.fullmatch(id) and not _RESERVED.fullmatch(id) else _made(id)
        if name.casefold() in self._taken:  # "Cat" and "cat" are the same folder on some file systems
            name = _made(id)
        self._taken.add(name.casefold())
        return name


def _made(id: str) -> str:
    letters = unicodedata.normalize("NFKD", id).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9]+", "-", letters)[:48].strip("-") or "id"
    return f"{readable}-{digest(id).hex()[:16]}"


def digest(text: str) -> bytes:
    """The sha256 of a text, which may have lone surrogates."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
