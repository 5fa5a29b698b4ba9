"""Several LoRA adapters for one model, in the form that the sampler reads. Each row of a batch has its own adapter.

The adapters of a matrix are stacked. Number 0 means no adapter. Its entries are all zeros, so a row without an adapter
gets the model's own results. Ranks smaller than the largest are padded with zeros. The scale is multiplied into B.

L layers, A adapters, I inputs, O outputs, r the largest rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ar_unified.errors import UserError, about, nearest
from ar_unified.interop.peft import Adapter, own_rows, read
from ar_unified.interop.token_rows import TokenRows
from ar_unified.language.grammar import Grammar
from ar_unified.model.config import TransformerConfig
from ar_unified.model.decoded import adapters_as_decoded
from ar_unified.model.lora import MATRICES
from ar_unified.model.own_rows import PARTS, TABLES
from ar_unified.model.transformer import Params, logical_axes
from ar_unified.parallel import rules
from ar_unified.sampling.request import RequestError

_NONE = TokenRows(np.zeros(0, np.int64), np.zeros((0, 0), np.float32))


def read_adapters(folders: Mapping[str, str | Path], config: TransformerConfig, *bases: str) -> dict[str, Adapter]:
    """Reads adapters; `folders` maps the name of each adapter to its folder. bases: as in `interop.peft.read`. Raises
    UserError that names the adapter."""
    found = {}
    for name, folder in folders.items():
        if not name:
            raise UserError(f"adapter {str(folder)!r:.80}: expected a name, found none")
        with about(f"adapter {name!r:.80}"):
            found[name] = read(folder, config, *bases)
    return found


def number(adapters: Mapping[str, int], name: str) -> int:
    """The number of an adapter. Raises RequestError if there is no such adapter."""
    if name not in adapters:
        known = ", ".join(repr(each) for each in adapters if each)
        expected = f"one of {known}" if known else "none, because no adapter was loaded"
        raise RequestError(f"adapter: expected {expected}; found {name!r:.80}{nearest(name, adapters)}")
    return adapters[name]


def beside(config: TransformerConfig, params: Params, adapters: Sequence[Adapter], mesh: Mesh | None) -> Any:
    """Makes params["adapters"] (model/lora.py), in the compute dtype: a [L, A + 1, I, r] and b [L, A + 1, r, O] for
    each matrix that any adapter changes. If `params` come from `weights.settled`, it is a list with one tree for each
    layer, whose arrays are [A + 1, ...].
    """
    rank = max(a.shape[-1] for adapter in adapters for a, _ in adapter.matrices.values())
    stacked: dict[str, Any] = {}
    for path in MATRICES:
        pairs = [(adapter.scales.get(path, ()), adapter.matrices.get(path)) for adapter in adapters]
        some = next((pair for _, pair in pairs if pair is not None), None)
        if some is None:
            continue
        L, inputs, _ = some[0].shape
        a = np.zeros((L, len(adapters) + 1, inputs, rank), np.float32)
        b = np.zeros((L, len(adapters) + 1, rank, some[1].shape[-1]), np.float32)
        for number, (scales, pair) in enumerate(pairs, 1):
            if pair is not None:
                own = pair[0].shape[-1]
                scale = np.asarray(scales, np.float32)[:, None, None]
                a[:, number, :, :own], b[:, number, :own] = pair[0], scale * pair[1]
        group, _, name = path.partition(".")
        stacked.setdefault(group, {})[name] = {"a": a, "b": b}
    tree: Any = stacked
    if isinstance(params["layers"], list):
        stacked = adapters_as_decoded(stacked, params["layers"][0]["mlp"]["down"].shape[0])
        tree = [jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked) for layer in range(config.n_layers)]
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.dtype)), tree)
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    axes = logical_axes(params | {"adapters": tree})["adapters"]
    return jax.device_put(tree, rules.shardings(mesh, axes, tree))


def rows_beside(params: Params, grammar: Grammar, adapters: Sequence[Adapter], mesh: Mesh | None) -> Any:
    """Makes params["rows"] (model/own_rows.py) from the adapters that have their own rows of the embedding or the head;
    {} if no adapter has such rows.

    If an adapter lacks a row, the model's row is used. Number 0 (no adapter) has only the model's rows. Raises
    UserError if an adapter's rows belong to another vocabulary.
    """
    rows_of = [own_rows(adapter, grammar) for adapter in adapters]
    tables: dict[str, Any] = {}
    for name in TABLES:
        # A tied head uses the embedding's rows.
        own = [rows.get(name if name in params else TABLES[0], _NONE) for rows in rows_of]
        ids = np.unique(np.concatenate([np.zeros(0, np.int64), *(found[0] for found in own)])).astype(np.int32)
        if not len(ids):
            continue
        base = np.asarray((params[name] if name in params else params[TABLES[0]])[ids])
        values = np.repeat(base[None], len(adapters) + 1, axis=0)
        for number, (which, rows) in enumerate(own, 1):
            if len(which):
                values[number, np.searchsorted(ids, which)] = rows
        tables[name] = ids, values
    found: dict[str, object] = {}
    if "embedding" in tables:
        ids, values = tables["embedding"]
        at = np.full(grammar.vocabulary.size, -1, np.int32)
        at[ids] = np.arange(len(ids))
        found["embedding"] = {"at": at, "own": values}
    if "head" in tables:
        ids, values = tables["head"]
        v = grammar.vocabulary
        ends = np.searchsorted(ids, [0, v.image_offset, v.image_offset + v.codebook_size, v.size])
        parts = {part: slice(*ends[i : i + 2]) for i, part in enumerate(PARTS) if ends[i] < ends[i + 1]}
        found["head"] = {part: {"at": ids[at], "own": values[:, at]} for part, at in parts.items()}
    if not found:
        return {}
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return {"rows": jax.tree.map(lambda leaf: jax.device_put(leaf, everywhere), found)}
