"""Turns lines of an OpenAI batch file into requests of ar_unified.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [...]}}
    {"custom_id": "b", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a cat", "size": "64x64"}}

Messages are turns (`language.rows`), and the last one is the user's. The role "developer" means the same as "system".
Images are data: URLs or files (`data.files`).

    n, seed (modulo 2**32), stop, max_tokens = max_completion_tokens   as in our own lines
    temperature, top_p, top_k       how text is drawn; our key "image": {"temperature": ...} says how images are drawn
    modalities                      ["text"]: mode "text"; ["image"]: mode "image"; both, or no such key: mode "free"
    size                            image_size; "auto": the same as no image_size
    metadata                        meta
    model                           the adapter of this name, if it was loaded (sample --adapter); otherwise ignored
    keys of ours                    "guidance", "mode", "image_size", ...: as in our own lines

A key without a counterpart in this list is accepted only with a value that changes nothing ("frequency_penalty": 0).
Keys about the user and billing ("user", "store") are ignored. null means that a key is not given.
`sampling.batch_output` writes the answers in OpenAI's format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ar_unified.manifests import Json
from ar_unified.sampling.columns import SETTINGS, nearly
from ar_unified.sampling.request import RequestError

_LINE = ("custom_id", "method", "url", "body")
_ENDPOINTS: dict[str, Literal["chat", "images"]] = {"/chat/completions": "chat", "/images/generations": "images"}
_UNREAD = {
    "model", "user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
_NO_TOOLS = "there are no tools here: leave it out"
_NO_LOGPROBS = "an answer has no log-probabilities: leave it out"
_PENALTY = 'leave it out, or set "repetition_penalty", a key of ours'
# Maps a key to the values that change nothing, and to advice for any other value
_NEUTRAL: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "chat": {
        "frequency_penalty": ((0,), _PENALTY),
        "presence_penalty": ((0,), _PENALTY),
        "logit_bias": (({},), "it is not supported: leave it out"),
        "logprobs": ((False,), _NO_LOGPROBS),
        "top_logprobs": ((0,), _NO_LOGPROBS),
        "stream": ((False,), "a batch is not streamed: leave it out"),
        "stream_options": ((), "a batch is not streamed: leave it out"),
        "tools": (([],), _NO_TOOLS),
        "tool_choice": (("none", "auto"), _NO_TOOLS),
        "functions": (([],), _NO_TOOLS),
        "function_call": (("none", "auto"), _NO_TOOLS),
        "web_search_options": ((), _NO_TOOLS),
        "response_format": (({"type": "text"},), "answers are free text: ask for JSON in the prompt"),
        "audio": ((), "there is no sound here: leave it out"),
        "prediction": ((), "leave it out"),
        "reasoning_effort": (("none",), "the model answers without reasoning: leave it out"),
        "verbosity": (("medium",), 'leave it out, or set "max_tokens"'),
    },
    "images": {
        "response_format": (("b64_json",), "images are returned in the answer, not as URLs"),
        "quality": (("auto", "standard"), "there is only one quality: leave it out"),
        "style": (("vivid",), "describe the style in the prompt"),
        "background": (("auto", "opaque"), "images are opaque: leave it out"),
        "output_format": (("png",), "images are PNG: leave it out"),
        "output_compression": ((100,), "PNG is lossless: leave it out"),
        "moderation": (("auto", "low"), "leave it out"),
        "stream": ((False,), "a batch is not streamed: leave it out"),
        "partial_images": ((0,), "a batch is not streamed: leave it out"),
    },
}
_READ = {
    "chat": ("messages", "n", "seed", "stop", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
             "modalities", "metadata"),
    "images": ("prompt", "n", "seed", "size", "metadata"),
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """The parts of a line that its answer repeats: the id, the kind of answer, and the model's name."""

    custom_id: Any
    endpoint: Literal["chat", "images"]
    model: str


def asked(row: Mapping[str, Json]) -> Asked | None:
    """The `Asked` of a row, or None if the row is not a line of a batch."""
    if "custom_id" not in row and not {"url", "body"} <= row.keys():
        return None
    body = row.get("body")
    model = body.get("model") if isinstance(body, dict) else None
    return Asked(row.get("custom_id"), _endpoint(row.get("url")) or "chat", model if isinstance(model, str) else "")


