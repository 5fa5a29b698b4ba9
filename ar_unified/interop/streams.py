"""Reads and writes LWM's `params` without loading it: a msgpack stream of pairs, (parts of a name, flax's bytes of one
array).

Scanned layers are one array [L, ...] with "scan_decoder" in its name. The source gives them as L tensors, with the
number of the layer in place of this part of the name. msgpack: github.com/msgpack/msgpack, spec.md. Flax writes an
array as an extension of type 1 that holds [shape, dtype, bytes], and an array of more than 2^30 bytes as a map of such
pieces.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (with this import, numpy knows bfloat16)
import numpy as np

from ar_unified.errors import UserError, in_words
from ar_unified.interop.sources import DTYPES, InFile
from ar_unified.manifests import Json
from ar_unified.tensors import Kind, Pieces, read_bytes, write_bytes_at

SCANNED = "scan_decoder"
_NAMES = {name: kind for kind, name in DTYPES.items()}
_CHUNK = 1 << 30  # maximum bytes of an array's piece, as in flax
_CHUNKED = "__msgpack_chunked_array__"
_LENGTHS = {  # maps a value's first byte to the number of bytes of the length after it
    0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4,
}  # fmt: skip
_LONGEST = 1 << 12  # maximum bytes of a text, and maximum parts of a list or map


class _Span(NamedTuple):
    """The place of skipped bytes in the file."""

    begin: int
    size: int


class _Stored(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[_Span, ...]


class Stream(InFile):
    """A source of the tensors in a stream. The file is scanned once, without reading the numbers.

    Names are parts joined by "/", without "params/" in front.

    Attributes:
        prefix: the parts "params" in front of the file's names.
        scanned: whether layers are stacked in one array.

    Raises UserError, which names the file, if it cannot be read, is damaged, or has a tensor twice.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._tensors: dict[str, tuple[_Stored, int | None]] = {}
        try:
            with open(self.path, "rb", buffering=1 << 12) as file:
                found = _entries(_Reader(file, self.path.stat().st_size))
        except OSError as error:
            raise UserError(in_words(error)) from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.path}: expected a stream of names and arrays, found a damaged one: {error}"
            ) from error
        self.prefix = next((parts[: _wrapped(parts)] for parts, _ in found if parts[0] == "params"), ())
        self.scanned = any(SCANNED in parts for parts, _ in found)
        if any(parts[0] == "params" for parts, _ in found):  # the state of a training also has the optimizer's arrays
            found = [(parts[_wrapped(parts) :], stored) for parts, stored in found if parts[0] == "params"]
        for parts, stored in found:
            layers = range(stored.shape[0]) if SCANNED in parts and stored.shape else [None]
            for layer in layers:
                name = "/".join(str(layer) if part == SCANNED and layer is not None else part for part in parts)
                if name in self._tensors:
                    raise UserError(f"{self.path}: {name!r:.120}: expected each tensor once, found it twice")
                self._tensors[name] = (stored, layer)

    def names(self) -> set[str]:
        """The names of all tensors; stacked layers have one name each."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without the axis of layers."""
        stored, layer = self._tensors[name]
        return stored.shape if layer is None else stored.shape[1:]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, a key of DTYPES. Raises UserError for a dtype that is not supported."""
        found = self._tensors[name][0].dtype
        if found not in _NAMES:
            raise UserError(f"{self.path}: {name}: expected numbers of type {', '.join(_NAMES)}; found {found!r:.40}")
        return _NAMES[found]

    def _read(self, name: str, begin: int, end: int) -> np.ndarray:
        kind = np.dtype(DTYPES[self.dtype(name)])
        stored, layer = self._tensors[name]
        first = (layer or 0) * math.prod(self.shape(name))
        return read_bytes(
            self.path, _cut(stored.pieces, (first + begin) * kind.itemsize, (first + end) * kind.itemsize)
        ).view(kind)


def _cut(pieces: tuple[_Span, ...], begin: int, end: int) -> list[_Span]:
    """The parts of consecutive spans from byte `begin` to byte `end`, counted from the start of the first span."""
    found, at = [], 0
    for piece in pieces:
        first, last = max(begin - at, 0), min(end - at, piece.size)
        if first < last:
            found.append(_Span(piece.begin + first, last - first))
        at += piece.size
    return found


def _wrapped(parts: tuple[str, ...]) -> int:
    """The number of parts "params" at the beginning of a name, at most 2."""
    return next((i for i, part in enumerate(parts[:-1][:2]) if part != "params"), min(2, len(parts) - 1))


# ---- msgpack ------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads values of a msgpack stream; bytes and extensions become spans."""

    def __init__(self, file: Any, size: int):
        self._file, self.end = file, size

    @property
    def at(self) -> int:
        return int(self._file.tell())

    def go(self, to: int) -> None:
        self._file.seek(to)

    def _take(self, n: int) -> bytes:
        if n > self.end - self.at:
            raise ValueError("it was cut short")
        return bytes(self._file.read(n))

    def _span(self, size: int) -> _Span:
        span = _Span(self.at, size)
        if size > self.end - span.begin:
            raise ValueError("it was cut short")
        self._file.seek(size, os.SEEK_CUR)
        return span

    def value(self) -> Any:
        """Reads the next value. An extension becomes (type, span)."""
        first = self._take(1)[0]
        if first <= 0x7F:
            return first
        if first in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[first]
        if 0xCC <= first <= 0xD3:
            return int.from_bytes(self._take(1 << (first & 3)), "big", signed=first >= 0xD0)
        if 0xD4 <= first <= 0xD8:
            return self._take(1)[0], self._span(1 << (first - 0xD4))
        if first in _LENGTHS:
            size = int.from_bytes(self._take(_LENGTHS[first]), "big")
        elif first <= 0xBF:
            size, first = (first & 0x1F, 0xD9) if first >= 0xA0 else (first & 0xF, 0xDC if first >= 0x90 else 0xDE)
        else:
            raise ValueError(f"it has a value that begins with the unknown byte {first:#x}")
        if first <= 0xC6:
            return self._span(size)
        if first <= 0xC9:
            return self._take(1)[0], self._span(size)
        if size > _LONGEST:
            raise ValueError(f"it has a text, list or map of length {size}, more than {_LONGEST}")
        if first <= 0xDB:
            return self._take(size).decode()
        if first <= 0xDD:
            return [self.value() for _ in range(size)]
        return {self.value(): self.value() for _ in range(size)}

    def inside(self, span: _Span) -> Any:
        """Reads the value in a span. The value must fill the span."""
        back, end = self.at, self.end
        self.go(span.begin)
        self.end = span.begin + span.size
        value = self.value()
        if self.at != self.end:
            raise ValueError("it has bytes after a value")
        self.end = end
        self.go(back)
        return value


