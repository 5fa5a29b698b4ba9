"""Reads rows from files of requests. Each format has a small reader, which returns rows with the keys of our own JSONL.

    *.jsonl   a line is a request of ours, a plain {"prompt"}, a line of an OpenAI batch or of GenEval's metadata
    *.txt     a line is a prompt, as in T2I-CompBench's files
    *.tsv, *.csv, *.parquet   a row is a request (`sampling.tables`), as in PartiPrompts.tsv and DiffusionDB's metadata
    *.tar     WebDataset: key.txt is a prompt, key.json a request, key.png, key.jpg, ... images in front of the prompt
    *.json    an object of requests by id (MJHQ-30K's meta_data.json), or a list; an entry that is a text is a prompt
    a folder of ID.txt, each with one prompt (DPG-Bench's prompts)

An unreadable row becomes a row with an error, and the following rows are still read. The following never become
prompts: the header of a table, other members of a tar, README and LICENSE files, hidden files, and files that macOS
adds to archives (__MACOSX, ._*). Text is UTF-8 (`data.encoding`). Rows only name their images, which are read later. An
image is a file under the folder of the requests (`data.files`), a member of the tar, or a data: URL. Nothing is
downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ar_unified.data import encoding
from ar_unified.data.files import LARGEST, FileError, Folder, hidden, meant, require_file
from ar_unified.data.images import SUFFIXES
from ar_unified.manifests import Json
from ar_unified.sampling import tables
from ar_unified.sampling.request import RequestError

_MOST_TEXT = 1 << 24  # most bytes of a prompt's file
_IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
_TEXTS = (".txt", ".jsonl", ".csv", ".tsv")  # in these files, a zero byte is an error of its line
_GENEVAL = {"tag", "include", "prompt"}
_MJHQ = {"category", "prompt"}
# Names of files that are not prompts.
_ABOUT = re.compile(r"(readme|licen[cs]e|notice|copying|changelog|citation)(\.\w+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One request, as read from a file.

    Attributes:
        number: from 1; the line number, if the file has lines.
        data: the request's settings, with the keys of our JSONL.
        error: why there is no data, or "".
        load: returns the bytes of an image that the row names; raises RequestError, FileError or OSError.
        foreign: whether the row was written for other programs (a table, a shard's metadata), not as a request.
    """

    number: int
    data: Mapping[str, Json]
    load: Callable[[str], bytes]
    error: str = ""
    foreign: bool = False


Left = Callable[[str], None]  # is called with the kind of each thing that is left out


def read_rows(path: str | Path, leave: Left = lambda kind: None, links: bool = False) -> Iterator[Row]:
    """The requests of a file or folder, in order, without blank lines. Raises OSError, and RequestError for a broken
    file.

    The name's suffix gives the format. Without a known suffix, a file whose lines begin with "{" is JSONL. `leave` is
    called for everything that is left out because it is not a prompt, except hidden files. Its argument is the kind,
    such as "README.txt" or "members .cls". `links`: whether to follow links that lead out of the requests' folder. Such
    a link may be an image, or a prompt in a folder.
    """
    path = Path(path)
    suffix, folder = path.suffix.lower(), Folder(path if path.is_dir() else path.parent, links)
    if path.is_dir():
        return _rows(folder, _folder(folder, leave))
    if path.exists():
        require_file(path)  # refuses a pipe, because it can be read only once
    if suffix in _PACKED:
        raise RequestError(f"{path}: expected a file that is not compressed: unpack it first")
    if suffix == ".tar":
        return _tar(path, leave)
    if suffix == ".json":
        return _rows(folder, _json(path))
    if suffix == ".parquet":
        return _rows(folder, tables.parquet(path, leave), foreign=True)
    if suffix in (".csv", ".tsv"):
        return _rows(folder, tables.delimited(path, _texts(path)), foreign=True)
    if suffix == ".txt" or (suffix != ".jsonl" and not _begins_with_object(path)):
        return _text_file(path, folder, leave)
    return _rows(folder, ((number, partial(_request, line)) for number, line in _lines(path)))


