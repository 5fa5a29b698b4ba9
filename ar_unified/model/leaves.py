"""The transformer's parameters by their paths, and their way into files, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ar_unified.model.config import TransformerConfig
from ar_unified.model.transformer import Params, abstract_params
from ar_unified.tensors import Kind, TensorWriter


class Streamed(NamedTuple):
    """Parameters that come one after another, as they are read: only one of them is in memory.

    Attributes:
        dtypes: of each leaf by its path.
        pieces: (path, None, the leaf), or (path, i, entry i of its first axis), each once.
    """

    dtypes: Mapping[str, str]
    pieces: Iterable[tuple[str, int | None, np.ndarray]]

    @classmethod
    def of(cls, params: Params) -> Streamed:
        """From parameters that lie on devices, gathered leaf by leaf."""
        leaves = named(params)
        pieces = ((name, None, np.asarray(jax.device_get(leaf))) for name, leaf in leaves.items())
        return cls({name: str(leaf.dtype) for name, leaf in leaves.items()}, pieces)


def write_leaves(folder: Path, config: TransformerConfig, params: Streamed, shard_bytes: int) -> None:
    """Writes the parameters into safetensors files of about `shard_bytes` each, piece by piece as they come."""
    leaves = named(abstract_params(config))
    kinds = {name: Kind(leaf.shape, params.dtypes[name]) for name, leaf in leaves.items()}
    with TensorWriter(folder, kinds, shard_bytes) as writer:
        for name, layer, array in params.pieces:
            writer.put(name, array, layer)


def named(params: Params) -> dict[str, Any]:
    """Every leaf by its path, as "layers.mlp.up", in the order of the paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return dict(sorted((jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves))