def request(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrites a line of a batch with the keys of our own lines, without its id. Raises RequestError that says what to
    change."""
    if row.get("custom_id") in (None, ""):
        raise RequestError("custom_id: expected a text that no other line has, found none")
    if row.get("method", "POST") != "POST":
        raise RequestError(f'method: expected "POST", found {row["method"]!r:.80}')
    endpoint = _endpoint(row.get("url", "/v1/chat/completions"))
    if endpoint is None:
        expected = " or ".join(f"/v1{path}" for path in _ENDPOINTS)
        raise RequestError(f"url: expected {expected}, found {row['url']!r:.80}")
    if not isinstance(row.get("body"), dict):
        raise RequestError(f"body: expected an object, found {row.get('body')!r:.80}")
    beside = {key: value for key, value in row.items() if key not in _LINE and key != "id"}
    for key in beside:
        near = nearly(key, _LINE)
        if near or key in SETTINGS or key in (*_READ[endpoint], *_NEUTRAL[endpoint], "content", "canvas"):
            cure = f"did you mean {near!r}?" if near else "put it into body"
            raise RequestError(f"unknown key {key!r:.60}: {cure}")
    body = {key: value for key, value in row["body"].items() if value is not None and key not in _UNREAD}
    _check(body, endpoint)
    return beside | (_chat(body) if endpoint == "chat" else _images(body))


def _endpoint(url: Any) -> Literal["chat", "images"] | None:
    found = (kind for path, kind in _ENDPOINTS.items() if isinstance(url, str) and url.rstrip("/").endswith(path))
    return next(found, None)


def _check(body: dict[str, Json], endpoint: str) -> None:
    """Removes keys that have no counterpart in our own lines, if their value changes nothing. Raises RequestError for
    any other value of such a key, and for an unknown key.
    """
    ours = (*SETTINGS, "canvas")
    known = (*_READ[endpoint], *_NEUTRAL[endpoint], *ours)
    for key, value in list(body.items()):
        if key in _NEUTRAL[endpoint]:
            neutral, advice = _NEUTRAL[endpoint][key]
            if value not in neutral:
                expected = " or ".join(map(repr, neutral)) or "null"
                raise RequestError(f"body.{key}: expected {expected}, found {value!r:.80}: {advice}")
            del body[key]
        elif key not in known:
            near = nearly(key, known)
            meant = f"did you mean {near!r}?" if near else "it is not used here: leave it out"
            raise RequestError(f"body: unknown key {key!r:.60}: {meant}")


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(messages := body.pop("messages", None), list) or not messages:
        raise RequestError(f"body.messages: expected a list of at least one message, found {messages!r:.80}")
    if "max_completion_tokens" in body:
        most = body.pop("max_completion_tokens")
        if body.setdefault("max_tokens", most) != most:
            found = f"{body['max_tokens']!r} and {most!r}"
            raise RequestError(f"body.max_tokens and body.max_completion_tokens: expected one number, found {found}")
    drawn = {key: body.pop(key) for key in ("temperature", "top_p", "top_k") if key in body}
    if drawn and isinstance(body.setdefault("text", {}), dict):
        body["text"] = {**drawn, **body["text"]}
    modalities = body.pop("modalities", [])
    if not isinstance(modalities, list) or any(kind not in ("text", "image") for kind in modalities):
        raise RequestError(f'body.modalities: expected a list of "text", "image" or both, found {modalities!r:.80}')
    if modalities and "mode" not in body:
        body["mode"] = modalities[0] if len(set(modalities)) == 1 else "free"
    return {"messages": messages, **_common(body)}


def _images(body: dict[str, Json]) -> dict[str, Json]:
    if "prompt" not in body:
        raise RequestError("body.prompt: expected a text, found none")
    size = body.pop("size", "auto")
    if size != "auto":
        sides = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size) if isinstance(size, str) else None
        if not sides:
            raise RequestError(f'body.size: expected "auto" or a width and height, as in "256x256", found {size!r:.80}')
        body["image_size"] = [int(sides[2]), int(sides[1])]
    return _common(body)


def _common(body: dict[str, Any]) -> dict[str, Any]:
    if "metadata" in body:
        body["meta"] = body.pop("metadata")
    if type(body.get("seed")) is int:
        body["seed"] %= 2**32
    return body