def fingerprint(paths: Sequence[str | Path]) -> str:
    """sha256 of the content of all files; for a folder, of the files with its prompts."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        for file in filter(Path.is_file, _prompt_files(path)) if path.is_dir() else [path]:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _rows(
    folder: Folder, entries: Iterator[tuple[int, Callable[[], Mapping[str, Json]]]], foreign: bool = False
) -> Iterator[Row]:
    load = folder.read
    for number, read in entries:
        try:
            yield Row(number, read(), load, foreign=foreign)
        except RequestError as error:
            yield Row(number, {}, load, str(error))


def _hidden(name: str) -> bool:
    """Whether a path in an archive is hidden or made by an operating system: .DS_Store, ._a.txt, __MACOSX/a."""
    return any(hidden(part) for part in name.split("/") if part not in ("", "."))


# ---- lines ------------------------------------------------------------------------------------------------------


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their line ends, without a byte order mark. Raises RequestError if it is not UTF-8."""
    with open(path, "rb") as file:
        try:
            start = encoding.begin(file)
        except encoding.EncodingError as error:
            raise RequestError(f"{path}: {error}") from None
        if path.suffix.lower() not in _TEXTS and b"\0" in file.read(encoding.HEAD):
            raise RequestError(f"{path}: expected a file of requests, found a file that is not text")
        file.seek(start)
        yield from file


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    yield from ((number, line) for number, line in enumerate(_raw_lines(path), 1) if line.strip())


def _begins_with_object(path: Path) -> bool:
    return next((line.lstrip().startswith(b"{") for _, line in _lines(path)), True)


def _texts(path: Path) -> Iterator[str]:
    """The lines of a table with their line ends, blank lines included, because a cell may contain them."""
    for number, line in enumerate(_raw_lines(path), 1):
        try:
            yield encoding.text(line)
        except encoding.EncodingError as error:
            raise RequestError(f"{path}, line {number}: {error}") from None


def _text_file(path: Path, folder: Folder, leave: Left) -> Iterator[Row]:
    """Each line is a prompt. A header in the first line is left out. If the header has tabs, the file is read as a
    table.
    """
    try:
        first = _text(next((line for _, line in _lines(path)), b"")).strip()
    except RequestError:
        first = ""  # the error is reported when this row is read
    if "\t" in first and tables.header(first):
        yield from _rows(folder, tables.delimited(path, _texts(path)), foreign=True)
        return
    lines = _lines(path)
    if tables.header(first):
        next(lines)
        leave(f"the header {first!r}")
    yield from _rows(folder, ((number, partial(_prompt, line)) for number, line in lines))


def _prompt(data: bytes) -> dict[str, Json]:
    return {"prompt": _text(data).strip()}


def _request(data: bytes) -> Mapping[str, Json]:
    row = _value(data)
    if not isinstance(row, dict):
        raise RequestError(f"expected a JSON object, found {type(row).__name__}")
    if row.keys() >= _GENEVAL:
        return {"prompt": row["prompt"], "meta": row}
    return row


def _text(data: bytes) -> str:
    try:
        return encoding.text(data)
    except encoding.EncodingError as error:
        raise RequestError(str(error)) from None


def _whole(data: bytes) -> bytes:
    """The text of a file without a byte order mark. Raises RequestError if it is not UTF-8."""
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


# ---- files that are not lines -----------------------------------------------------------------------------------


def _json(path: Path) -> Iterator[tuple[int, Callable[[], Mapping[str, Json]]]]:
    try:
        value = _value(_whole(path.read_bytes()))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None

    def one(row: object) -> Mapping[str, Json]:
        return {"prompt": row} if isinstance(row, str) else _request(json.dumps(row).encode())

    def named(id: str, row: object) -> Mapping[str, Json]:
        if isinstance(row, dict) and row.keys() == _MJHQ:
            row = {"prompt": row["prompt"], "meta": {"category": row["category"]}}
        return {"id": id, **one(row)}

    if isinstance(value, dict):
        yield from ((i, partial(named, id, row)) for i, (id, row) in enumerate(value.items(), 1))
    elif isinstance(value, list):
        yield from ((i, partial(one, row)) for i, row in enumerate(value, 1))
    else:
        found = type(value).__name__
        raise RequestError(f"{path}: expected a JSON object with a request for each id, or a list, found {found}")


