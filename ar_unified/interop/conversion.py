"""Converts pickled checkpoints (.pth, .pt, .ckpt, LWM's VQGAN) into .safetensors files.

A torch file is a zip: a pickle in it describes the tensors, and other files in the zip have the raw numbers. The
numbers are read tensor by tensor. `pickles` reads the pickle without running anything in it.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from ar_tokenizers.files import whole_folder

from ar_unified.data.files import Folder
from ar_unified.errors import UserError, in_words
from ar_unified.interop.pickles import DAMAGED, STORAGES, Forbidden, Global, Storage, Strided, read_pickle
from ar_unified.manifests import Json
from ar_unified.recognised import PICKLED
from ar_unified.tensors import Kind, TensorWriter, read_bytes
from ar_unified.workdir import write_json

_BESIDE = (".json", ".yaml", ".yml", ".txt", ".model", ".tiktoken", ".chk")
_LARGEST = 1 << 28  # maximum bytes of a torch file's pickle, and of a file that is copied
_MOST = 1 << 20  # maximum number of parts of a pickle's value
_OLD_TORCH = 0x1950A86A20F9469CFC6C  # files that torch wrote before version 1.6 begin with this number
_WRAPPERS = ("state_dict", "model", "module", "params")


class Pickled(NamedTuple):
    """The content of a pickled file.

    Attributes:
        tensors: the tensors by name. The parts of a name are joined by "." for torch, by "/" for flax.
        other: plain values by name, such as settings.
        left_out: names of all other values.
    """

    path: Path
    tensors: dict[str, Strided | np.ndarray]
    other: dict[str, Json]
    left_out: tuple[str, ...]

    def kind(self, name: str) -> Kind:
        """The shape and dtype of a tensor, known without its numbers."""
        tensor = self.tensors[name]
        if isinstance(tensor, Strided):
            return Kind(tensor.shape, tensor.storage.dtype)
        return Kind(tensor.shape, tensor.dtype.name)

    def read(self, name: str) -> np.ndarray:
        """The tensor's numbers. Raises OSError if the file cannot be read."""
        tensor = self.tensors[name]
        if isinstance(tensor, np.ndarray):
            return tensor
        kind = np.dtype(tensor.storage.dtype)
        if not math.prod(tensor.shape):
            return np.empty(tensor.shape, kind)
        begin = tensor.storage.begin + tensor.offset * kind.itemsize
        numbers = read_bytes(self.path, [(begin, (tensor.last - tensor.offset) * kind.itemsize)]).view(kind)
        strides = tuple(stride * kind.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)


