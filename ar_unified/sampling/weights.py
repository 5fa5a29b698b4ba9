"""Converts weights from a checkpoint to the form that the sampler reads, without two full copies in memory.

Training keeps float32 parameters, stacked by layers. The sampler reads a list of layers in the compute dtype, or in 8
bits. The weights are read from disk directly in the compute dtype. Then one stack of matrices after another is split
into layers and freed. So only one stack at a time is in memory twice.

L layers.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.tree_util import KeyPath

from ar_unified.bundle import Bundle
from ar_unified.model.config import TransformerConfig
from ar_unified.model.decoded import as_decoded, mlp_width
from ar_unified.model.dtypes import is_vector
from ar_unified.model.quantized import LARGEST
from ar_unified.model.transformer import Params, abstract_params, logical_axes
from ar_unified.parallel import rules

WEIGHT_DTYPES = (None, *LARGEST)


def read_as(config: TransformerConfig, mesh: Mesh | None) -> Params:
    """The form in which to read a checkpoint for decoding: stacked parameters, with matrices in the compute dtype.

    Returns ShapeDtypeStructs with shardings. Without a mesh, all parameters are on this process's first device.
    """
    here = SingleDeviceSharding(jax.local_devices()[0])

    def leaf(path: KeyPath, x: Any) -> jax.ShapeDtypeStruct:
        dtype = x.dtype if is_vector(path) else jnp.dtype(config.dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding if mesh is not None else here)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config, mesh))


def read(bundle: Bundle, target: Params) -> Params:
    """Reads a bundle's parameters with the dtypes and shardings of `target`, a tree of ShapeDtypeStructs."""
    return bundle.params(*(jax.tree.map(operator.attrgetter(name), target) for name in ("sharding", "dtype")))


def settled(config: TransformerConfig, params: Params, mesh: Mesh | None, weights_dtype: str | None = None) -> Params:
    """Converts parameters that were read with `read_as` to the form of `decoded.unstacked`. The given arrays are freed.

    weights_dtype: one of WEIGHT_DTYPES. Raises ValueError for another.
    """
    check_weights_dtype(weights_dtype)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        width = mlp_width(config)
    layers: list[Params] = [{} for _ in range(config.n_layers)]
    for path, stack in jax.tree_util.tree_leaves_with_path(params["layers"]):
        *parents, name = (entry.key for entry in path)
        form = functools.partial(as_decoded, name, width=width, weights_dtype=weights_dtype)
        parts = _apart(name, width, weights_dtype, _place(path, stack, form, mesh), stack)
        jax.block_until_ready(parts)
        stack.delete()
        for layer, part in zip(layers, parts, strict=True):
            for parent in parents:
                layer = layer.setdefault(parent, {})
            layer[name] = part
    return {name: leaf for name, leaf in params.items() if name != "layers"} | {"layers": layers}


def check_weights_dtype(weights_dtype: str | None) -> None:
    """Raises ValueError unless it is one of WEIGHT_DTYPES."""
    if weights_dtype not in WEIGHT_DTYPES:
        expected = ", ".join(map(str, WEIGHT_DTYPES))
        raise ValueError(f"weights_dtype: expected one of {expected}; found {weights_dtype!r}")


def _place(path: KeyPath, stack: Any, form: Callable[[Any], Any], mesh: Mesh | None) -> Any:
    """The shardings of what `form` returns for one layer, as a hashable value. None means the default."""
    if mesh is None:
        return None
    tree: Any = jax.eval_shape(form, jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype))
    for entry in reversed(path):
        tree = {entry.key: tree}
    places = jax.tree.leaves(rules.specs(mesh, logical_axes({"layers": [tree]})["layers"][0], tree))
    return tuple(NamedSharding(mesh, spec) for spec in places)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _apart(name: str, width: int, weights_dtype: str | None, places: Any, stack: jax.Array) -> list[Any]:
    """Splits a stack [L, ...] into one array for each layer."""

    def placed(part: object) -> Any:
        if places is None:
            return part
        leaves, form = jax.tree.flatten(part)
        return jax.tree.unflatten(form, map(jax.lax.with_sharding_constraint, leaves, places))

    return [placed(as_decoded(name, layer, width, weights_dtype)) for layer in stack]
