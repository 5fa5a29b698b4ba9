"""The model of a training that trained an adapter: the bundle that it began with, and what its checkpoint has."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from ar_unified.bundle import Bundle
from ar_unified.errors import UserError
from ar_unified.model.lora import LoraConfig, merged
from ar_unified.model.transformer import Params, abstract_params
from ar_unified.training.selection import Selection


def require_base(bundle: Bundle, trained: Any) -> None:
    """Raises UserError unless the training began with that bundle. trained: its hash, as the training noted it."""
    if bundle.hash != trained:
        raise UserError(
            f"config.init: the adapter was trained on bundle {str(trained)[:12]}, found {bundle.hash[:12]} in "
            f"{bundle.folder}: name the bundle that the training began with"
        )


def in_base(bundle: Bundle, lora: LoraConfig, selection: Selection, stored: Params, target: Params | None) -> Params:
    """The parameters of the bundle with the adapter merged in, and with the values of whatever else was trained.

    Args:
        selection: what was trained. stored: its values, as a checkpoint has them.
        target: shapes, dtypes and shardings of the result; None: float32, on this process's first device.
    """
    if target is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        shapes = abstract_params(bundle.config)
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
    places = jax.tree.map(lambda leaf: leaf.sharding, target)
    params = bundle.params(places, jax.tree.map(lambda leaf: leaf.dtype, target))

    def put(params: Params, stored: Params) -> Params:
        dtypes = {"lora": jax.tree.map(lambda leaf: leaf.dtype, stored["lora"])}
        axes = jax.tree.map(lambda leaf: leaf.dtype, params) | dtypes
        kinds = Selection({path: () for path in selection.parts or ()}).take(axes)
        cast = jax.tree.map(lambda leaf, kind: leaf.astype(kind), stored, kinds)
        return merged(lora, selection.put(params | {"lora": stored["lora"]}, cast))

    return jax.jit(put, donate_argnums=0, out_shardings=places)(params, jax.device_get(stored))