def _entries(reader: _Reader) -> list[tuple[tuple[str, ...], _Stored]]:
    found = []
    while reader.at < reader.end:
        key, value = reader.value()
        if not isinstance(key, list) or not key or not all(isinstance(part, str) for part in key):
            raise ValueError(f"its name is not a list of strings: {key!r:.80}")
        inner = reader.inside(value)
        if key[0] != "params" and not _is_array(inner):
            continue  # part of a training's state, such as the step number
        found.append((tuple(key), _stored(reader, inner)))
    if not found:
        raise ValueError("there is nothing in it")
    return found


def _is_array(value: object) -> bool:
    return (isinstance(value, dict) and _CHUNKED in value) or (isinstance(value, tuple) and value[0] == 1)


def _stored(reader: _Reader, value: Any) -> _Stored:
    """An array as flax writes it. Raises ValueError for any other value, and if the bytes do not fit the shape."""
    if not _is_array(value):
        raise ValueError("it has a value that is not an array")
    if isinstance(value, dict):
        shape = _listed(value["shape"])
        parts = [_stored(reader, part) for part in _listed(value["chunks"])]
        stored = _Stored(tuple(shape), parts[0].dtype, tuple(span for part in parts for span in part.pieces))
        if any(part.dtype != stored.dtype for part in parts):
            raise ValueError("it has an array whose pieces have different dtypes")
    else:
        shape, dtype, span = reader.inside(value[1])
        stored = _Stored(tuple(shape), dtype, (span,))
    if not all(type(n) is int and n >= 0 for n in stored.shape) or not isinstance(stored.dtype, str):
        raise ValueError(f"it has an array with an invalid shape or dtype; the shape is {shape!r:.80}")
    size = sum(piece.size for piece in stored.pieces)
    if stored.dtype in _NAMES and Kind(stored.shape, stored.dtype).nbytes != size:
        raise ValueError(
            f"it has the wrong number of bytes, {size}, for an array of {stored.dtype} {list(stored.shape)}"
        )
    return stored


def _listed(found: dict[str, Json]) -> list[Any]:
    """Turns {"0": a, "1": b} into [a, b]."""
    return [found[str(i)] for i in range(len(found))]


