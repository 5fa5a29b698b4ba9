"""A bundle is one folder with a whole model. It can be sampled or trained further without an experiment or a workdir.

    bundle.json                          the format's version, and the size and sha256 of the other files
    config.json                          "model" is the transformer's shape; "data", "loss" and "sampling" are settings
                                         of the experiment: about its data, its loss and the defaults of requests
    language.json                        the grammar's manifest, which defines valid sequences of ids; if the text
                                         tokenizer comes from a published system, also the mapping to its ids
    text_tokenizer/                      one of text.model (SentencePiece), tokenizer.json and text.tiktoken, unchanged
    image_tokenizer/                     weights.safetensors and config.json; a model of text alone has no such folder
                                         an imported one may also have published.safetensors, for its export
    model-00001-of-0000N.safetensors     the transformer's parameters, named by their paths, in their original dtypes
    model.safetensors.index.json         which of those files has which parameter
    published.json                       for imported weights: settings that are only needed to export them again
    published.safetensors                tensors for the same purpose
    README.md                            the model card, for people; no code reads it, and bundle.json does not list it

The folder may come from a stranger, so it is not trusted. Only the files named above are read. Links must not point
outside the folder. Each file is compared with bundle.json before it is used. Nothing in the folder is ever run.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ar_tokenizers.codec import FILES, Codec
from ar_tokenizers.files import whole_folder, write_bytes
from ar_tokenizers.image.tokenizer import BATCH_SIZE, ImageTokenizer
from ar_tokenizers.image.tokenizer import CONFIG as IMAGE_CONFIG
from ar_tokenizers.image.tokenizer import PUBLISHED as IMAGE_PUBLISHED
from ar_tokenizers.image.tokenizer import WEIGHTS as IMAGE_WEIGHTS
from safetensors import SafetensorError, safe_open

from ar_unified.data.files import FileError, Folder
from ar_unified.errors import UserError, in_words, nearest
from ar_unified.language.border import Border
from ar_unified.language.grammar import Grammar
from ar_unified.language.record import FILE as LANGUAGE
from ar_unified.language.record import manifest_of, record_of, text_codec
from ar_unified.manifests import Json, manifest_hash
from ar_unified.model.config import TransformerConfig, decisive
from ar_unified.model.leaves import Streamed, named, write_leaves
from ar_unified.model.transformer import Params, abstract_params
from ar_unified.recognised import recognised
from ar_unified.tensors import INDEX, read_tensors, write_tensors
from ar_unified.version import version
from ar_unified.workdir import write_json, write_text

VERSION = 1
BUNDLE, CONFIG, CARD = "bundle.json", "config.json", "README.md"
TEXT, IMAGE = "text_tokenizer", "image_tokenizer"
PUBLISHED, KEPT = "published.json", "published.safetensors"
_TEXT = tuple(f"{TEXT}/{name}" for name in FILES)
_IMAGE = (f"{IMAGE}/{IMAGE_WEIGHTS}", f"{IMAGE}/{IMAGE_CONFIG}")
_IMAGE_KEPT = f"{IMAGE}/{IMAGE_PUBLISHED}"
_NEEDED = (CONFIG, LANGUAGE, INDEX)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # keys: names in a safetensors file
_LARGEST = 1 << 26  # bytes of a JSON file
SHARD_BYTES = 2 << 30
# The errors that unchecked values can cause; RecursionError comes from JSON that is nested too deep.
_UNCHECKED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, SafetensorError)


class BundleError(UserError):
    """The folder is not a bundle, or it is damaged. The message names the folder, the file and the problem."""


# ---- writing --------------------------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    *,
    config: TransformerConfig,
    params: Params | Streamed,
    grammar: Grammar,
    text_tokenizer: Codec,
    image_tokenizer: ImageTokenizer | None,
    data: Mapping[str, Json],
    sampling: Mapping[str, Json],
    card: str,
    loss: Mapping[str, Json] | None = None,
    published: Mapping[str, Json] | None = None,
    kept: Mapping[str, np.ndarray] | None = None,
    extends: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> Bundle:
    """Writes a bundle whole or not at all, and opens it.

    Args:
        folder: a new folder; an existing one is never overwritten.
        params: their dtypes are kept; parameters on several devices are gathered one by one.
        grammar: the grammar that was made for both tokenizers.
        image_tokenizer: None for a model of text alone.
        data: the experiment's image_size, resize, `Resize.way`, layout and max_tokens; for text alone, max_tokens.
        loss: the experiment's softmax; None means its default.
        sampling: the experiment's max_length, kv_dtype and defaults of requests (`sampling.request.DEFAULTS`).
        published, kept: JSON values, and tensors by name. Only an export to the published form needs them.
        extends: the hash of the bundle that this model extends; "" for none. Both have the same parameters, but this
            model has more rows in the tables of ids.
        shard_bytes: the largest size of a file of parameters; a parameter larger than this gets its own file.

    Raises UserError if `folder` exists, and OSError, for example for a full disk.
    """
    try:
        with whole_folder(folder) as here:
            model = decisive(config) | {"dtype": config.dtype}
            sections: dict[str, Json] = {"model": model, "data": dict(data), "loss": dict(loss or {})}
            sections |= {"sampling": dict(sampling)} | ({"extends": extends} if extends else {})
            write_json(here / CONFIG, sections)
            write_json(here / LANGUAGE, record_of(grammar))
            write_bytes(here / TEXT / text_tokenizer.file, text_tokenizer.data)
            if image_tokenizer is not None:
                image_tokenizer.save(here / IMAGE)
            if published is not None:
                write_json(here / PUBLISHED, dict(published))
            if kept:
                write_tensors(here / KEPT, kept)
            streamed = params if isinstance(params, Streamed) else Streamed.of(params)
            write_leaves(here, config, streamed, shard_bytes)
            names = sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.is_file())
            files = {name: {"bytes": (here / name).stat().st_size, "sha256": _sha256(here / name)} for name in names}
            write_text(here / CARD, card)
            made_by = f"ar_unified {version()}"
            write_json(here / BUNDLE, {"version": VERSION, "made_by": made_by, "files": files})
    except FileExistsError as error:
        raise UserError(f"{in_words(error)}: name another folder, or remove this one") from error
    return Bundle(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A parameter in its file. Each read opens the file anew: an open file is mapped, and its pages count as memory."""

    path: Path
    name: str
    dtype: str

    def read(self, at: object) -> np.ndarray:
        with safe_open(self.path, framework="numpy") as opened:
            return opened.get_slice(self.name)[at]


