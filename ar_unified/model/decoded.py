"""Parameters in the form for decoding: a list of layers with matrices [inputs, outputs], optionally in 8 bits.

Every step of decoding reads every weight once. With stacked layers, a step would first copy each layer, and on TPUs it
would first change the layout of matrices with heads [N, H].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.kernels import device
from ar_unified.model.config import TransformerConfig
from ar_unified.model.dtypes import MATRICES, cast
from ar_unified.model.quantized import quantized

_LANES = 128  # lanes of a TPU's matrix unit


def unstacked(config: TransformerConfig, params: dict[str, Any], weights_dtype: str | None = None) -> dict[str, Any]:
    """Converts stacked parameters to the form for decoding, for the mesh in scope.

    weights_dtype: the dtype of the layers' matrices, one of model.quantized.LARGEST; None means the compute dtype.
    """
    width = mlp_width(config)
    outside = {name: leaf for name, leaf in params.items() if name not in ("layers", "adapters", "rows")}
    beside: dict[str, Any] = {"rows": params["rows"]} if "rows" in params else {}
    if "adapters" in params:
        adapters = each_layer(params["adapters"], config.n_layers)
        beside["adapters"] = [adapters_as_decoded(cast(layer, config.dtype), width) for layer in adapters]
    layers = [
        jax.tree_util.tree_map_with_path(lambda path, p: as_decoded(path[-1].key, p, width, weights_dtype), layer)
        for layer in each_layer(params["layers"], config.n_layers)
    ]
    return cast(outside, config.dtype) | beside | {"layers": [cast(layer, config.dtype) for layer in layers]}


def as_decoded(name: str, leaf: jax.Array, width: int, weights_dtype: str | None) -> Any:
    """Converts a leaf of one layer to the form for decoding, without a cast to the compute dtype.

    name: the last part of the leaf's path.
    width: width of the MLP. Channels that the leaf does not have are zeros.
    """
    if name not in MATRICES:
        return leaf
    matrix = leaf.reshape(-1, leaf.shape[-1]) if name in ("output", "down") else leaf.reshape(leaf.shape[0], -1)
    if name in ("gate", "up", "down"):
        matrix = _filled(matrix, 0 if name == "down" else 1, width)
    return quantized(matrix, weights_dtype) if weights_dtype else matrix


def adapters_as_decoded(adapters: dict[str, Any], width: int) -> dict[str, Any]:
    """Pads params["adapters"] (model/lora.py), of one layer or stacked, with zeros for an MLP with `width` channels."""
    if "mlp" not in adapters:
        return adapters
    sides = {"gate": ("b", -1), "up": ("b", -1), "down": ("a", -2)}

    def one(name: str, pair: dict[str, Any]) -> dict[str, Any]:
        side, axis = sides[name]
        return pair | {side: _filled(pair[side], axis, width)}

    return adapters | {"mlp": {name: one(name, pair) for name, pair in adapters["mlp"].items()}}


def _filled(array: Any, axis: int, size: int) -> Any:
    """The array, with zeros added at the end of an axis until it has this size."""
    if array.shape[axis] == size:
        return array
    more = [(0, 0)] * array.ndim
    more[axis] = (0, size - array.shape[axis])
    return (np if isinstance(array, np.ndarray) else jnp).pad(array, more)


def mlp_width(config: TransformerConfig) -> int:
    """The width F of the MLP in the matrices that decoding reads, for the mesh in scope.

    A TPU's part of F is padded to whole lanes of the matrix unit. A quarter of Llama-7B's MLP has 2,752 channels. A
    product that sums over 2,752 channels costs 2.6 times the cycles of a product that sums over 2,816
    (docs/tpu_programs.md).
    """
    mesh = jax.sharding.get_abstract_mesh()
    lanes = _LANES * (1 if mesh.empty else mesh.shape["tensor"])
    if device.current().platform != "tpu" or config.d_mlp < lanes:
        return config.d_mlp
    return -(-config.d_mlp // lanes) * lanes


def each_layer(layers: Any, n_layers: int) -> list[dict[str, Any]]:
    """The parameters of each layer; the layers may be stacked or a list."""
    if isinstance(layers, list):
        return layers
    return [jax.tree.map(lambda p, index=index: p[index], layers) for index in range(n_layers)]
