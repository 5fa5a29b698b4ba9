"""Writes the answers of a finished job whose requests were an OpenAI batch, in the format of OpenAI's output files.

    batch_output.jsonl   {"id", "custom_id", "response": {"status_code": 200, "request_id", "body"}, "error": null}
    batch_errors.jsonl   the same, but with status_code 400 (the line cannot be served) or 500 (drawing failed), and a
                         body that says why: {"error": {"message", "type", "param", "code"}}

Every line of the batch is in one of the two files, in the batch's order. The body is a chat completion, or an answer of
/v1/images/generations. The content of a chat answer with images is a list of parts in reading order, {"type": "text"}
and {"type": "image_url"}, with the images as PNG in data: URLs. So this list can be copied into a later conversation.
Both files depend only on the requests and samples.jsonl, because ids are hashes and "created" is always 0.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ar_tokenizers.files import whole

from ar_unified.manifests import Json
from ar_unified.sampling.columns import digest
from ar_unified.sampling.requests import Line
from ar_unified.sampling.results import read

NAMES = ("batch_output.jsonl", "batch_errors.jsonl")
_FINISHED = {"eos": "stop", "stop": "stop", "length": "length"}


class _Failed(Exception):
    """A line of the batch gets no answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


def write(folder: Path, lines: Sequence[Line], weights: str) -> None:
    """Writes both files into the folder of a complete job. Does nothing if the job has no lines of an OpenAI batch.

    weights: the name of the model that answered. Raises OSError.
    """
    if not any(line.batch for line in lines):
        return
    samples: dict[int, list[dict[str, Json]]] = defaultdict(list)
    for row in read(folder):
        samples[row["line"]].append(row | {"tokens": len(row.get("tokens", ()))})
    answers, failures = (folder / name for name in NAMES)
    with whole(answers) as output, whole(failures) as errors:
        for line in lines:
            if line.batch is None and not line.error:
                continue  # a request in our own format between the lines of the batch
            try:
                body = _body(folder, line, samples[line.number], weights)
                _put(output, line, 200, body)
            except _Failed as failed:
                kind = "invalid_request_error" if failed.status == 400 else "server_error"
                error = {"message": failed.message, "type": kind, "param": None, "code": None}
                _put(errors, line, failed.status, {"error": error})


def _put(file: IO[bytes], line: Line, status: int, body: Mapping[str, Json]) -> None:
    row = {
        "id": f"batch_req_{_mark(line, 'batch')}",
        "custom_id": line.batch.custom_id if line.batch else None,
        "response": {"status_code": status, "request_id": _mark(line, "request"), "body": body},
        "error": None,
    }
    file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def _mark(line: Line, kind: str) -> str:
    return digest(f"{kind} {line.number} {line.id}").hex()[:24]


def _body(folder: Path, line: Line, rows: Iterable[dict[str, Any]], weights: str) -> dict[str, Any]:
    """The body of the answer to a line. Raises _Failed."""
    ordered = sorted(rows, key=lambda row: row["sample"] or 0)
    for row in ordered:
        if row["sample"] is None:
            raise _Failed(400, row["error"])
        if "error" in row:
            raise _Failed(500, f"sample {row['sample']} of {row['n']}: {row['error']}; samples.jsonl has the others")
    if line.batch is None or not ordered:
        raise _Failed(400, line.error or "samples.jsonl has no samples of this line")
    prompt, drawn = ordered[0]["prompt_tokens"], sum(row["tokens"] for row in ordered)
    if line.batch.endpoint == "images":
        return _images(folder, ordered, prompt, drawn)
    choices = [
        {
            "index": row["sample"],
            "message": {"role": "assistant", "content": _content(folder, row["segments"]), "refusal": None},
            "logprobs": None,
            "finish_reason": _FINISHED[row["finish_reason"]],
        }
        for row in ordered
    ]
    return {
        "id": f"chatcmpl-{_mark(line, 'answer')}",
        "object": "chat.completion",
        "created": 0,
        "model": line.batch.model or weights,
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn},
        "system_fingerprint": weights or None,
    }


def _content(folder: Path, segments: Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    """A text, or a list of parts if there are images."""
    if all(part["type"] == "text" for part in segments):
        return "".join(part["text"] for part in segments)
    parts: list[dict[str, Any]] = []
    for part in segments:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
        else:
            url = f"data:image/png;base64,{_base64(folder / part['image'])}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def _images(folder: Path, rows: Sequence[Mapping[str, Any]], prompt: int, drawn: int) -> dict[str, Any]:
    images = [part for row in rows for part in row["segments"] if part["type"] == "image"]
    if not images:
        raise _Failed(500, "none of the line's samples has an image")
    sizes = {f"{part['width']}x{part['height']}" for part in images}
    usage = {"input_tokens": prompt, "output_tokens": drawn, "total_tokens": prompt + drawn}
    return {
        "created": 0,
        "data": [{"b64_json": _base64(folder / part["image"])} for part in images],
        "output_format": "png",
        **({"size": sizes.pop()} if len(sizes) == 1 else {}),
        "usage": usage | {"input_tokens_details": {"text_tokens": prompt, "image_tokens": 0}},
    }


def _base64(image: Path) -> str:
    return base64.b64encode(image.read_bytes()).decode()