# ---- writing ------------------------------------------------------------------------------------------------------


class StreamWriter:
    """A context that writes a stream. Arrays may come in any order; all must be complete at the end.

    Args:
        path: the file to make.
        kinds: the shape and dtype of each array by its name, such as
            "transformer/h/scan_decoder/attention/wq/kernel".
        prefix: the parts in front of each name.

    Raises UserError for an array of 2^32 bytes or more, which the format cannot have.
    """

    def __init__(self, path: Path, kinds: Mapping[str, Kind], prefix: tuple[str, ...] = ("params", "params")):
        self._pieces = Pieces(kinds)
        self._places: dict[str, list[_Span]] = {}
        at = 0
        heads: list[tuple[int, bytes]] = []
        for name, kind in kinds.items():
            parts = _array_parts(kind)
            size = sum(len(part) if isinstance(part, bytes) else part for part in parts)
            if size >= 1 << 32:
                raise UserError(
                    f"{name}: expected less than 4 GiB, the maximum for an array in this format, found {size} bytes: "
                    "write a tensor for each layer"
                )
            key = [*prefix, *name.split("/")]
            front = bytes([0x92]) + _list(len(key)) + b"".join(map(_text, key)) + _sized(0xC4, size)
            self._places[name] = []
            for part in (front, *parts):
                if isinstance(part, bytes):
                    heads.append((at, part))
                    at += len(part)
                else:
                    self._places[name].append(_Span(at, part))
                    at += part
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(self._handle, at)
        for where, head in heads:
            write_bytes_at(self._handle, head, where)

    def put(self, name: str, array: np.ndarray, at: int | None = None) -> None:
        """Writes an array, or its part at index `at` of the first axis. Raises ValueError for a wrong kind or index."""
        data, begin = self._pieces.take(name, array, at)
        for span in _cut(tuple(self._places[name]), begin, begin + array.nbytes):
            part, data = data[: span.size], data[span.size :]
            write_bytes_at(self._handle, part, span.begin)

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.fsync(self._handle)
        os.close(self._handle)
        if kind is None:
            self._pieces.require_all()


def _array_parts(kind: Kind) -> list[bytes | int]:
    """An array as flax writes it. Each int in the result stands for numbers of the array, and is their length in
    bytes."""
    if kind.nbytes <= _CHUNK:
        return _whole_array(kind)
    per_chunk = _CHUNK // np.dtype(kind.dtype).itemsize
    total = math.prod(kind.shape)
    sizes = [min(per_chunk, total - begin) for begin in range(0, total, per_chunk)]
    shape = b"".join(_text(str(i)) + _int(n) for i, n in enumerate(kind.shape))
    head = bytes([0x83]) + _text(_CHUNKED) + b"\xc3" + _text("shape") + _map(len(kind.shape)) + shape
    parts: list[bytes | int] = [head + _text("chunks") + _map(len(sizes))]
    for i, size in enumerate(sizes):
        parts += [_text(str(i)), *_whole_array(Kind((size,), kind.dtype))]
    return parts


def _whole_array(kind: Kind) -> list[bytes | int]:
    shape = _list(len(kind.shape)) + b"".join(map(_int, kind.shape))
    inner = bytes([0x93]) + shape + _text(kind.dtype) + _sized(0xC4, kind.nbytes)
    size = len(inner) + kind.nbytes
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(size)
    outer = bytes([fixed]) if fixed else _sized(0xC7, size)
    return [outer + b"\x01" + inner, kind.nbytes]


def _sized(first: int, size: int) -> bytes:
    """A header with a length. `first` is the type byte for a one-byte length; the next two type bytes are for
    lengths of two and four bytes."""
    power = 0 if size < 1 << 8 else 1 if size < 1 << 16 else 2
    return bytes([first + power]) + size.to_bytes(1 << power, "big")


def _text(text: str) -> bytes:
    data = text.encode()
    return (bytes([0xA0 | len(data)]) if len(data) < 32 else _sized(0xD9, len(data))) + data


def _list(n: int) -> bytes:
    return bytes([0x90 | n]) if n < 16 else b"\xdc" + n.to_bytes(2, "big")


def _map(n: int) -> bytes:
    return bytes([0x80 | n]) if n < 16 else b"\xde" + n.to_bytes(2, "big")


def _int(n: int) -> bytes:
    return bytes([n]) if n < 128 else _sized(0xCC, n)
