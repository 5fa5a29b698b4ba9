"""A bundle -> the published form that it was imported from, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ar_tokenizers.files import whole_folder, write_bytes
from ar_tokenizers.image.published import to_published

from ar_unified.bundle import Bundle
from ar_unified.errors import UserError, about
from ar_unified.interop import own
from ar_unified.interop.keys import HF, LWM, LWM_TEXT, META, Keys
from ar_unified.interop.meta import split
from ar_unified.interop.sources import DTYPES
from ar_unified.interop.streams import SCANNED, StreamWriter
from ar_unified.tensors import Kind, TensorWriter
from ar_unified.workdir import write_json

SHARD_BYTES = 5 << 30


def export_published(bundle: Bundle, form: str, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the published form of an imported model, or of our own what transformers reads, whole or not at all.

    Args:
        form: "hf", "meta" or "lwm"; of an imported model the one that it came in.

    Raises UserError: `folder` exists, the bundle was made of no such form, or what was trained has no place in it.
    """
    record = bundle.published
    if record is None:
        return _export_own(bundle, form, folder, shard_bytes)
    if form != record["form"]:
        raise UserError(f"{bundle.folder}: --to: expected {record['form']}, the form that was imported; found {form}")
    tables = tuple(record.get("tables", ()))
    dialect = {
        "hf": HF.prefixed(record.get("prefixes", {})),
        "meta": META,
        "lwm": LWM if len(tables) > 1 else LWM_TEXT,
    }[form]
    if bundle.border is None:
        raise UserError(f"{bundle.folder}: language.json: expected a border to the published ids, found none")
    keys = Keys(dialect, bundle.config, bundle.border, tables, tuple(record.get("qk_groups", (0, 0))))
    try:
        with whole_folder(folder) as here:
            if form == "meta":
                _write_meta(bundle, keys, here, record)
            elif form == "lwm":
                _write_lwm(bundle, keys, here, record)
            else:
                _write_hf(bundle, keys, here, record, shard_bytes)
    except FileExistsError as error:
        raise UserError(f"{folder}: expected a new folder: name another, or remove this one") from error


def _export_own(bundle: Bundle, form: str, folder: Path, shard_bytes: int) -> None:
    if form != "hf":
        raise UserError(f"{bundle.folder}: --to: expected hf, of a model that was trained here; found {form}")
    keys, dtypes = own.keys_of(bundle), bundle.dtypes()
    try:
        with whole_folder(folder) as here:
            own.write_own(bundle, here, max(dtypes.values(), key=list(dtypes.values()).count))
            _write_tensors(bundle, keys, here, {}, shard_bytes)
    except FileExistsError as error:
        raise UserError(f"{folder}: expected a new folder: name another, or remove this one") from error


def _write_hf(bundle: Bundle, keys: Keys, folder: Path, record: Mapping[str, Any], shard_bytes: int) -> None:
    images: Mapping[str, np.ndarray] = {}
    if prefix := record.get("image_prefix"):
        tokenizer = bundle.image_tokenizer()
        assert tokenizer is not None
        images = to_published(
            tokenizer, record["image_dialect"], prefix=prefix, dtype=np.dtype(DTYPES[record["image_dtype"]])
        )
    _write_tensors(bundle, keys, folder, images, shard_bytes)
    for name, content in record["files"].items():
        write_json(folder / name, content)
    write_bytes(folder / record["text_file"], bundle.text_tokenizer.data)


def _write_tensors(
    bundle: Bundle, keys: Keys, folder: Path, images: Mapping[str, np.ndarray], shard_bytes: int
) -> None:
    """The transformer's, and those of `images` behind them."""
    dtypes = bundle.dtypes()
    kinds = {name: Kind(array.shape, str(array.dtype)) for name, array in images.items()}
    for slot in keys.slots():
        kinds |= {name: Kind(shape, dtypes[slot.leaf]) for name, shape in zip(slot.names, slot.shapes, strict=True)}
    with TensorWriter(folder, kinds, shard_bytes, alone=True, metadata={"format": "pt"}) as writer:
        for name, array in _tensors(bundle, keys):
            writer.put(name, array)
        for name, array in images.items():
            writer.put(name, array)


def _write_meta(bundle: Bundle, keys: Keys, folder: Path, record: Mapping[str, Any]) -> None:
    """models/7b or models/30b with its parts, not fused, and tokenizer/text_tokenizer.json."""
    parts, dtypes = record["parts"], bundle.dtypes()
    models = folder / "models" / ("7b" if parts == 1 else "30b")
    models.mkdir(parents=True)
    kinds: dict[str, Kind] = {}
    for slot in keys.slots():
        for name, shape in zip(slot.names, slot.shapes, strict=True):
            (first, *_) = split(name, np.broadcast_to(np.zeros((), dtypes[slot.leaf]), shape), parts)
            kinds[name] = Kind(first.shape, dtypes[slot.leaf])
    with contextlib.ExitStack() as stack:
        writers = []
        for part in range(parts):
            stem = "consolidated" if parts == 1 else f"consolidated.{part:02}"
            whole = sum(kind.nbytes for kind in kinds.values()) + 1
            writers.append(stack.enter_context(TensorWriter(models, kinds, whole, alone=True, stem=stem)))
        for name, array in _tensors(bundle, keys):
            with about(str(bundle.folder)):
                pieces = split(name, array, parts)
            for writer, piece in zip(writers, pieces, strict=True):
                writer.put(name, np.ascontiguousarray(piece))
    write_json(models / "params.json", record["params"])
    write_bytes(folder / "tokenizer" / record["text_file"], bundle.text_tokenizer.data)


def _write_lwm(bundle: Bundle, keys: Keys, folder: Path, record: Mapping[str, Any]) -> None:
    """`params`, with layers in one array or apart, as it came; and what lay beside it."""
    dtypes, kinds, places = bundle.dtypes(), dict[str, Kind](), dict[str, tuple[str, int | None]]()
    for slot in keys.slots():
        for name, shape in zip(slot.names, slot.shapes, strict=True):
            scanned = record["scanned"] and slot.layer is not None
            whole = name.replace(f"/h/{slot.layer}/", f"/h/{SCANNED}/") if scanned else name
            places[name] = whole, slot.layer if scanned else None
            layers = (keys.config.n_layers,) if scanned else ()
            kinds[whole] = Kind((*layers, *shape), dtypes[slot.leaf])
    with StreamWriter(folder / "params", kinds, tuple(record["prefix"])) as writer:
        for name, array in _tensors(bundle, keys):
            whole, layer = places[name]
            writer.put(whole, array, layer)
    for name, content in record["files"].items():
        write_json(folder / name, content)
    write_bytes(folder / record["text_file"], bundle.text_tokenizer.data)


def _tensors(bundle: Bundle, keys: Keys) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the transformer by its published name, one at a time."""
    with bundle.reading() as read:
        for slot in keys.slots():
            with about(str(bundle.folder)):
                arrays = keys.to_theirs(slot, read(slot.leaf, slot.layer))
            yield from zip(slot.names, arrays, strict=True)
