"""The copying warpgroup of a Hopper kernel: it copies the operands of the other warpgroups into a ring of shared memory
(hopper.py).

B batch, T query position, S key position, N query heads, K KV heads, G = N / K, H head dim.
"""

from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

ROWS = 64  # rows of a wgmma, and of the tile of one warpgroup
CONSUMERS = 2  # warpgroups that compute; one more warpgroup copies
REGISTERS = 240, 24  # registers of a computing and of a copying thread; 240 + 240 + 24 is the limit, 504


def serve_queries(n, i, b, walk, block_k, ready, tiles, numbers, bounds, *rings) -> None:
    """Copies the operands of a block of queries: its own rows once, then its blocks of keys and values, each to a free
    slot.

    Args:
      tiles, numbers, bounds: pairs (from, to) of arrays [B, T, N, H], [B, N, T] and [B, T].
      ready: the barrier that counts these copies.
      rings: (from, to, free, ready) for keys and for values, in the order in which the kernel frees them.
    """
    plgpu.set_max_registers(REGISTERS[1], action="decrease")
    for w in range(CONSUMERS):
        rows = pl.ds((i * CONSUMERS + w) * ROWS, ROWS)
        for pairs, place in ((tiles, (b, rows, n)), (numbers, (b, n, rows)), (bounds, (b, rows))):
            for ref, smem in pairs:
                plgpu.copy_gmem_to_smem(ref.at[place], smem.at[w], ready)

    q_ref, k_ref = tiles[0][0], rings[0][0]
    kv = n // (q_ref.shape[2] // k_ref.shape[2])

    @walk.visit
    def copy(at, _, j):
        for ref, smem, slot_free, slot_ready in rings:
            slot = lax.rem(at, smem.shape[0])
            plgpu.barrier_wait(slot_free.at[slot])
            plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(j * block_k, block_k), kv], smem.at[slot], slot_ready.at[slot])


def serve_keys(kv, b, walk, block_q, registers, keys, tiles, ready, free, *rings) -> None:
    """Copies the operands of a block of keys: its own rows once, then its blocks of queries for each of the G heads
    that share it, each to a free slot.

    Args:
      keys: keys(array, group, part) is the part of an array [B, S, K, H] for [group, part] of shared memory.
      tiles: pairs (from, to) of such arrays.
      ready: the barrier that counts the copies of `tiles`.
      rings: (tile, numbers, bounds, ready), in the order in which the kernel waits for them. `tile` is a pair (from,
        to) of [B, T, N, H], `numbers` are pairs of [B, N, T], and `bounds` are pairs of [B, T].
    """
    plgpu.set_max_registers(registers, action="decrease")
    groups, parts = tiles[0][1].shape[:2]
    for g in range(groups):
        for p in range(parts):
            for ref, smem in tiles:
                plgpu.copy_gmem_to_smem(keys(ref, g, p), smem.at[g, p], ready)

    q_ref, q_smem = rings[0][0]
    stages, _, _, columns = q_smem.shape
    G = q_ref.shape[2] // tiles[0][0].shape[2]

    @walk.visit
    def copy(at, head, i):
        slot = lax.rem(at, stages)
        n, rows = kv * G + head, pl.ds(i * block_q, block_q)
        plgpu.barrier_wait(free.at[slot])
        for (tile_ref, tile_smem), numbers, bounds, slot_ready in rings:
            for p in range(parts):
                part = pl.ds(p * columns, columns)
                plgpu.copy_gmem_to_smem(tile_ref.at[b, rows, n, part], tile_smem.at[slot, p], slot_ready.at[slot])
            for pairs, place in ((numbers, (b, n, rows)), (bounds, (b, rows))):
                for ref, smem in pairs:
                    plgpu.copy_gmem_to_smem(ref.at[place], smem.at[slot], slot_ready.at[slot])
