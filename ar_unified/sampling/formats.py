"""Files of requests -> rows: one small reader per format, each giving what a line of our own JSONL says.

    *.jsonl   a line is a request of ours, a plain {"prompt"}, a line of an OpenAI batch, or one of GenEval's metadata
    *.txt     a line is a prompt; so are T2I-CompBench's files
    *.tar     WebDataset: key.txt is a prompt, key.json a request, key.png, key.jpg, ... pictures in front of the prompt
    *.json    an object of requests by id (MJHQ-30K's meta_data.json), or a list of them
    a folder  of ID.txt, a prompt each (DPG-Bench's prompts)

What cannot be read becomes a row with an error, and the rows behind it are read all the same. Pictures are named by the
rows and read later: files under the folder of the requests (`data.files`), members of the tar, or data: URLs. Text is
UTF-8 (`data.encoding`).
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ar_unified.data import encoding
from ar_unified.data.files import FileError, Folder, data_url
from ar_unified.data.images import SUFFIXES
from ar_unified.sampling.request import RequestError

_MOST_BYTES = 1 << 28  # of a picture's file
_MOST_TEXT = 1 << 24  # bytes of a prompt's file
_PICTURES = tuple(suffix[1:] for suffix in SUFFIXES)
_GENEVAL = {"tag", "include", "prompt"}


@dataclass(frozen=True)
class Row:
    """One request as it stands in its file.

    Attributes:
        number: from 1; the line, where the file has lines.
        data: what the request says, with the keys of our JSONL. error: why there is no data, or "".
        load: the bytes of a picture by the name that the row gives it; raises RequestError, FileError or OSError.
    """

    number: int
    data: Mapping[str, Any]
    load: Callable[[str], bytes]
    error: str = ""


def read_rows(path: str | Path, links: bool = False) -> Iterator[Row]:
    """The requests of a file or folder, in order, without blank lines. Raises OSError; RequestError: a broken file.

    `links`: whether links that lead out of the requests' folder are followed, to pictures and to prompts in a folder.

    The format is that of the name's suffix; without one that is known, lines beginning with "{" are JSONL.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _rows(path, _folder(path, links), links)
    if suffix == ".tar":
        return _tar(path)
    if suffix == ".json":
        return _rows(path.parent, _json(path), links)
    if suffix == ".txt" or (suffix != ".jsonl" and not _begins_with_object(path)):
        return _rows(path.parent, ((number, partial(_prompt, line)) for number, line in _lines(path)), links)
    return _rows(path.parent, ((number, partial(_request, line)) for number, line in _lines(path)), links)


def fingerprint(paths: Sequence[str | Path]) -> str:
    """sha256 of everything the files (of a folder: all its prompts) say."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _rows(folder: Path, entries: Iterator[tuple[int, Callable[[], Mapping[str, Any]]]], links: bool) -> Iterator[Row]:
    load = Folder(folder, links).read
    for number, read in entries:
        try:
            yield Row(number, read(), load)
        except RequestError as error:
            yield Row(number, {}, load, str(error))


# ---- lines ------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line = line if number > 1 else _whole(line)  # that it is no UTF-8 shows in the file's first bytes
            except RequestError as error:
                raise RequestError(f"{path}: {error}") from None
            if line.strip():
                yield number, line


def _begins_with_object(path: Path) -> bool:
    return next((line.lstrip().startswith(b"{") for _, line in _lines(path)), True)


def _prompt(data: bytes) -> dict[str, Any]:
    return {"prompt": _text(data).strip()}


def _request(data: bytes) -> Mapping[str, Any]:
    row = _value(data)
    if not isinstance(row, dict):
        raise RequestError(f"expected a JSON object, found {type(row).__name__}")
    if "custom_id" in row:
        return _openai(row)
    if row.keys() >= _GENEVAL:
        return {"prompt": row["prompt"], "meta": row}
    return row


def _text(data: bytes) -> str:
    try:
        return encoding.text(data)
    except encoding.EncodingError as error:
        raise RequestError(str(error)) from None


def _whole(data: bytes) -> bytes:
    """A file, or its first line, without a byte order mark. Raises RequestError: it is no UTF-8."""
    try:
        return encoding.unmarked(data)
    except encoding.EncodingError as error:
        raise RequestError(str(error)) from None


def _value(data: bytes) -> Any:
    try:
        return json.loads(_text(data))
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"expected one JSON object, found {data[:40]!r}: {error}") from None


# ---- OpenAI batches ---------------------------------------------------------------------------------------------


def _openai(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of an OpenAI batch file: the messages become one prompt; settings of ours may stand in the body, too."""
    unknown = row.keys() - {"custom_id", "method", "url", "body"}
    if unknown:
        raise RequestError(f"unknown key {min(unknown)!r}; known beside custom_id: method, url, body")
    if not str(row.get("url", "/v1/chat/completions")).endswith("/chat/completions"):
        raise RequestError(f"url: expected /v1/chat/completions, found {row['url']!r:.80}")
    if not isinstance(row.get("body"), dict) or not isinstance(row["body"].get("messages"), list):
        raise RequestError("body: expected an object with a list of messages")
    body = {key: value for key, value in row["body"].items() if key not in ("messages", "model")}
    content = [part for message in row["body"]["messages"] for part in _message(message)]
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    drawn = {key: body.pop(key) for key in ("temperature", "top_p") if key in body}
    if drawn and isinstance(body.setdefault("text", {}), dict):
        body["text"] = {**drawn, **body["text"]}
    return {"id": row["custom_id"], "content": content, **body}


