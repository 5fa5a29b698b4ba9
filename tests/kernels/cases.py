"""Packed rows on which attention kernels fail first, as one list for all kernels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of documents, `lengths[b]` in row b, the rest of its T positions padding; and the shape of the heads."""

    lengths: tuple[tuple[int, ...], ...]
    T: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    window: int | None = None
    soft_cap: float | None = None
    size: float = 1.0  # scale of the queries; large ones give log-sum-exps far from 0

    @property
    def doc_start(self) -> np.ndarray:
        out = np.full((len(self.lengths), self.T), self.T, np.int32)
        for row, lengths in zip(out, self.lengths, strict=True):
            begin = 0
            for length in lengths:
                row[begin : begin + length] = begin
                begin += length
        return out

    def arrays(self, dtype=jnp.float32, seed: int = 0) -> tuple[jax.Array, ...]:
        """q, k, v and the cotangent of the output."""
        keys = jax.random.split(jax.random.key(seed), 4)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        q, k, v, bar = (
            jax.random.normal(key, (len(self.lengths), self.T, n, self.head_dim), jnp.float32)
            for key, n in zip(keys, heads, strict=True)
        )
        return tuple(x.astype(dtype) for x in (q * self.size, k, v, bar))

    @property
    def options(self) -> dict:
        return dict(window=self.window, soft_cap=self.soft_cap)


# For kernels with blocks of 128: documents on a block's edge, across an edge, and smaller than a block.
CASES = {
    "one document": Case(((384,), (384,)), 384),
    "padding at the end": Case(((300,), (120,)), 384),
    "T no multiple of a block": Case(((200, 101), (301,)), 301),
    "ends on a block's edge": Case(((128, 128, 128), (256, 100)), 384),
    "many tiny ones": Case((tuple([7, 1, 30, 3, 12] * 4), tuple([19] * 13)), 256),
    "one token each": Case(((1,) * 140, (1,) * 160), 160),
    "nothing but padding": Case(((), (70,)), 160),
    "multi-head": Case(((100, 60),), 160, heads=4, kv_heads=4),
    "multi-query": Case(((100, 60),), 160, heads=4, kv_heads=1),
    "grouped by 4": Case(((100, 60),), 160, heads=8, kv_heads=2),
    "grouped by 8": Case(((100, 60),), 160, heads=8, kv_heads=1),
    "head_dim 128": Case(((100, 60), (150,)), 160, head_dim=128),
    "head_dim 256": Case(((100, 60), (150,)), 160, head_dim=256),
    "window": Case(((300, 20), (64, 1, 250)), 384, window=70),
    "window of one": Case(((100, 60),), 160, window=1),
    "soft cap": Case(((100, 60), (150,)), 160, soft_cap=5.0, size=8.0),
    "window and soft cap": Case(((200, 130),), 384, window=33, soft_cap=2.0, size=4.0),
    "far log-sum-exps": Case(((100, 60), (150,)), 160, size=100.0),
}
