"""The order of a row's columns under context parallelism: device i of C holds pieces i and 2C - 1 - i of 2C.

If a causal row were split into C pieces, the last device would have 2C - 1 times the work of the first, and all would
wait for it. With one early and one late piece, each device sees the same number of keys. A batch is on the devices in
sequence order, and the model changes it to zigzag order. This sends little data compared with the keys of one layer.

C number of devices on the context axis, B batch, T position.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from ar_unified.parallel.rules import spec


def zigzag(x: jax.Array) -> jax.Array:
    """Changes [B, T, ...] from sequence order to zigzag order. If the mesh in scope does not split sequences, nothing
    changes.

    Raises ValueError if T is not a multiple of 2C.
    """
    return _exchange(x, _to_zigzag)


def unzigzag(x: jax.Array) -> jax.Array:
    """Changes [B, T, ...] back to sequence order."""
    return _exchange(x, _to_sequence)


def pieces(device: jax.Array, ways: int, width: int) -> tuple[jax.Array, jax.Array]:
    """The columns of the sequence at which a device's early piece and its late piece begin. There are `ways` devices,
    and each piece has `width` columns."""
    return device * width, (2 * ways - 1 - device) * width


def require_pieces(length: int, ways: int) -> None:
    """Raises ValueError unless rows of `length` tokens can be split over `ways` devices."""
    if ways > 1 and length % (2 * ways):
        raise ValueError(
            f"rows of {length} tokens do not split into the 2 x context = {2 * ways} equal pieces that "
            f"context={ways} devices hold: choose a sequence length that is a multiple of {2 * ways}"
        )


def _exchange(x: jax.Array, part) -> jax.Array:
    mesh: AbstractMesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["context"] == 1:
        return x
    require_pieces(x.shape[1], mesh.shape["context"])
    where = spec(mesh, ("batch", "sequence") + (None,) * (x.ndim - 2), x.shape, "row")
    return jax.shard_map(part, in_specs=where, out_specs=where)(x)


def _homes(ways: int) -> tuple[list[int], list[int]]:
    """The devices that hold pieces 0, 2, 4, ..., and the devices that hold pieces 1, 3, 5, ...; each list has every
    device once."""
    home = [min(piece, 2 * ways - 1 - piece) for piece in range(2 * ways)]
    return home[0::2], home[1::2]


def _to_zigzag(x: jax.Array) -> jax.Array:
    ways, index = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    even, odd = (
        jax.lax.ppermute(half, "context", list(enumerate(homes)))
        for half, homes in zip(jnp.split(x, 2, axis=1), _homes(ways), strict=True)
    )
    early, late = (jnp.where(index % 2 == 0, *pair) for pair in ((even, odd), (odd, even)))
    return jnp.concatenate([early, late], axis=1)


def _to_sequence(x: jax.Array) -> jax.Array:
    ways, index = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    early, late = jnp.split(x, 2, axis=1)
    halves = (jnp.where(index % 2 == 0, *pair) for pair in ((early, late), (late, early)))
    return jnp.concatenate(
        [
            jax.lax.ppermute(half, "context", [(home, device) for device, home in enumerate(homes)])
            for half, homes in zip(halves, _homes(ways), strict=True)
        ],
        axis=1,
    )
