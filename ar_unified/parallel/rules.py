"""Maps logical axes to mesh axes: models name the meaning of an axis, and this table says which mesh axis splits it.

A parameter names each of its axes ("embed", "heads", ...); models do not know the mesh. To change how a model is split
over devices, change a row here. The compiler (GSPMD) derives the communication.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations and data.
    "batch": ("data", "fsdp"),  # fsdp splits rows too, so that its devices do not repeat the same work
    "draws": ("data", "fsdp", "tensor"),  # rows of logits in sampling: each device draws for its own rows
    "sequence": "context",  # long rows are split along T; keys and values are sent between devices
    # Parameters.
    "embed": "fsdp",  # every matrix has an axis of d_model, so this row shards all of them, as in ZeRO-3
    "vocab": "tensor",  # the largest matrix; the logits of a chunk of tokens stay split too
    "heads": "tensor",  # heads are independent in attention: no communication until the output projection
    "kv_heads": "tensor",  # each KV head is on the devices of the query heads that read it
    "mlp": "tensor",  # columns of the first matrix and rows of the second: one all-reduce per block
    "channels": "fsdp",  # output channels of a convolution: tokenizers are small, only their state is worth splitting
    "head_dim": None,  # summed inside a head: if split, every score would need an all-reduce
    "layers": None,  # the axis that scan walks: a layer must be whole on every device that runs it
}

# Axes that may stay whole if the mesh axis does not divide them. For other axes this is a mistake in the config.
MAY_STAY_WHOLE = {
    "kv_heads": "grouped-query attention often has fewer key heads than tensor has devices; K and V are then repeated",
    "channels": "the first and last convolutions have 3 or a few channels, whatever the mesh",
}


def spec(mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str = "array") -> P:
    """The PartitionSpec of one array, from the logical names of its axes (None: never split).

    Raises ValueError, naming the array, for an unknown logical axis, a wrong number of axes, two axes that need the
    same mesh axis, and a size that its mesh axis does not divide (except in MAY_STAY_WHOLE).
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: expected one logical axis per dimension of {shape}; found {axes}")
    taken: dict[str, str] = {}
    entries: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"{name}: unknown logical axis {axis!r}; known: {', '.join(sorted(RULES))}")
        target = RULES[axis] if axis is not None else None
        parts = (target,) if isinstance(target, str) else target or ()
        for part in parts:
            if part in taken:
                raise ValueError(f"{name}: logical axes {taken[part]!r} and {axis!r} both need mesh axis {part!r}")
            taken[part] = str(axis)
        ways = math.prod(mesh.shape[part] for part in parts)
        if size % ways:
            if axis not in MAY_STAY_WHOLE:
                raise ValueError(
                    f"{name}: axis {axis!r} has size {size}, not a multiple of mesh {' x '.join(parts)} = {ways}; "
                    f"choose a size of {axis!r} that is a multiple of {ways}, or a smaller {' or '.join(parts)}"
                )
            target = None
        entries.append(target)
    return P(*entries)


def specs(mesh: Mesh | AbstractMesh, logical_axes: Any, shapes: Any) -> Any:
    """The PartitionSpec of every leaf of `shapes` (arrays or ShapeDtypeStructs), from a same-shaped tree of tuples."""

    def one(path: KeyPath, leaf: Any, axes: tuple[str | None, ...]) -> P:
        return spec(mesh, axes, leaf.shape, jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(one, shapes, logical_axes)


def shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """The NamedSharding of every leaf of `shapes`; see `specs`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(mesh, logical_axes, shapes))


def on_mesh(shapes: Any, shardings: Any) -> Any:
    """`shapes` as ShapeDtypeStructs with their shardings."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def batch_spec(mesh: Mesh, shape: tuple[int, ...], name: str = "batch") -> P:
    """How an array of a batch is split: [B, T] by batch and sequence, any other shape only by its leading axis."""
    axes = ("batch", "sequence") if len(shape) == 2 else ("batch",) + (None,) * (len(shape) - 1)
    return spec(mesh, axes, shape, name)


def batch_part(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Returns (index, count): if a batch is cut into `count` equal parts, all rows on this process's devices are in
    part `index`.

    The result is (0, 1), the whole batch, for a single process. It is also (0, 1) if the mesh spreads a process's rows
    over several parts.
    """
    sharding = NamedSharding(mesh, spec(mesh, ("batch",), (rows,), "batch"))
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    held = [index[0].indices(rows)[:2] for index in indices if index is not None]
    start, stop = min(start for start, _ in held), max(stop for _, stop in held)
    size = stop - start
    return (start // size, rows // size) if rows % size == 0 and start % size == 0 else (0, 1)


def batch_shardings(mesh: Mesh, batch: Any) -> Any:
    """The NamedSharding of every array of a batch (or of its shapes), by `batch_spec`."""

    def one(path: KeyPath, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, batch_spec(mesh, x.shape, f"batch[{name!r}]"))

    return jax.tree_util.tree_map_with_path(one, batch)


def place_batch(mesh: Mesh, batch: Any, part: tuple[int, int] = (0, 1)) -> Any:
    """Puts a global batch onto the mesh. Each process copies the rows of its own devices.

    Args:
      batch: a part of the global batch, a pytree of numpy arrays [B / count, ...].
      part: (index, count) of this part, which must contain the rows of this process's devices (`batch_part`).
    """
    index, count = part

    def put(array: Any, whole: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        rows = len(array)

        def held(where: Any) -> Any:  # a slice of each axis
            start, stop, _ = where[0].indices(whole.shape[0])
            return array[(slice(start - index * rows, stop - index * rows), *where[1:])]

        return jax.make_array_from_callback(whole.shape, sharding, held)

    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) * count, *x.shape[1:]), x.dtype), batch)
    return jax.tree.map(put, batch, whole, batch_shardings(mesh, whole))
