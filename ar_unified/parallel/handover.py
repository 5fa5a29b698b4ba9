"""Copies parameters during training, from the mesh of all devices to the devices of each process.

The copies use the network between devices, never a host's memory or a file.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from ar_unified.parallel.rules import specs


def hand_over(params: Any, logical_axes: Any, here: Mesh) -> Any:
    """A copy of `params` on a mesh of this process's devices; each other process gets a copy on its own devices.

    All processes must call it at the same time. An array that is already in the right place is shared, not copied, so
    donating `params` also deletes the copy.

    Args:
        params: arrays on one mesh.
        logical_axes: the axes of each array, as `rules.specs` takes them.
        here: a mesh of this process's devices; the other processes pass the same mesh shape with their own devices.
    """
    wanted = specs(here, logical_axes, params)
    if jax.process_count() == 1:
        return jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(here, spec), wanted))
    stacked = np.stack([_like(here, process) for process in range(jax.process_count())])
    whole = Mesh(stacked, ("process", *here.axis_names), axis_types=(AxisType.Auto,) * stacked.ndim)
    spread = jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(whole, spec), wanted))

    def mine(x: jax.Array, spec: Any) -> jax.Array:
        pieces = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(here, spec), pieces)

    return jax.tree.map(mine, spread, wanted)


def _like(mesh: Mesh, process: int) -> np.ndarray:
    """The devices of another process, arranged like this process's devices in `mesh`."""
    mine, theirs = (
        sorted((d for d in jax.devices() if d.process_index == each), key=lambda d: d.id)
        for each in (jax.process_index(), process)
    )
    places = [theirs[mine.index(device)] for device in mesh.devices.flat]
    return np.array(places, object).reshape(mesh.devices.shape)
