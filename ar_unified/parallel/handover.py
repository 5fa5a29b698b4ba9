"""Copies the parameters of a training from the mesh of all devices to the devices of each process.

They travel over the network between the devices, and never through a host's memory or a file.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from ar_unified.parallel.rules import specs


def hand_over(params: Any, logical_axes: Any, here: Mesh) -> Any:
    """A copy of `params` on a mesh of this process's own devices; other processes have one on theirs.

    All processes call it at the same time. An array that already lies where it is wanted is shared and not copied, so
    whoever donates `params` takes the copy away, too.

    Args:
        params: arrays of one mesh. logical_axes: of each, as `rules.specs` takes them.
        here: a mesh of devices of this process; the other processes give the same mesh of devices of their own.
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
    """The devices of another process, arranged as `mesh` arranges those of this one."""
    mine, theirs = (
        sorted((d for d in jax.devices() if d.process_index == each), key=lambda d: d.id)
        for each in (jax.process_index(), process)
    )
    places = [theirs[mine.index(device)] for device in mesh.devices.flat]
    return np.array(places, object).reshape(mesh.devices.shape)