def _message(message: Any) -> list[Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "developer", "user"):
        raise RequestError(f"messages: expected the roles system and user (there is one turn), found {role!r:.80}")
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError(f"messages: expected content, a text or a list of parts, found {content!r:.80}")
    return [_openai_part(part) for part in content]


def _openai_part(part: Any) -> Any:
    if not (isinstance(part, dict) and part.get("type") == "image_url"):
        return part
    url = part.get("image_url")
    return {"type": "image", "image": url.get("url") if isinstance(url, dict) else url}


# ---- files that are not lines -----------------------------------------------------------------------------------


def _json(path: Path) -> Iterator[tuple[int, Callable[[], Mapping[str, Any]]]]:
    try:
        value = _value(_whole(path.read_bytes()))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None

    def named(id: str, row: Any) -> Mapping[str, Any]:
        if not isinstance(row, dict):
            raise RequestError(f"expected a JSON object, found {row!r:.80}")
        meta = {key: value for key, value in row.items() if key != "prompt"}
        return {"id": id, "prompt": row.get("prompt"), "meta": meta}

    if isinstance(value, dict):
        yield from ((i, partial(named, id, row)) for i, (id, row) in enumerate(value.items(), 1))
    elif isinstance(value, list):
        yield from ((i, partial(_request, json.dumps(row).encode())) for i, row in enumerate(value, 1))
    else:
        raise RequestError(f"{path}: expected an object of requests by id, or a list, found {type(value).__name__}")


def _folder(path: Path, links: bool) -> Iterator[tuple[int, Callable[[], Mapping[str, Any]]]]:
    folder = Folder(path, links)

    def named(file: Path) -> dict[str, Any]:
        try:
            data = folder.read_file(file.name)
        except FileError as error:
            raise RequestError(f"{file.name}: {error.reason}") from None
        return {"id": file.stem, **_prompt(_whole(data))}

    yield from ((i, partial(named, file)) for i, file in enumerate(sorted(path.glob("*.txt")), 1))


def _tar(path: Path) -> Iterator[Row]:
    """The samples of a WebDataset shard: consecutive members whose names are alike up to the first dot."""

    def regular(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        try:
            yield from (member for member in tar if member.isreg() and not member.issparse())
        except tarfile.TarError as error:
            raise RequestError(f"{path}: expected a whole, uncompressed tar: {error}") from None

    with _opened(path) as tar:
        members = regular(tar)
        for number, (key, group) in enumerate(groupby(members, lambda member: _key(member.name)[0]), 1):
            found = list(group)
            load = partial(_member, path, {member.name: member for member in found})
            try:
                yield Row(number, _sample(tar, key, found), load)
            except RequestError as error:
                yield Row(number, {"id": key.replace("/", "-")}, load, str(error))


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except tarfile.TarError as error:
        raise RequestError(f"{path}: expected a whole, uncompressed tar: {error}") from None


def _key(name: str) -> tuple[str, str]:
    """ "dir/0001.seg.png" -> ("dir/0001", "seg.png")."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder.removeprefix("./") + slash + stem, extension.lower()


def _sample(tar: tarfile.TarFile, key: str, members: Sequence[tarfile.TarInfo]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    texts: list[str] = []
    pictures: list[dict[str, str]] = []
    for member in members:
        extension = _key(member.name)[1]
        if extension.rpartition(".")[2] in _PICTURES:
            pictures.append({"type": "image", "image": member.name})
        elif extension in ("txt", "json") and member.size <= _MOST_TEXT:
            stream = tar.extractfile(member)
            assert stream is not None  # a regular file
            if extension == "txt":
                texts.append(_text(_whole(stream.read())).strip())
            else:
                row = dict(_request(_whole(stream.read())))
        else:
            raise RequestError(f"{member.name}: expected a short .txt or .json, or a picture ({', '.join(_PICTURES)})")
    if texts and row.keys() & {"prompt", "content"}:
        raise RequestError(f"{key}: expected the prompt in {key}.txt or in {key}.json, found both")
    texts += [row.pop("prompt")] if "prompt" in row and pictures else []
    if pictures and "content" not in row:
        row["content"] = [*pictures, *({"type": "text", "text": text} for text in texts)]
    elif texts:
        row["prompt"] = texts[0]
    return {"id": key.replace("/", "-"), **row}


def _member(path: Path, members: Mapping[str, tarfile.TarInfo], name: str) -> bytes:
    if name.startswith("data:"):
        return data_url(name)
    if name not in members:
        raise RequestError(f"expected one of the sample's members {', '.join(members)}")
    member = members[name]
    if member.size > _MOST_BYTES:
        raise RequestError(f"expected at most {_MOST_BYTES} bytes, found {member.size}")
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)
