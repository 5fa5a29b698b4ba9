"""The device mesh: four named axes, configured by name, `make_mesh({"data": -1, "fsdp": 8, "tensor": 4})`.

`data` repeats the parameters, `fsdp` splits them and the batch with them, `tensor` splits heads, MLP and vocabulary,
`context` splits the sequence. An axis that is not named has size 1, so that one program serves a laptop and a pod.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

# From the slowest links to the fastest: neighbours in the device order end up in the same tensor/context group.
MESH_AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data, fsdp, tensor, context` over `devices` (default: all of them).

    Args:
      shape: size by axis name; absent axes have size 1, one axis may be -1 (all that is left). None: `data=-1`.
      devices: what to build it from.

    Axis types are always Auto (jax.make_mesh defaults to Explicit, under which shardings become part of the types).

    Raises ValueError for an unknown axis, two -1, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: 1 for axis in MESH_AXES} | dict({"data": -1} if shape is None else shape)
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"mesh: unknown axes {unknown}; the axes are {', '.join(MESH_AXES)}")
    wrong = {axis: size for axis, size in sizes.items() if size < 1 and size != -1}
    rest = [axis for axis, size in sizes.items() if size == -1]
    if wrong or len(rest) > 1:
        raise ValueError(f"mesh {sizes}: sizes are positive, and at most one is -1 (all that is left)")
    product = math.prod(size for size in sizes.values() if size != -1)
    if rest and len(devices) % product == 0:
        sizes[rest[0]] = len(devices) // product
    elif rest or product != len(devices):
        given = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        raise ValueError(
            f"mesh {given or 'of 1'}: the sizes given multiply to {product}, but there are {len(devices)} devices; "
            "choose sizes whose product is that number, or set one axis to -1 and let the others divide it"
        )
    return jax.make_mesh(
        tuple(sizes[axis] for axis in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )
