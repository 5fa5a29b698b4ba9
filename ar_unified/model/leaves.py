"""Names the transformer's parameters by their paths, and writes them to files one after another."""

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
    """Parameters that are read one after another, so that only one of them is in memory.

    Attributes:
        dtypes: the dtype of each leaf, by path.
        pieces: yields (path, None, leaf) for a whole leaf, or (path, i, leaf[i]) for each i of its first axis.
    """

    dtypes: Mapping[str, str]
    pieces: Iterable[tuple[str, int | None, np.ndarray]]

    @classmethod
    def of(cls, params: Params) -> Streamed:
        """Streams parameters that are on devices, gathering them leaf by leaf."""
        leaves = named(params)
        pieces = ((name, None, np.asarray(jax.device_get(leaf))) for name, leaf in leaves.items())
        return cls({name: str(leaf.dtype) for name, leaf in leaves.items()}, pieces)


def write_leaves(folder: Path, config: TransformerConfig, params: Streamed, shard_bytes: int) -> None:
    """Writes the parameters to safetensors files of about `shard_bytes` each, piece by piece."""
    leaves = named(abstract_params(config))
    kinds = {name: Kind(leaf.shape, params.dtypes[name]) for name, leaf in leaves.items()}
    with TensorWriter(folder, kinds, shard_bytes) as writer:
        for name, layer, array in params.pieces:
            writer.put(name, array, layer)


def named(params: Params) -> dict[str, Any]:
    """Every leaf by its path, such as "layers.mlp.up", in the order of the paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return dict(sorted((jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves))
