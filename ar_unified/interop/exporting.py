"""Writes bundles tensor by tensor. An imported model is written in the published form that it was imported from, and a
model of our own in a form that other programs read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ar_tokenizers.files import whole_folder, write_bytes

from ar_unified.bundle import PUBLISHED, Bundle
from ar_unified.errors import UserError, about
from ar_unified.interop import extended, own
from ar_unified.interop.images import tensors_of
from ar_unified.interop.keys import HF, LWM, LWM_TEXT, META, Keys, Slot
from ar_unified.interop.meta import split
from ar_unified.interop.streams import SCANNED, StreamWriter
from ar_unified.manifests import Json
from ar_unified.tensors import Kind, TensorWriter
from ar_unified.workdir import write_json

SHARD_BYTES = 5 << 30


class _Exported(NamedTuple):
    """The parameters that an export writes. `dtypes` (by leaf) and `read` come from `Bundle.reader`."""

    bundle: Bundle
    keys: Keys
    dtypes: Mapping[str, str]
    read: Callable[[str, int | None], np.ndarray]

    def kinds(self) -> Iterator[tuple[Slot, str, Kind]]:
        """Every tensor of the transformer by its published name."""
        for slot in self.keys.slots():
            for name, shape in zip(slot.names, slot.shapes, strict=True):
                yield slot, name, Kind(shape, self.dtypes[slot.leaf])

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The same tensors with their numbers, one at a time."""
        for slot in self.keys.slots():
            with about(str(self.bundle.folder)):
                arrays = self.keys.to_theirs(slot, self.read(slot.leaf, slot.layer))
            yield from zip(slot.names, arrays, strict=True)


def export_published(
    bundle: Bundle, form: str, folder: Path, shard_bytes: int = SHARD_BYTES, license: str = ""
) -> None:
    """Writes an imported model in its published form, or a model of our own in the form that transformers reads. The
    folder is written whole or not at all.

    Args:
        form: "hf", "meta" or "lwm"; for an imported model, the form that it was imported from.
        license: for a model of our own, the licence to name in its model card; "" means unknown.

    Raises UserError if `folder` exists, the bundle was imported from another form, or the form has no place for
        something that was trained.
    """
    record = bundle.published
    keys = _keys(bundle, form, record)
    try:
        with whole_folder(folder) as here:
            dtypes, read = bundle.reader()
            exported = _Exported(bundle, keys, dtypes, read)
            if record is None:
                own.write_own(bundle, here, max(dtypes.values(), key=list(dtypes.values()).count), license)
                _write_tensors(exported, here, {}, shard_bytes)
            elif form == "meta":
                _write_meta(exported, here, record)
            elif form == "lwm":
                _write_lwm(exported, here, record)
                _write_beside(bundle, here, record)
            else:
                _write_tensors(exported, here, _images(bundle, record), shard_bytes)
                _write_beside(bundle, here, record)
    except FileExistsError as error:
        raise UserError(f"{folder}: expected a new folder: name another, or remove this one") from error


def _keys(bundle: Bundle, form: str, record: Mapping[str, Any] | None) -> Keys:
    if record is None:
        if form != "hf":
            raise UserError(f"{bundle.folder}: --to: expected hf for a model that was trained here, found {form}")
        return own.keys_of(bundle)
    if form != record["form"]:
        raise UserError(
            f"{bundle.folder}: --to: expected {record['form']}, the form that the model was imported from; found {form}"
        )
    if bundle.border is None:
        raise UserError(
            f"{bundle.folder}: language.json: expected `border`, the mapping to the published ids, found none"
        )
    tables = tuple(record.get("tables", ()))
    dialect = {
        "hf": HF.prefixed(record.get("prefixes", {})),
        "meta": META,
        "lwm": LWM if len(tables) > 1 else LWM_TEXT,
    }[form]
    return Keys(dialect, bundle.config, bundle.border, tables, tuple(record.get("qk_groups", (0, 0))))


