"""Keeps the codes of images by their content, so that a second `prepare` (for another text tokenizer or one more
source) does not encode them again.

<folder>/<tokenizer>/<digests>.codes           the codes of one shard: a table sorted by digest, then all codes
                     index-<files>.keys.npy    the first 8 bytes of the digest of each image in <files> files, sorted
                     index-<files>.places.npy  where the codes of each image are

The key of an image is the hash of its pixels after the resize. Files are memory-mapped and the index is made in parts,
so memory does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from ar_tokenizers.files import whole

from ar_unified import storage

_TABLE = np.dtype([("digest", "V16"), ("at", "<i8"), ("height", "<i4"), ("width", "<i4")])
_PLACE = np.dtype([("file", "V16"), ("row", "<i4")])
_PART = 4_000_000  # images that are sorted at a time
_OPEN = 64  # files that stay mapped
Found = tuple[np.ndarray, np.ndarray]


def digest_of(pixels: np.ndarray) -> bytes:
    """16 bytes that identify an image, uint8 [H, W, 3]."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


class ImageCodes:
    """The known codes of one image tokenizer. Codes that `put` adds are not found until the folder is opened again.

    Args:
        folder: the folder for all tokenizers.
        tokenizer: the hash of this tokenizer.
        codebook_size: decides the dtype of stored codes.
        refresh: whether to bring the index up to date. In a job, one process does this before others open the index.
    """

    def __init__(self, folder: Path, tokenizer: str, codebook_size: int, *, refresh: bool = True):
        self._folder = folder / hashlib.sha256(tokenizer.encode()).hexdigest()[:32]
        self._dtype = np.dtype("<u2" if codebook_size <= 2**16 else "<i4")
        self._map = functools.lru_cache(maxsize=_OPEN)(
            lambda name: _mapped(storage.fetch(self._folder / f"{name}.codes"))
        )
        if refresh:
            self._make_index()
        self._keys, self._places = self._newest()

    def get(self, digest: bytes) -> np.ndarray | None:
        """The codes of an image, int32 [h, w]; None if they are not known."""
        key = np.uint64(int.from_bytes(digest[:8], "big"))
        at = int(np.searchsorted(self._keys, key))
        while at < len(self._keys) and self._keys[at] == key:
            file, row = self._places[at].item()
            table, codes = self._map(file.hex())
            known, begin, height, width = table[row].item()
            if known == digest:
                return codes[begin : begin + height * width].reshape(height, width).astype(np.int32)
            at += 1
        return None

    def put(self, found: Mapping[bytes, np.ndarray]) -> None:
        """Stores codes, each int32 [h, w], by digest, in one file that appears whole or not at all."""
        if not found:
            return
        digests = sorted(found)
        table = np.zeros(len(found), _TABLE)
        table["digest"] = np.frombuffer(b"".join(digests), "V16")
        table["height"], table["width"] = np.array([found[digest].shape for digest in digests]).T
        sizes = table["height"].astype(np.int64) * table["width"]
        table["at"] = np.cumsum(sizes) - sizes
        codes = np.concatenate([found[digest].ravel() for digest in digests]).astype(self._dtype)
        name = hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()  # the same images have the same file name
        with whole(self._folder / f"{name}.codes") as file:
            np.save(file, table, allow_pickle=False)
            np.save(file, codes, allow_pickle=False)

    def _newest(self) -> Found:
        """The newest complete index. At the same time, another process may be making a newer index and removing this
        one.
        """
        for keys in sorted(self._named("index-*.keys.npy"), reverse=True):
            with contextlib.suppress(FileNotFoundError):
                return _read_index(keys)
        return np.zeros(0, "<u8"), np.zeros(0, _PLACE)

    def _make_index(self) -> None:
        """Makes the index of all files, unless it exists. Files are added and never removed."""
        files = sorted(self._named("*.codes"))
        keys = self._folder / f"index-{len(files):09d}.keys.npy"
        if not files or storage.exists(keys):
            return
        total = sum(len(_mapped(storage.fetch(file))[0]) for file in files)
        borders = np.linspace(0, 2.0**64, -(-total // _PART) + 1)[1:-1].astype(np.uint64)
        before = [path for path in self._named("index-*") if path.name < keys.name.split(".")[0]]
        with whole(keys) as keys_file, whole(_places_of(keys)) as places_file:  # the file of keys appears last
            _write_header(keys_file, np.dtype("<u8"), total)
            _write_header(places_file, _PLACE, total)
            for low, high in zip([None, *borders], [*borders, None], strict=True):
                part = [_part(file, low, high) for file in files]
                part_keys, places = (np.concatenate(arrays) for arrays in zip(*part, strict=True))
                order = np.argsort(part_keys, kind="stable")
                keys_file.write(part_keys[order].tobytes())
                places_file.write(places[order].tobytes())
        for path in before:
            storage.remove(path)

    def _named(self, pattern: str) -> list[Path]:
        return [self._folder / name for name in storage.names(self._folder) if fnmatchcase(name, pattern)]


def _part(file: Path, low: np.uint64 | None, high: np.uint64 | None) -> Found:
    """The keys and places of a file's images with keys in [low, high). None means no limit."""
    table = _mapped(file)[0]
    keys = np.ascontiguousarray(table["digest"]).view(">u8")[::2].astype("<u8")
    first = 0 if low is None else int(np.searchsorted(keys, low))
    last = len(keys) if high is None else int(np.searchsorted(keys, high))
    places = np.zeros(last - first, _PLACE)
    places["file"] = np.frombuffer(bytes.fromhex(file.stem), "V16")
    places["row"] = np.arange(first, last)
    return keys[first:last], places


def _read_index(keys: Path) -> Found:
    found = (np.load(storage.fetch(path), mmap_mode="r", allow_pickle=False) for path in (keys, _places_of(keys)))
    first, second = map(np.asarray, found)  # plain arrays are faster to search
    return first, second


def _places_of(keys: Path) -> Path:
    return keys.with_name(keys.name.replace(".keys.", ".places."))


def _write_header(file: Any, dtype: np.dtype, count: int) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})


def _mapped(path: Path) -> Found:
    """The table and the codes of a file."""
    arrays = []
    with open(path, "rb") as file:
        for _ in range(2):
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            at = file.tell()
            arrays.append(np.asarray(np.memmap(path, dtype, "r", at, shape)))
            file.seek(at + arrays[-1].nbytes)
    return arrays[0], arrays[1]
