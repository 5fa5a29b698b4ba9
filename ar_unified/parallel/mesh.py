"""The device mesh has four named axes. The sizes are given by name: `make_mesh({"data": -1, "fsdp": 8, "tensor": 4})`.

`data` splits the batch and repeats the parameters, `fsdp` splits both, `tensor` splits heads, MLP and vocabulary,
`context` splits the sequence. An axis that is not named has size 1, so that one program works on a laptop and a pod.

TPU slices are joined by the data centre's network (DCN), which is about a hundred times slower than the links inside a
slice (ICI). Slices are the outer part of `data`, which transfers one gradient per step; no other axis crosses slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

# From the slowest links to the fastest, so that neighbours in the device order are in the same tensor/context group.
MESH_AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data, fsdp, tensor, context` over `devices` (default: all of them).

    Args:
      shape: size by axis name. Absent axes have size 1; one axis may be -1 (all remaining devices). None: `data=-1`.
      devices: the devices of the mesh.

    Axis types are always Auto (the default of jax.make_mesh is Explicit, which makes shardings part of the types).

    Raises ValueError for an unknown axis, two -1, sizes that do not multiply to the number of devices, or axes other
    than `data` that do not fit into a slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: 1 for axis in MESH_AXES} | dict({"data": -1} if shape is None else shape)
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"mesh: unknown axes {unknown}; the axes are {', '.join(MESH_AXES)}")
    wrong = {axis: size for axis, size in sizes.items() if size < 1 and size != -1}
    rest = [axis for axis, size in sizes.items() if size == -1]
    if wrong or len(rest) > 1:
        raise ValueError(f"mesh: expected positive sizes, or -1 for one axis (the remaining devices); found {sizes}")
    product = math.prod(size for size in sizes.values() if size != -1)
    if rest and len(devices) % product == 0:
        sizes[rest[0]] = len(devices) // product
    elif rest or product != len(devices):
        raise ValueError(
            f"mesh {_shown(sizes)}: the sizes given multiply to {product}, but there are {len(devices)} devices; "
            f"choose sizes whose product is {len(devices)}, or set one axis to -1 and let the product of the others "
            f"divide {len(devices)}"
        )
    slices = _slices(devices)
    inner = math.prod(size for axis, size in sizes.items() if axis != "data")
    if len(slices[0]) % inner:
        raise ValueError(
            f"mesh {_shown(sizes)}: fsdp, tensor and context stay inside a slice, but their product {inner} does not "
            f"divide the {len(slices[0])} devices of each of the {len(slices)} slices; choose sizes whose product "
            f"divides {len(slices[0])}, and let data span the slices"
        )
    shape_of_slice = (sizes["data"] // len(slices), *(sizes[axis] for axis in MESH_AXES[1:]))
    # If the axes of a TPU's network do not match these sizes, one of them may be split into two axes of the mesh.
    parts = [mesh_utils.create_device_mesh(shape_of_slice, part, allow_split_physical_axes=True) for part in slices]
    return Mesh(np.concatenate(parts), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def decoding_axes(shape: Mapping[str, int]) -> dict[str, int]:
    """The mesh for decoding on the devices of one process, from a config's mesh. `tensor` splits heads, and the other
    axes become `data`, which splits rows.

    Each process serves requests of its own. The axes fsdp and context save memory in training, but would make every
    decoding step wait for weights. So their devices split rows instead.
    """
    return {"data": -1, "tensor": shape.get("tensor", 1)}


def _slices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices by TPU slice. GPUs are not grouped: their slice_index is the host, and fsdp over several hosts is
    usual."""
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0) if device.platform == "tpu" else 0, []).append(device)
    if len({len(part) for part in slices.values()}) > 1:
        raise ValueError(
            f"mesh: expected slices of the same size, found sizes {[len(part) for part in slices.values()]}"
        )
    return [slices[index] for index in sorted(slices)]


def _shown(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "of 1"
