"""Reads the tensors of published files one at a time. A file is neither loaded whole nor mapped into memory.

A folder from somebody else is not trusted: an index may name only files beside it, a file must be as long as its header
says, and nothing in it is ever run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from ar_unified.data.files import FileError, Folder
from ar_unified.errors import UserError, in_words
from ar_unified.recognised import LFS, PICKLED
from ar_unified.tensors import INDEX, read_bytes

ALONE = "model.safetensors"
DTYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "I64": "int64"}  # dtypes by their names in a file
_CONVERT = "is pickled: convert it to .safetensors with `ar-unified convert-pickle`"
_LARGEST = 1 << 26  # maximum bytes of a JSON file


class Source(Protocol):
    """Tensors that are read by name."""

    def names(self) -> set[str]:
        """The names of all tensors."""

    def shape(self, name: str, /) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""

    def dtype(self, name: str, /) -> str:
        """The dtype of a tensor, a key of DTYPES."""
        ...

    def read(self, name: str, /) -> np.ndarray:
        """The whole tensor."""

    def read_rows(self, name: str, begin: int, end: int, /) -> np.ndarray:
        """Rows `begin` to `end` - 1 of a tensor's first axis."""
        ...


def open_source(path: str | Path) -> Source:
    """The tensors of a .safetensors file, or of a folder that has one or several of them.

    Raises UserError, which names the file, if a file is missing or damaged, if an index does not fit the files, or if
    a tensor occurs twice.
    """
    path = Path(path)
    if path.is_file():
        return Safetensors({path.name: path})
    if not path.is_dir():
        raise UserError(f"{path}: expected a folder with .safetensors files, or one such file; found nothing")
    if (path / INDEX).exists():
        return Safetensors(*_indexed(path))
    files = [path / ALONE] if (path / ALONE).exists() else sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(each.name for each in path.iterdir() if each.suffix in PICKLED)
        more = f": {pickled[0]} {_CONVERT}" if pickled else ""
        raise UserError(f"{path}: expected .safetensors files, found none{more}")
    return Safetensors({file.name: inside(path, file.name) for file in files})


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, by a name that is not trusted. The file may be a link into the Hugging Face
    cache. Raises UserError if there is no such file in the folder.
    """
    try:
        found = Folder(folder).path(name)
    except FileError as error:
        raise UserError(f"{folder}: {name!r:.80}: {error.reason}") from error
    if not found.is_file():
        raise UserError(f"{folder}: expected a file {name!r:.80}, found none")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The keys and values in a JSON file that is not trusted. Raises UserError, which names the file, if there are
    none."""
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path}: expected at most {_LARGEST} bytes of JSON, found {path.stat().st_size}")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(in_words(error)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected keys and values, found {found!r:.80}")
    return found


def _indexed(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    path = inside(folder, INDEX)
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise UserError(f"{path}: weight_map: expected the file of each tensor, found {found!r:.80}")
    files = sorted(set(found.values()))
    if missing := [file for file in files if not (folder / file).exists()]:
        raise UserError(
            f"{path}: expected all {len(files)} files that it names, found {len(files) - len(missing)}: the download "
            f"is not complete, for example {missing[0]!r:.80} is missing"
        )
    return {file: inside(folder, file) for file in files}, found


class _Place(NamedTuple):
    """Where a tensor is; `kind` is the name of its dtype in the file."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    begin: int


class InFile:
    """A source whose files store the numbers of each tensor one after another."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Subclasses define it."""
        raise NotImplementedError

    def _read(self, name: str, begin: int, end: int) -> np.ndarray:
        """Numbers `begin` to `end` - 1 of a tensor, as an array [end - begin]."""
        raise NotImplementedError

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, read from its file."""
        shape = self.shape(name)
        return self._read(name, 0, math.prod(shape)).reshape(shape)

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows of a tensor. Nothing else is read from its file."""
        shape = self.shape(name)[1:]
        row = math.prod(shape)
        return self._read(name, begin * row, end * row).reshape(end - begin, *shape)


class Safetensors(InFile):
    """The tensors of several files. `told` maps each tensor to its file, as an index does."""

    def __init__(self, files: Mapping[str, Path], told: Mapping[str, str] | None = None):
        self._places: dict[str, _Place] = {}
        for file, path in files.items():
            found = _places(path)
            wanted = {name for name, where in told.items() if where == file} if told is not None else set(found)
            if wrong := sorted(found.keys() ^ wanted):
                what = "is only in the index, not in the file" if wrong[0] in wanted else "is not in the index"
                raise UserError(f"{path}: {wrong[0]!r:.120} {what}")
            if twice := sorted(found.keys() & self._places.keys()):
                raise UserError(f"{path}: {twice[0]!r:.120}: expected each tensor once, but another file has it too")
            self._places |= found

    def names(self) -> set[str]:
        """The names of all tensors of all files."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header of its file."""
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, a key of DTYPES. Raises UserError for an unsupported dtype, such as fp8."""
        place = self._places[name]
        if place.kind not in DTYPES:
            raise UserError(
                f"{place.path}: {name}: expected numbers of type {', '.join(DTYPES)}; found {place.kind}: convert the "
                "file to bfloat16 with the program that made it"
            )
        return place.kind

    def _read(self, name: str, begin: int, end: int) -> np.ndarray:
        kind = np.dtype(DTYPES[self.dtype(name)])
        place = self._places[name]
        at = place.begin + begin * kind.itemsize
        return read_bytes(place.path, [(at, (end - begin) * kind.itemsize)]).view(kind)


def _places(path: Path) -> dict[str, _Place]:
    try:
        with safe_open(path, framework="numpy") as opened:  # this checks that the header fits the file
            names = set(opened.keys())
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        with open(path, "rb") as file:
            begin = file.read(len(LFS))
        if begin == LFS:
            raise UserError(
                f"{path}: expected tensors, found a pointer of Git LFS: fetch the content with `git lfs pull`"
            ) from error
        if (
            path.suffix in PICKLED
            or begin.startswith(b"PK\3\4")
            or (begin[:1] == b"\x80" and path.suffix != ".safetensors")
        ):
            raise UserError(f"{path}: it {_CONVERT}") from error
        raise UserError(f"{path}: {error}: the file was cut short, or is not a safetensors file") from error
    return {
        name: _Place(
            path, header[name]["dtype"], tuple(header[name]["shape"]), 8 + length + header[name]["data_offsets"][0]
        )
        for name in names
    }