class Bundle:
    """An open bundle. Opening it checks that the files exist and have the right sizes; the content of each file is
    checked when it is read.

    Opening and reading raise BundleError if the folder is missing or not a bundle of this version, or a file changed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._inside = Folder(self.folder)
        if not self.folder.exists():
            raise BundleError(f"{self.folder}: expected the folder of a bundle, found no such folder")
        if not (self.folder / BUNDLE).exists():
            more = recognised(self.folder) or "has none"
            raise BundleError(f"{self.folder}: expected a bundle, which has a {BUNDLE}; it {more}")
        record = self._json(BUNDLE)
        if (found := record.get("version")) != VERSION or isinstance(found, bool):
            raise self._error(BUNDLE, f"expected version {VERSION}, found {found!r:.40}: another release wrote it")
        self._files = self._checked(record.get("files"))
        for name, (size, _) in self._files.items():
            if (found := self._path(name).stat().st_size) != size:
                raise self._error(name, f"expected {size} bytes, found {found}: the file was cut short or changed")

    @cached_property
    def hash(self) -> str:
        """sha256 of the content. It depends only on weights, tokenizers, language and settings."""
        return manifest_hash({name: digest for name, (_, digest) in self._files.items()})

    @property
    def size(self) -> int:
        """The size in bytes of all files that bundle.json lists: all except bundle.json and the card."""
        return sum(size for size, _ in self._files.values())

    @property
    def has_images(self) -> bool:
        """Whether the bundle has an image tokenizer. A model without one is for texts, and perhaps for image codes."""
        return _IMAGE[0] in self._files

    @cached_property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections of config.json: "model", "data", "loss" ({} in bundles of earlier versions) and "sampling"."""
        found = {"loss": {}} | self._json(CONFIG)
        for name in ("model", "data", "loss", "sampling"):
            if not isinstance(found.get(name), dict):
                raise self._error(CONFIG, f"{name}: expected keys and values, found {found.get(name)!r:.80}")
        return found

    @cached_property
    def config(self) -> TransformerConfig:
        """The transformer's shape. Raises BundleError if the shape in config.json is missing or invalid."""
        with self._reading(CONFIG):
            return typed(TransformerConfig, self.sections["model"], "model")

    @cached_property
    def record(self) -> dict[str, Json]:
        """The content of language.json, which `language.record.record_of` made."""
        return self._json(LANGUAGE)

    @property
    def language(self) -> dict[str, Json]:
        """The grammar's manifest."""
        return manifest_of(self.record)

    @cached_property
    def text_tokenizer(self) -> Codec:
        """The text tokenizer. It may be lossy if the training allowed that."""
        (name,) = (name for name in _TEXT if name in self._files)
        data = self._read(name)
        with self._reading(name):
            return text_codec(self.record, name.rpartition("/")[2], data, lossy="warn")

    @property
    def border(self) -> Border | None:
        """The mapping to the ids of a published table; None if the model has no published ids."""
        return getattr(self.text_tokenizer, "border", None)

    @cached_property
    def published(self) -> dict[str, Any] | None:
        """The JSON values that `write` got as `published`, or None."""
        return self._json(PUBLISHED) if PUBLISHED in self._files else None

    def kept(self) -> dict[str, np.ndarray]:
        """The tensors that `write` got as `kept`; {} if there are none."""
        if KEPT not in self._files:
            return {}
        self._read(KEPT)
        with self._reading(KEPT):
            return read_tensors(self._path(KEPT))

    def image_tokenizer(self, batch_size: int = BATCH_SIZE) -> ImageTokenizer | None:
        """The image tokenizer; None for a model of text alone. batch_size: how many images it processes at once."""
        if not self.has_images:
            return None
        kept = _IMAGE_KEPT in self._files
        for name in (*_IMAGE, _IMAGE_KEPT) if kept else _IMAGE:
            self._read(name)
        if not kept and os.path.lexists(self.folder / _IMAGE_KEPT):
            raise self._error(BUNDLE, f"files: {_IMAGE_KEPT} is missing")
        with self._reading(IMAGE):
            tokenizer = ImageTokenizer.load(self.folder / IMAGE, batch_size=batch_size)
        if tokenizer.hash != (found := self.language.get("image_hash")):
            wanted = f"{tokenizer.hash[:12]}, the hash of {IMAGE}"
            raise self._error(LANGUAGE, f"image_hash: expected {wanted}; found {found!r:.20}")
        return tokenizer

    @cached_property
    def grammar(self) -> Grammar:
        """The grammar from language.json and the text tokenizer. Raises BundleError if they do not fit the model."""
        with self._reading(LANGUAGE):
            grammar = Grammar.from_manifest(self.language, self.text_tokenizer)
        vocabulary = grammar.vocabulary
        if vocabulary.size != self.config.vocab_size:
            raise self._error(
                LANGUAGE, f"expected {self.config.vocab_size} ids, as {CONFIG} says; found {vocabulary.size}"
            )
        if self.has_images > bool(vocabulary.codebook_size) or bool(vocabulary.image_hash) > self.has_images:
            raise self._error(LANGUAGE, f"expected all three of image codes, {IMAGE} and its hash, or none of them")
        return grammar

    def params(self, places: Any = None, dtype: Any = None, then: Callable[..., object] | None = None) -> Params:
        """The transformer's parameters. Each device reads only its own part of them.

        Args:
            places: a tree with a sharding for each parameter, on any mesh; None means this process's first device.
            dtype: one dtype, or a tree with one for each parameter. None (also in a tree) keeps the stored dtype.
            then: called with the path and value of each parameter as it is read; its result replaces the value.
        """
        shapes = self._shapes()
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where = named(jax.tree.map(lambda _: here, shapes) if places is None else places)
        kinds = named(jax.tree.map(lambda _: dtype, shapes) if dtype is None or isinstance(dtype, str) else dtype)
        found = self._tensors(shapes)

        def make(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            kind = jax.numpy.dtype(kinds.get(name) or found[name].dtype)
            made = jax.make_array_from_callback(leaf.shape, where[name], lambda at: found[name].read(at).astype(kind))
            return then(name, made) if then else made

        return jax.tree_util.tree_map_with_path(make, shapes)

    def reader(self) -> tuple[dict[str, str], Callable[[str, int | None], np.ndarray]]:
        """Returns (dtypes, read): the dtype of every parameter by its path, and a function. read(path, None) returns a
        parameter, and read(path, layer) returns its part at index `layer` of the first axis. The files are checked
        once, in this call.
        """
        found = self._tensors(self._shapes())
        dtypes = {name: tensor.dtype for name, tensor in found.items()}
        return dtypes, lambda name, layer: found[name].read(... if layer is None else layer)

    def _shapes(self) -> Params:
        with self._reading(CONFIG):
            return abstract_params(self.config)

    def _tensors(self, shapes: Params) -> dict[str, _Tensor]:
        """Each tensor, by name. Checks that names and shapes fit the model, and that dtypes are supported."""
        leaves, index = named(shapes), self._index(named(shapes))
        found = {}
        for file in sorted(set(index.values())):
            path = self._path(file)
            with self._reading(file), safe_open(path, framework="numpy") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}
                kinds = {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
            if kinds.keys() != (told := {name for name, where in index.items() if where == file}):
                name = min(kinds.keys() ^ told)
                wrong = f"missing, though {INDEX} lists it" if name in told else f"not listed in {INDEX}"
                raise self._error(file, f"tensor {name!r:.80} is {wrong}")
            for name, (shape, dtype) in kinds.items():
                if shape != leaves[name].shape:
                    raise self._error(file, f"{name}: expected shape {leaves[name].shape}, found {shape}")
                if dtype not in _DTYPES:
                    raise self._error(file, f"{name}: expected {', '.join(_DTYPES)}; found {dtype}")
                found[name] = _Tensor(path, name, _DTYPES[dtype])
        return found

    def _index(self, leaves: Mapping[str, Any]) -> dict[str, str]:
        """The name of each tensor's file. Checks that the files have not changed since they were written."""
        found = self._json(INDEX).get("weight_map")
        if not isinstance(found, dict):
            raise self._error(INDEX, f"weight_map: expected keys and values, found {found!r:.80}")
        files = [name for name in self._files if _SHARD.fullmatch(name)]
        for name, file in found.items():
            if name not in leaves:
                raise self._error(INDEX, f"{name!r:.80}: this model has no such tensor{nearest(name, leaves)}")
            if file not in files:
                raise self._error(
                    INDEX, f"{name}: expected one of {', '.join(files) or 'no files'}; found {file!r:.80}"
                )
        if missing := sorted(leaves.keys() - found.keys()):
            raise self._error(INDEX, f"{missing[0]}: this tensor of the model is missing")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for file, digest in zip(files, pool.map(lambda file: _sha256(self._path(file)), files), strict=True):
                self._require(file, digest)
        return found

    def copy(self, folder: Path, *names: str) -> None:
        """Copies the files with these names into a folder. Names that the bundle does not have are skipped."""
        for name in names:
            if name in self._files:
                write_bytes(folder / name, self._read(name))

    # ---- files ------------------------------------------------------------------------------------------------------

    def _checked(self, files: Any) -> dict[str, tuple[int, str]]:
        """(bytes, sha256) of every file by its name. Each name is checked, so it can be trusted."""
        if not isinstance(files, dict):
            raise self._error(BUNDLE, f"files: expected keys and values, found {files!r:.80}")
        for name, facts in files.items():
            if name not in (*_NEEDED, *_TEXT, *_IMAGE, _IMAGE_KEPT, PUBLISHED, KEPT) and not _SHARD.fullmatch(name):
                raise self._error(BUNDLE, f"files: a bundle has no file {name!r:.80}")
            size, digest = (facts.get(key) if isinstance(facts, dict) else None for key in ("bytes", "sha256"))
            if type(size) is not int or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
                raise self._error(BUNDLE, f"files: {name}: expected bytes and sha256, found {facts!r:.80}")
        needed = (*_NEEDED, *(_IMAGE if any(name in files for name in _IMAGE) else ()))
        if missing := [name for name in needed if name not in files]:
            raise self._error(BUNDLE, f"files: {missing[0]} is missing")
        if len(found := [name for name in _TEXT if name in files]) != 1:
            expected = f"exactly one text tokenizer in {TEXT}, one of {', '.join(FILES)}"
            raise self._error(BUNDLE, f"files: expected {expected}; found {' and '.join(found) or 'none'}")
        return {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}

    def _path(self, name: str) -> Path:
        """The path of a file of the bundle. A link into the Hugging Face cache gives the linked file's path."""
        try:
            path = self._inside.path(name)
        except FileError as error:
            raise self._error(name, error.reason) from error
        if not path.is_file():
            raise self._error(name, "expected a file, found none")
        return path

    def _read(self, name: str) -> bytes:
        try:
            data = self._path(name).read_bytes()
        except OSError as error:
            raise self._error(name, in_words(error)) from error
        self._require(name, hashlib.sha256(data).hexdigest())
        return data

    def _require(self, name: str, digest: str) -> None:
        if digest != self._files[name][1]:
            raise self._error(
                name, f"expected sha256 {self._files[name][1][:12]}..., found {digest[:12]}...: the file was changed"
            )

    def _json(self, name: str) -> dict[str, Any]:
        path = self._path(name)
        if path.stat().st_size > _LARGEST:
            raise self._error(name, f"expected at most {_LARGEST} bytes, found {path.stat().st_size}")
        with self._reading(name):
            found = json.loads(path.read_bytes() if name == BUNDLE else self._read(name))
        if not isinstance(found, dict):
            raise self._error(name, f"expected keys and values, found {found!r:.80}")
        return found

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """A context in which values of a file are used. An error in it becomes a BundleError that names the file."""
        try:
            yield
        except BundleError:
            raise
        except (*_UNCHECKED, OSError) as error:
            said = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            raise self._error(name, said) from error

    def _error(self, name: str, message: str) -> BundleError:
        return BundleError(f"bundle {self.folder}: {name}: {message}")


T = typing.TypeVar("T")


def typed(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Makes an instance of the dataclass `kind` from unchecked values. Its fields are numbers, strings and booleans.

    Raises ValueError for an unknown field or a wrong type. The message begins with `where` and the field's name.
    """
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{where}.{name}: there is no such field{nearest(name, hints)}")
        allowed = (int, float) if hints[name] is float else (hints[name],)
        if type(value) not in allowed:
            raise ValueError(f"{where}.{name}: expected {hints[name].__name__}, found {value!r:.80}")
    return kind(**values)
