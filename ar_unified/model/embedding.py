"""Looks up token vectors in a table that is split by id over tensor and by column over fsdp.

Devices exchange tokens, not the table. Each device looks up its columns for the batch rows of its whole fsdp group.
Then the devices of a tensor group add up their results (one has the vector, the others zeros). Last, an exchange over
fsdp returns each row to its device. These steps move as many bytes as the result has, and the table of a large
vocabulary has more bytes. They are written out here, because the compiler alone would collect the result of all devices
on each device if sequences are split too.

B batch, T position, V vocabulary, D model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.parallel.rules import spec


def look_up(table: jax.Array, tokens: jax.Array, dtype: str, sequence: str | None = None) -> jax.Array:
    """table[tokens], [B, T, D] in `dtype`; gradients are summed in the table's dtype.

    Args:
      table: [V, D].
      tokens: int32 [B, T].
      sequence: the logical axis of T: "sequence" if the mesh may split it, None if it is not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return table[tokens].astype(dtype)

    def part(table: jax.Array, tokens: jax.Array) -> jax.Array:
        local = jax.lax.all_gather(tokens, "fsdp", tiled=True) - jax.lax.axis_index("tensor") * table.shape[0]
        there = (local >= 0) & (local < table.shape[0])
        rows = jnp.where(there[..., None], table[jnp.where(there, local, 0)], 0.0).astype(dtype)
        return jax.lax.all_to_all(jax.lax.psum(rows, "tensor"), "fsdp", split_axis=0, concat_axis=2, tiled=True)

    ins = (
        spec(mesh, ("vocab", "embed"), table.shape, "embedding"),
        spec(mesh, ("batch", sequence), tokens.shape, "tokens"),
    )
    return jax.shard_map(part, in_specs=ins, out_specs=jax.P(*ins[1], None))(table, tokens)
