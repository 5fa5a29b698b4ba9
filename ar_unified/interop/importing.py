"""Converts published files into a bundle. Only one tensor is in memory at a time, or one table of ids while its rows
are reordered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from ar_unified import bundle
from ar_unified.errors import UserError
from ar_unified.interop.published import Published
from ar_unified.interop.sources import DTYPES
from ar_unified.model.config import parameter_count
from ar_unified.model.leaves import Streamed


def import_model(
    published: Published, output: str, *, card: str, dtype: str = "", shard_bytes: int = bundle.SHARD_BYTES
) -> bundle.Bundle:
    """Writes the bundle, whole or not at all. Its compute dtype is the dtype of its matrices, or bfloat16 if they are
    float16.

    Args:
        dtype: "float32" or "bfloat16" converts all tensors to this dtype. With "", every tensor keeps its own dtype, so
            that an export writes the published dtypes again.

    Raises UserError if `output` exists, or if the parts of one parameter have several dtypes. Raises OSError if reading
    or writing fails.
    """
    keys, source = published.keys, published.source
    dtypes: dict[str, str] = {}
    for slot in keys.slots():
        for name in slot.names:
            found = dtype or DTYPES[source.dtype(name)]
            if dtypes.setdefault(slot.leaf, found) != found:
                raise UserError(
                    f"{name}: expected {dtypes[slot.leaf]}, as the other parts of {slot.leaf} have; found {found}. "
                    "Give --dtype to convert all tensors to one dtype"
                )

    # A config.json gives the dtype in several places, or nowhere, so the dtype of the weights is used instead.
    stored = dtypes["layers.attention.query"]
    config = dataclasses.replace(keys.config, dtype="float32" if stored == "float32" else "bfloat16")

    def pieces() -> Iterator[tuple[str, int | None, np.ndarray]]:
        for slot in keys.slots():
            array = keys.to_ours(slot, [source.read(name) for name in slot.names])
            yield slot.leaf, slot.layer, array.astype(dtypes[slot.leaf], copy=False)

    return bundle.write(
        output,
        config=config,
        params=Streamed(dtypes, pieces()),
        grammar=published.grammar,
        text_tokenizer=published.text,
        image_tokenizer=published.image,
        data=published.data,
        loss=published.loss,
        sampling=published.sampling,
        card=card,
        published=published.record,
        shard_bytes=shard_bytes,
    )


def card(published: Published, license: str = "") -> str:
    """The README.md of an imported bundle."""
    config, vocabulary = published.keys.config, published.grammar.vocabulary
    images = f" and {vocabulary.codebook_size:,} image codes" if vocabulary.codebook_size else ""
    lines = [
        "---",
        f"license: {json.dumps(license or 'unknown')}",
        "library_name: ar_unified",
        "---",
        "",
        f"# {published.system}",
        "",
        f"Published weights of {published.system}, imported: {parameter_count(config):,} parameters in "
        f"{config.n_layers} layers of {config.d_model}, {vocabulary.text_size:,} text pieces{images}.",
        "",
        *(f"- {note}" for note in published.notes),
        *([""] if published.notes else []),
        "`ar_unified.load(FOLDER)` opens the model, `--config.init=FOLDER` begins a training with it, and",
        "`ar-unified export --from FOLDER --to FORMAT` gives the published form back.",
    ]
    return "\n".join(lines) + "\n"
