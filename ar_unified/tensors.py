"""Writes named tensors into a folder of .safetensors files. Each part is written to its place immediately, so it does
not stay in memory.

A file is [8 bytes: length of the header][header: name -> dtype, shape, begin and end][the tensors, one after another],
so the place of each part is known before its values (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401 (adds bfloat16 to numpy)
import numpy as np
from ar_tokenizers.files import write_bytes
from ar_tokenizers.trees import Params as Params
from safetensors import safe_open
from safetensors.numpy import save

INDEX = "model.safetensors.index.json"
_NAMES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class Kind(NamedTuple):
    """A shape, and a dtype by its numpy name."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Pieces:
    """Checks that each part of the named tensors is written exactly once."""

    def __init__(self, kinds: Mapping[str, Kind]):
        self._kinds = kinds
        self._left = {name: kind.nbytes for name, kind in kinds.items()}
        self._put: set[tuple[str, int | None]] = set()

    def take(self, name: str, array: np.ndarray, at: int | None) -> tuple[memoryview, int]:
        """The bytes of a tensor, or of its part at index `at` of the first axis, and their offset in the tensor.

        Raises ValueError for a wrong shape or dtype, or for an index that is out of range or already written.
        """
        kind = self._kinds[name]
        shape = kind.shape if at is None else kind.shape[1:]
        if array.shape != shape or array.dtype != np.dtype(kind.dtype):
            raise ValueError(f"{name}: expected {kind.dtype} {list(shape)}, found {array.dtype} {list(array.shape)}")
        if (name, at) in self._put or (at is not None and not 0 <= at < kind.shape[0]):
            raise ValueError(f"{name} {list(kind.shape)}: expected each index once, found {at} twice or out of range")
        self._put.add((name, at))
        self._left[name] -= array.nbytes
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, (at or 0) * array.nbytes

    def require_all(self) -> None:
        """Raises AssertionError, which names the tensor, if bytes of a tensor are missing."""
        if wrong := [name for name, left in self._left.items() if left]:
            raise AssertionError(f"{wrong[0]}: {self._left[wrong[0]]} bytes of this tensor were not written")


class TensorWriter:
    """A context that writes tensors by name. When it ends, every tensor is complete, or an error is raised.

    Args:
        folder: an existing folder that does not have any of the files.
        kinds: shape and dtype of every tensor. The files are filled in this order.
        shard_bytes: the largest size of a file; a larger tensor has its own file.
        alone: if one file is enough for all tensors, it is called model.safetensors and has no index, as in
            transformers.
        stem: the beginning of file names, instead of "model".
        metadata: the metadata in each file's header.
    """

    def __init__(
        self,
        folder: Path,
        kinds: Mapping[str, Kind],
        shard_bytes: int,
        *,
        alone: bool = False,
        stem: str = "model",
        metadata: Mapping[str, str] | None = None,
    ):
        shards: list[dict[str, Kind]] = [{}]
        size = 0
        for name, kind in kinds.items():
            if shards[-1] and size + kind.nbytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = kind
            size += kind.nbytes
        self._folder, self._pieces = folder, Pieces(kinds)
        self._places: dict[str, tuple[int, int]] = {}  # file handle, and position in the file
        self._handles: list[int] = []
        self.files: dict[str, str] = {}
        only = alone and len(shards) == 1
        for number, shard in enumerate(shards, 1):
            file = f"{stem}.safetensors" if only else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(file, shard, dict(metadata or {"format": "np"}))
            self.files |= dict.fromkeys(shard, file)
        if not only:
            total = sum(kind.nbytes for kind in kinds.values())
            index = {"metadata": {"total_size": total}, "weight_map": self.files}
            (folder / INDEX.replace("model", stem, 1)).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(self, file: str, shard: Mapping[str, Kind], metadata: dict[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": metadata}
        # The widest dtypes come first, because readers want every tensor aligned.
        order = sorted(shard, key=lambda name: (-np.dtype(shard[name].dtype).itemsize, name))
        end = 0
        begins = {}
        for name in order:
            begins[name], end = end, end + shard[name].nbytes
            header[name] = {
                "dtype": _NAMES[shard[name].dtype],
                "shape": list(shard[name].shape),
                "data_offsets": [begins[name], end],
            }
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        handle = os.open(self._folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._handles.append(handle)
        write_bytes_at(handle, len(head).to_bytes(8, "little") + head, 0)
        os.truncate(handle, 8 + len(head) + end)
        self._places |= {name: (handle, 8 + len(head) + begin) for name, begin in begins.items()}

    def put(self, name: str, array: np.ndarray, at: int | None = None) -> None:
        """Writes a tensor, or its part at index `at` of the first axis. Raises ValueError like `Pieces.take`."""
        data, begin = self._pieces.take(name, array, at)
        handle, first = self._places[name]
        write_bytes_at(handle, data, first + begin)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for handle in self._handles:
            if kind is None:
                os.fsync(handle)
            os.close(handle)
        if kind is None:
            self._pieces.require_all()


def read_bytes(path: Path, pieces: Sequence[tuple[int, int]]) -> np.ndarray:
    """Reads the piece of a file at each (begin, length). Returns the bytes of all pieces, one after another, as uint8.

    The pieces are read and not mapped, because the pages of a mapped file count as memory of this process while it is
    mapped. Raises OSError, also if the file ends too early.
    """
    out = np.empty(sum(length for _, length in pieces), np.uint8)
    view = memoryview(out.data)
    handle = os.open(path, os.O_RDONLY)
    try:
        for begin, length in pieces:
            part, view = view[:length], view[length:]
            while part:
                if not (count := os.preadv(handle, [part[: 1 << 30]], begin)):
                    raise OSError(errno.EIO, "the file ends before its tensors do", str(path))
                part, begin = part[count:], begin + count
    finally:
        os.close(handle)
    return out


def write_bytes_at(handle: int, data: bytes | memoryview, at: int) -> None:
    """Writes all bytes into an open file, from position `at` on. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view[: 1 << 30], at)
        view, at = view[written:], at + written


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a few tensors into one file, completely or not at all. Raises OSError."""
    write_bytes(path, save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a file. Raises SafetensorError, OSError."""
    with safe_open(path, framework="numpy") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}