def open_pickled(path: str | Path) -> Pickled:
    """The content of a file; the numbers of a torch file are not read yet.

    Raises UserError, which names the file, if it is damaged, has an unknown format, or names something that tensors do
        not need.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            begin = file.read(4)
            file.seek(0)
            zipped = begin == b"PK\3\4"
            if not zipped and begin[:1] != b"\x80":
                raise ValueError("it is neither a torch file nor a pickle of protocol 2 or later")
            found = _torch(path) if zipped else read_pickle(_Bounded(file, path.stat().st_size))
        if isinstance(found, int):
            more = ", found a file of torch before 1.6" if found == _OLD_TORCH else ""
            raise UserError(
                f"{path}: expected a torch file that is a zip{more}: load it with torch.load and save it again "
                "with torch.save"
            )
        return _sorted(path, found, "." if zipped else "/")
    except Forbidden as error:
        raise UserError(
            f"{path}: the pickle has {error}, which no tensor needs: nothing in it was run, and nothing was written. "
            "If you trust the file's maker, save only the tensors with the program that made the file"
        ) from error
    except OSError as error:
        raise UserError(in_words(error)) from error
    except UserError:
        raise
    except (*DAMAGED, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path}: expected tensors in a pickle, found a damaged or unknown file: {error}") from error


class _Bounded:
    """A file that is never read beyond its end, even if its content claims larger lengths."""

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._size = file, size

    def read(self, n: int = -1) -> bytes:
        if n > self._size - self._file.tell():
            raise ValueError("it was cut short")
        return self._file.read(n)

    def readline(self) -> bytes:
        return self._file.readline(1 << 16)

    def tell(self) -> int:
        return self._file.tell()


# ---- torch's zip ----------------------------------------------------------------------------------------------------


def _torch(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        begins = _begins(path, archive)
        sizes = {each.filename: each.file_size for each in archive.infolist()}
        pickle = next((name for name in begins if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
        if pickle is None:
            raise UserError(f"{path}: expected a torch file, which has a data.pkl; found {', '.join(begins)[:200]}")
        top = pickle.partition("/")[0]
        if f"{top}/constants.pkl" in begins:
            raise UserError(f"{path}: expected tensors, found a TorchScript program: save its state_dict() with torch")
        if sizes[pickle] > _LARGEST:
            raise ValueError(f"{pickle} has {sizes[pickle]} bytes, expected at most {_LARGEST}")
        order = archive.read(f"{top}/byteorder").strip() if f"{top}/byteorder" in begins else b"little"
        if order != b"little":
            raise ValueError(f"its byte order is {order!r:.20}, expected b'little'")
        data = archive.read(pickle)

    def storage(found: object) -> Storage:
        if not isinstance(found, tuple) or len(found) != 5 or found[0] != "storage":
            raise Forbidden(f"a persistent id {found!r:.80}")
        _, kind, key, _, size = found
        if not isinstance(kind, Global) or kind.name not in STORAGES or not isinstance(key, str):
            raise Forbidden(f"a persistent id {found!r:.80}")
        name = f"{top}/data/{key}"
        if name not in begins:
            raise ValueError(f"{name!r:.80} is not in the zip")
        dtype = STORAGES[kind.name]
        if type(size) is not int or not 0 <= size * np.dtype(dtype).itemsize <= sizes[name]:
            raise ValueError(f"{name} has {sizes[name]} bytes, expected {size} numbers of {dtype}")
        return Storage(dtype, size, begins[name])

    return read_pickle(io.BytesIO(data), storage)


def _begins(path: Path, archive: zipfile.ZipFile) -> dict[str, int]:
    """The position at which the bytes of each file in a zip begin. Raises ValueError if a file's name leads out of the
    zip, or a file overlaps another or is compressed."""
    begins: dict[str, int] = {}
    ends = 0
    with open(path, "rb") as file:
        for each in sorted(archive.infolist(), key=lambda each: each.header_offset):
            name = each.filename
            if name.startswith("/") or "\\" in name or ".." in name.split("/") or name in begins:
                raise ValueError(f"the zip has a file {name!r:.80}, whose name points outside the zip or occurs twice")
            if each.compress_type != zipfile.ZIP_STORED or each.file_size != each.compress_size or each.flag_bits & 1:
                raise ValueError(f"{name!r:.80} is compressed, but torch writes files without compression")
            file.seek(each.header_offset)
            head = file.read(30)
            if len(head) != 30 or head[:4] != b"PK\3\4" or each.header_offset < ends:
                raise ValueError(f"{name!r:.80} does not begin where the zip says")
            begin = (
                each.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:], "little")
            )
            ends = begin + each.file_size
            if ends > path.stat().st_size:
                raise ValueError(f"{name!r:.80} was cut short")
            begins[name] = begin
    return begins


# ---- what is in it --------------------------------------------------------------------------------------------------


def _sorted(path: Path, found: object, joint: str) -> Pickled:
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a dictionary from names to tensors, found a {type(found).__name__}")
    tensors: dict[str, Any] = {}
    other: dict[str, Any] = {}
    left: list[str] = []
    wrapper = next((name for name in _WRAPPERS if isinstance(found.get(name), dict)), None)
    for key, value in found.items():
        if wrapper is None or key == wrapper:
            continue
        plain = _plain(value)
        if plain is None and value is not None:
            left.append(str(key))
        else:
            other[str(key)] = plain
    for parts, value in _leaves(found if wrapper is None else found[wrapper]):
        name = joint.join(parts)
        if not isinstance(value, Strided | np.ndarray):
            other[name] = value
        elif name in tensors or name == "__metadata__":
            raise UserError(
                f"{path}: {name!r:.120}: expected a name that no other tensor has and that is not __metadata__"
            )
        else:
            tensors[name] = value
    if not tensors:
        raise UserError(f"{path}: expected tensors, found none")
    return Pickled(path, tensors, other, tuple(left))


def _leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each leaf with its path. Raises ValueError if there are too many parts, as in a value that contains itself."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    count = 0
    while waiting:
        parts, value = waiting.pop()
        count += 1
        if count > _MOST or len(parts) > 100:
            raise ValueError(f"it has more than {_MOST} parts, or its parts are nested too deeply")
        if isinstance(value, dict):
            waiting += [((*parts, str(key)), inner) for key, inner in reversed(list(value.items()))]
        elif isinstance(value, list | tuple) and not isinstance(value, Strided | Storage | Global):
            waiting += [((*parts, str(i)), inner) for i, inner in reversed(list(enumerate(value)))]
        elif isinstance(value, Strided | np.ndarray) or value is None or isinstance(value, bool | int | float | str):
            yield parts, value
        else:
            raise Forbidden(f"a {type(value).__name__} at {'.'.join(parts)!r:.80}")


def _plain(value: object) -> Any:
    """The value as JSON; None if it has tensors in it."""
    if any(isinstance(leaf, Strided | np.ndarray) for _, leaf in _leaves(value)):
        return None
    return value


# ---- files to files -------------------------------------------------------------------------------------------------


def convert(path: str | Path, output: str | Path, say: Callable[[str], None]) -> None:
    """Writes a folder with a .safetensors file for each pickled file, whole or not at all.

    Args:
        path: a file, or a folder; in a folder, settings and tokenizers beside the pickled files are copied, too.

    Raises UserError if there is no such file, a file is refused, or `output` exists. Raises OSError if reading or
    writing fails.
    """
    path = Path(path)
    if path.is_file():
        names, root, beside = [path.name], path.parent, []
    else:
        found = Folder(path).search(lambda name: True)
        if wrong := next((each for each in found if each.error is not None), None):
            raise UserError(f"{path}: {wrong.name}: {wrong.error}")
        root = path
        names = [each.name for each in found if Path(each.name).suffix in PICKLED]
        beside = [each.name for each in found if Path(each.name).suffix in _BESIDE and each.size <= _LARGEST]
        for each in found:
            if each.name not in (*names, *beside):
                say(f"left out: {each.name}")
        if not names:
            raise UserError(f"{path}: expected files that end in {', '.join(PICKLED)}; found none")
    opened = {name: open_pickled(root / name) for name in names}  # all files are opened before the first is written
    try:
        with whole_folder(output) as here:
            for name in beside:
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, here / name)
            for name, pickled in opened.items():
                _write(here, name, pickled, say)
    except FileExistsError as error:
        raise UserError(f"{in_words(error)}: name another folder, or remove this one") from error


def _write(folder: Path, name: str, pickled: Pickled, say: Callable[[str], None]) -> None:
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    stem = place.stem if place.suffix in PICKLED else place.name
    kinds = {each: pickled.kind(each) for each in pickled.tensors}
    size = sum(kind.nbytes for kind in kinds.values())
    with TensorWriter(place.parent, kinds, max(size, 1), alone=True, stem=stem) as writer:
        for each in kinds:
            writer.put(each, pickled.read(each))
    new = os.path.join(os.path.dirname(name), f"{stem}.safetensors")
    say(f"{name} -> {new}: {len(kinds)} tensors, {size / 1e6:.1f} MB")
    if pickled.other:
        beside = place.with_name(f"{stem}.other.json")
        try:
            write_json(beside, json.loads(json.dumps(pickled.other)))
            say(f"  values that are not tensors, kept in {beside.name}: {_some(list(pickled.other))}")
        except (TypeError, ValueError, RecursionError):
            beside.unlink(missing_ok=True)
            say(f"  left out, because they are not tensors: {_some(list(pickled.other))}")
    if pickled.left_out:
        say(f"  left out, because these tensors are not the model's: {_some(list(pickled.left_out))}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
