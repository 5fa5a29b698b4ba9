"""The dtypes of a transformer's parameters: in computation, and in storage if they are not trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from ar_unified.model.config import summed
from ar_unified.model.quantized import Quantized, quantized

MATRICES = ("query", "key", "value", "output", "gate", "up", "down")  # a layer's matrices


def cast(params: Any, dtype: str) -> Any:
    """Casts matrices to the compute dtype. Norm weights and biases stay float32; quantized matrices do not change."""

    def one(path: KeyPath, p: Any) -> Any:
        return p if isinstance(p, Quantized) or is_vector(path) else p.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda p: isinstance(p, Quantized))


def is_vector(path: KeyPath) -> bool:
    """Whether the leaf at `path` is a norm's weight or a bias. Such leaves are float32 in every computation."""
    return any("norm" in entry.key or entry.key.endswith("bias") for entry in path)


def held(path: KeyPath, leaf: jax.Array, dtype: str) -> Any:
    """Converts a leaf of stacked parameters to the form in which it is stored if it is not trained. Norms and biases do
    not change; all other leaves are converted to `dtype`.

    With "int8" the layers' matrices are `Quantized`. The tables (embedding and head) are bfloat16, because
    rounding to 8 bits harms them more than the matrices.
    """
    name = path[-1].key
    if is_vector(path):
        return leaf
    if dtype == "int8":
        return quantized(leaf, dtype, summed(name)) if name in MATRICES else leaf.astype(jnp.bfloat16)
    return leaf.astype(dtype)
