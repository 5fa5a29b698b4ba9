"""Several LoRA adapters beside one model, in the sampler's form: each row of a batch has its own.

The adapters of a matrix are stacked. Number 0 is no adapter: it is zeros, so a row without an adapter has the model's
own numbers. A smaller rank than the largest is filled up with zeros, too. The scale is in B.

L layers, A adapters, I inputs, O outputs, r the largest rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ar_unified.errors import UserError, about, nearest
from ar_unified.interop.peft import Adapter, read
from ar_unified.model.config import TransformerConfig
from ar_unified.model.lora import MATRICES
from ar_unified.model.transformer import Params, logical_axes
from ar_unified.parallel import rules
from ar_unified.sampling.request import RequestError


def read_adapters(folders: Mapping[str, str | Path], config: TransformerConfig, base: str = "") -> dict[str, Adapter]:
    """The adapters in those folders, by name. base: as of `interop.peft.read`. Raises UserError, naming the adapter."""
    found = {}
    for name, folder in folders.items():
        if not name:
            raise UserError(f"adapter {str(folder)!r:.80}: expected a name, found none")
        with about(f"adapter {name!r:.80}"):
            found[name] = read(folder, config, base)
    return found


def number(adapters: Mapping[str, int], name: str) -> int:
    """The number of an adapter. Raises RequestError if there is no such adapter."""
    if name not in adapters:
        known = ", ".join(repr(each) for each in adapters if each) or "none, as no adapter was loaded"
        raise RequestError(f"adapter: expected one of {known}; found {name!r:.80}{nearest(name, adapters)}")
    return adapters[name]


def beside(config: TransformerConfig, params: Params, adapters: Sequence[Adapter], mesh: Mesh | None) -> Any:
    """params["adapters"] (model/lora.py), in the compute dtype: a [L, A + 1, I, r] and b [L, A + 1, r, O] of each
    matrix that any of them has; for settled parameters a list of layers of [A + 1, ...].
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
        tree = [jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked) for layer in range(config.n_layers)]
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.dtype)), tree)
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    axes = logical_axes(params | {"adapters": tree})["adapters"]
    return jax.device_put(tree, rules.shardings(mesh, axes, tree))