def _images(bundle: Bundle, record: Mapping[str, Json]) -> Mapping[str, np.ndarray]:
    """The tensors of the image tokenizer, if it was in the model's own file."""
    prefix, tokenizer = record.get("image_prefix"), bundle.image_tokenizer()
    if not prefix or tokenizer is None:
        return {}
    return tensors_of(tokenizer, record)


def _write_beside(bundle: Bundle, folder: Path, record: Mapping[str, Any]) -> None:
    before = record.get(extended.KEY)
    for name, content in record["files"].items():
        more = before and name == "config.json"
        write_json(folder / _plain(bundle, name), extended.settings_of(bundle, content) if more else content)
    file = _plain(bundle, record["text_file"])
    if before:
        extended.write_tokens(bundle, folder, file, before)
    else:
        write_bytes(folder / file, bundle.text_tokenizer.data)


def _plain(bundle: Bundle, name: str) -> str:
    """Returns a name from published.json, which is not trusted. Raises UserError if it is not the name of a file."""
    if name != Path(name).name or name in ("", ".", ".."):
        raise UserError(f"{bundle.folder}: {PUBLISHED}: expected the name of a file, found {name!r:.80}")
    return name


def _write_tensors(exported: _Exported, folder: Path, images: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    """Writes the transformer's tensors, and the tensors of `images` after them."""
    kinds = {name: Kind(array.shape, str(array.dtype)) for name, array in images.items()}
    kinds |= {name: kind for _, name, kind in exported.kinds()}
    with TensorWriter(folder, kinds, shard_bytes, alone=True, metadata={"format": "pt"}) as writer:
        for name, array in exported.tensors():
            writer.put(name, array)
        for name, array in images.items():
            writer.put(name, array)


def _write_meta(exported: _Exported, folder: Path, record: Mapping[str, Any]) -> None:
    """Writes models/7b (one file) or models/30b (several), with no fused matrices, and the text tokenizer's file."""
    parts, bundle = record["parts"], exported.bundle
    models = folder / "models" / ("7b" if parts == 1 else "30b")
    models.mkdir(parents=True)
    kinds: dict[str, Kind] = {}
    for _, name, kind in exported.kinds():
        (first, *_) = split(name, np.broadcast_to(np.zeros((), kind.dtype), kind.shape), parts)
        kinds[name] = Kind(first.shape, kind.dtype)
    with contextlib.ExitStack() as stack:
        writers = []
        for part in range(parts):
            stem = "consolidated" if parts == 1 else f"consolidated.{part:02}"
            whole = sum(kind.nbytes for kind in kinds.values()) + 1
            writers.append(stack.enter_context(TensorWriter(models, kinds, whole, alone=True, stem=stem)))
        for name, array in exported.tensors():
            with about(str(bundle.folder)):
                pieces = split(name, array, parts)
            for writer, piece in zip(writers, pieces, strict=True):
                writer.put(name, piece)
    write_json(models / "params.json", record["params"])
    write_bytes(folder / "tokenizer" / _plain(bundle, record["text_file"]), bundle.text_tokenizer.data)


def _write_lwm(exported: _Exported, folder: Path, record: Mapping[str, Any]) -> None:
    """Writes LWM's `params`, with the layers stacked or separate, as the import found them."""
    kinds, places = dict[str, Kind](), dict[str, tuple[str, int | None]]()
    for slot, name, kind in exported.kinds():
        scanned = record["scanned"] and slot.layer is not None
        whole = name.replace(f"/h/{slot.layer}/", f"/h/{SCANNED}/") if scanned else name
        places[name] = whole, slot.layer if scanned else None
        layers = (exported.keys.config.n_layers,) if scanned else ()
        kinds[whole] = Kind((*layers, *kind.shape), kind.dtype)
    with StreamWriter(folder / "params", kinds, tuple(record["prefix"])) as writer:
        for name, array in exported.tensors():
            whole, layer = places[name]
            writer.put(whole, array, layer)