def _folder(folder: Folder, leave: Left) -> Iterator[tuple[int, Callable[[], Mapping[str, Json]]]]:
    def named(file: Path) -> dict[str, Json]:
        try:
            data = folder.read_file(file.name)
        except FileError as error:
            raise RequestError(f"{file.name}: {error.reason}") from None
        return {"id": file.stem, **_prompt(_whole(data))}

    files = _prompt_files(folder.root)
    if not files:
        raise RequestError(
            f"{folder.root}: expected a folder of .txt files with one prompt each, found no .txt file: "
            "give such a folder, or a file of requests"
        )
    for file in sorted(folder.root.iterdir()):
        if file not in files and not hidden(file.name):
            leave(file.name if _ABOUT.fullmatch(file.name) else f"files {file.suffix}" if file.suffix else file.name)
    yield from ((i, partial(named, file)) for i, file in enumerate(files, 1))


def _prompt_files(folder: Path) -> list[Path]:
    texts = (file for file in folder.iterdir() if file.suffix.lower() == ".txt")
    return sorted(file for file in texts if not hidden(file.name) and not _ABOUT.fullmatch(file.name))


def _tar(path: Path, leave: Left) -> Iterator[Row]:
    """The samples of a WebDataset shard: consecutive members with equal names up to the first dot."""

    def regular(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        try:
            for member in tar:
                if member.isreg() and not member.issparse() and not _hidden(member.name):
                    if _useful(member.name):
                        yield member
                    else:
                        name = member.name.rpartition("/")[2]
                        leave(name if _ABOUT.fullmatch(name) else f"members .{_key(name)[1]}")
        except tarfile.TarError as error:
            raise RequestError(f"{path}: expected a whole, uncompressed tar: {error}") from None

    with _opened(path) as tar:
        members = regular(tar)
        for number, (key, group) in enumerate(groupby(members, lambda member: _key(member.name)[0]), 1):
            found = list(group)
            load = partial(_member, path, {member.name: member for member in found})
            foreign = any(_key(member.name)[1] == "txt" for member in found)
            try:
                yield Row(number, _sample(tar, key, found), load, foreign=foreign)
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
    return (folder + slash).removeprefix("./") + stem, extension.lower()


def _useful(name: str) -> bool:
    """Whether a member of a tar is a prompt, a request or an image."""
    extension = _key(name)[1]
    image = extension.rpartition(".")[2] in _IMAGES
    return (extension in ("txt", "json") or image) and not _ABOUT.fullmatch(name.rpartition("/")[2])


def _sample(tar: tarfile.TarFile, key: str, members: Sequence[tarfile.TarInfo]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    texts: list[str] = []
    images: list[dict[str, str]] = []
    for member in members:
        extension = _key(member.name)[1]
        if extension.rpartition(".")[2] in _IMAGES:
            images.append({"type": "image", "image": member.name})
        elif member.size <= _MOST_TEXT:
            stream = tar.extractfile(member)
            assert stream is not None  # the member is a regular file
            if extension == "txt":
                texts.append(_text(_whole(stream.read())).strip())
            else:
                row = dict(_request(_whole(stream.read())))
        else:
            raise RequestError(f"{member.name}: expected at most {_MOST_TEXT} bytes of text, found {member.size}")
    if texts and row.keys() & {"prompt", "content"}:
        raise RequestError(f"{key}: expected the prompt in {key}.txt or in {key}.json, found both")
    texts += [row.pop("prompt")] if "prompt" in row and images else []
    if images and "content" not in row:
        row["content"] = [*images, *({"type": "text", "text": text} for text in texts)]
    elif texts:
        row["prompt"] = texts[0]
    return {"id": key.replace("/", "-"), **row}


def _member(path: Path, members: Mapping[str, tarfile.TarInfo], name: str) -> bytes:
    found = meant(name)
    if isinstance(found, bytes):
        return found
    if found not in members:
        raise RequestError(f"expected the name of a file in the sample ({', '.join(members)}), found {found!r:.80}")
    member = members[found]
    if member.size > LARGEST:
        raise RequestError(f"expected at most {LARGEST} bytes, found {member.size}")
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)
