"""Parameters of a training, which lie on the mesh of all devices, as the devices of each process want them.

On the devices, by the network between them, and never through a host's memory or a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import specs


def hand_over(params: Any, logical_axes: Any, axes: Mapping[str, int]) -> Any:
    """A copy of `params` on a mesh of this process's own devices; other processes have one on theirs.

    All processes call it at the same time. What lies there as it is wanted is not copied: whoever gives the parameters
    away (donates them) has taken the copy's, too.

    Args:
        params: arrays of one mesh. logical_axes: of each, as `rules.specs` takes them.
        axes: of the mesh of one process's devices, as `make_mesh` takes them.
    """
    groups: dict[int, list[Any]] = {}
    for device in jax.devices():
        groups.setdefault(device.process_index, []).append(device)
    meshes = {process: make_mesh(axes, group) for process, group in sorted(groups.items())}
    here = meshes[jax.process_index()]
    wanted = specs(here, logical_axes, params)
    if len(meshes) == 1:
        return jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(here, spec), wanted))
    stacked = np.stack([mesh.devices for mesh in meshes.values()])
    whole = Mesh(stacked, ("process", *here.axis_names), axis_types=(jax.sharding.AxisType.Auto,) * stacked.ndim)
    spread = jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(whole, spec), wanted))

    def mine(x: jax.Array, spec: Any) -> jax.Array:
        pieces = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(here, spec), pieces)

    return jax.tree.map(mine, spread, wanted)
