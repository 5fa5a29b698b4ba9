"""A bundle -> the published form of its weights, tensor by tensor; a model of our own -> one that others read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ar_tokenizers.files import whole_folder

from ar_unified.bundle import Bundle
from ar_unified.errors import UserError, about
from ar_unified.interop.keys import HF, Keys
from ar_unified.language.border import Border
from ar_unified.tensors import Kind, TensorWriter
from ar_unified.workdir import write_json

SHARD_BYTES = 5 << 30


def export_hf(bundle: Bundle, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the folder that transformers reads, whole or not at all.

    Raises UserError: `folder` exists, or what was trained has no place in the published form.
    """
    record = bundle.published
    if record is None:
        raise UserError(f"{bundle.folder}: it was not imported")
    keys = Keys(
        HF.prefixed(record.get("prefixes", {})),
        bundle.config,
        bundle.border or Border(((0, 0, bundle.config.vocab_size),)),
        qk_groups=tuple(record.get("qk_groups", (0, 0))),
    )
    write_folder(bundle, keys, folder, record, shard_bytes)


def write_folder(bundle: Bundle, keys: Keys, folder: Path, record: Mapping[str, Any], shard_bytes: int) -> None:
    dtypes = bundle.dtypes()
    kept = bundle.kept()
    kinds = {
        name: Kind(shape, dtypes[slot.leaf])
        for slot in keys.slots()
        for name, shape in zip(slot.names, slot.shapes, strict=True)
    } | {name: Kind(array.shape, str(array.dtype)) for name, array in kept.items()}
    try:
        with whole_folder(folder) as here:
            with (
                bundle.reading() as read,
                TensorWriter(here, kinds, shard_bytes, alone=True, metadata={"format": "pt"}) as writer,
            ):
                for slot in keys.slots():
                    with about(str(bundle.folder)):
                        arrays = keys.to_theirs(slot, read(slot.leaf, slot.layer))
                    for name, array in zip(slot.names, arrays, strict=True):
                        writer.put(name, array)
                for name, array in kept.items():
                    writer.put(name, array)
            for name, content in record["files"].items():
                write_json(here / name, content)
            text = bundle.text_tokenizer
            (here / record["text_file"]).write_bytes(text.data)
    except FileExistsError as error:
        raise UserError(f"{folder}: expected a new folder: name another, or remove this one") from error
