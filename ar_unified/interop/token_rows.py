"""Reads and writes an adapter's own rows of the embedding and the head in PEFT's form (`trainable_token_indices`).
adapter_model.safetensors has the values that replace the rows:

    base_model.model.MODULE.token_adapter.trainable_tokens_delta    [n, D]

MODULE is the path of embed_tokens or lm_head. adapter_config.json has the ids of the rows (huggingface/peft,
src/peft/utils/other.py, TrainableTokensWrapper). A tied head has the embedding's rows.
transformers' model must have these ids: `resize_token_embeddings` makes them.

n rows, D model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ar_unified.errors import UserError
from ar_unified.interop.keys import HF
from ar_unified.interop.sources import Source
from ar_unified.manifests import Json

KEY = "trainable_token_indices"  # in adapter_config.json
VOCABULARY = "ar_unified.vocabulary"  # in the header of the weights: the hash of the language to which the ids belong
_MODULES = {"embedding": "embed_tokens", "head": "lm_head"}  # the module of each of our tables
_END = ".token_adapter.trainable_tokens_delta"
_NAME = re.compile(
    r"base_model\.model\.(?:\w+\.)*(?P<module>embed_tokens|lm_head)"
    r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.\w+)?"
)
# Modules that have another name in transformers than in files (its conversion_mapping.py).
_IN_MEMORY = {"text_model.model.": "model.text_model.", "text_model.lm_head": "lm_head"}


class TokenRows(NamedTuple):
    """Rows of a table: `ids`, int64 [n], ascending, and `values`, f32 [n, D]. The ids are published ones, or ours if
    the model has no published ids."""

    ids: np.ndarray
    values: np.ndarray


def names(rows: Mapping[str, TokenRows], prefixes: Mapping[str, str]) -> tuple[dict[str, np.ndarray], dict[str, Json]]:
    """The rows in the form that PEFT reads: (tensors by name, their entry in adapter_config.json)."""
    dialect, tensors = HF.prefixed(prefixes), dict[str, np.ndarray]()
    for table, (_, values) in rows.items():
        module = in_memory(str(dialect.names[table]).removesuffix(".weight"))
        tensors[f"base_model.model.{module}{_END}"] = np.asarray(values, np.float32)
    said = {_MODULES[table]: [int(id) for id in ids] for table, (ids, _) in rows.items()}
    return tensors, {KEY: said} if said else {}


def in_memory(name: str) -> str:
    """Converts a module's name, or the beginning of the name, from the form in files to the form in transformers."""
    for theirs, loaded in _IN_MEMORY.items():
        if name.startswith(theirs):
            return loaded + name.removeprefix(theirs)
    return name


def is_name(name: str) -> bool:
    """Whether a tensor of this name has rows of ids."""
    return _NAME.fullmatch(name) is not None


def read(folder: Path, source: Source, said: object, width: int) -> dict[str, TokenRows]:
    """The rows of an adapter by table; {} if it has none.

    Args:
        source: the adapter's tensors.
        said: the value of KEY in adapter_config.json.
        width: the length of a row, D.

    Raises UserError if the rows do not fit `said` or `width`.
    """
    said = {"embed_tokens": said} if isinstance(said, list) else said or {}
    if not isinstance(said, Mapping):
        raise UserError(f"{folder}: {KEY}: expected a list of ids for each module, found {said!r:.80}")
    found = {_NAME.fullmatch(name)["module"]: name for name in source.names() if is_name(name)}  # type: ignore[index]
    if found.keys() != said.keys():
        one, other = ", ".join(said) or "none", ", ".join(found) or "none"
        raise UserError(f"{folder}: {KEY}: expected rows for the modules {one}, found rows for {other}")
    rows = {}
    for table, module in _MODULES.items():
        if module not in said:
            continue
        ids, name = said[module], found[module]
        if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < 1 << 31 for id in ids):
            raise UserError(f"{folder}: {KEY}: {module}: expected a list of ids, found {ids!r:.80}")
        if len(set(ids)) != len(ids) or source.shape(name) != (len(ids), width):
            wanted = f"{[len(set(ids)), width]}, a row for each different id"
            raise UserError(f"{folder}: {name}: expected {wanted}; found {list(source.shape(name))} for {len(ids)} ids")
        values = source.read(name).astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{folder}: {name}: expected finite numbers, found NaN or infinity")
        order = np.argsort(ids)
        rows[table] = TokenRows(np.asarray(ids, np.int64)[order], values[order])
    return rows
