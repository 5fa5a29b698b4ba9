"""Caches on which decode kernels fail first, as one list for all kernels."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from ar_unified.kernels.decode_attention import quantize


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """A row for each of `lengths`, with caches of S slots; and the shape of the heads."""

    lengths: tuple[int, ...]
    S: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    window: int | None = None
    soft_cap: float | None = None
    size: float = 1.0  # scale of the queries; large ones give log-sum-exps far from 0
    int8: bool = False

    def arrays(self, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
        """The keyword arguments of `decode_attention`."""
        B, random = len(self.lengths), np.random.default_rng(seed)
        q = random.standard_normal((B, self.heads, self.head_dim), np.float32) * self.size
        k, v = random.standard_normal((2, B, self.kv_heads, self.S, self.head_dim), np.float32)
        arrays = dict(q=q.astype(dtype), lengths=np.array(self.lengths, np.int32))
        if not self.int8:
            return arrays | dict(k=k.astype(dtype), v=v.astype(dtype))
        (k, k_scale), (v, v_scale) = (map(np.asarray, jax.jit(quantize)(x)) for x in (k, v))
        return arrays | dict(k=k, v=v, k_scale=k_scale[:, :, None], v_scale=v_scale[:, :, None])

    @property
    def options(self) -> dict:
        return dict(window=self.window, soft_cap=self.soft_cap)


# For kernels with blocks of 64 to 512 slots: rows that are empty, end on an edge or after it, or are full.
LENGTHS = (0, 1, 64, 65, 128, 200, 300)
CASES = {
    "multi-head": DecodeCase(LENGTHS, 300, heads=2, kv_heads=2),
    "grouped by 4": DecodeCase(LENGTHS, 300, heads=8, kv_heads=2),
    "grouped by 8": DecodeCase(LENGTHS, 300, heads=16, kv_heads=2, head_dim=128),
    "multi-query": DecodeCase(LENGTHS, 300, heads=5, kv_heads=1),
    "one row and head": DecodeCase((1000,), 1024, heads=1, kv_heads=1, head_dim=128),
    "several blocks": DecodeCase((1100, 0, 512, 513, 1024), 1100),
    "odd KV heads": DecodeCase((70, 33), 128, heads=6, kv_heads=3),
    "a short cache": DecodeCase((0, 7, 3), 7),
    "head_dim 256": DecodeCase((300, 17), 300, head_dim=256),
    "nothing but empty rows": DecodeCase((0, 0), 128),
    "window": DecodeCase((0, 1, 69, 70, 71, 512, 1100), 1100, window=70),
    "window of one": DecodeCase(LENGTHS, 300, window=1),
    "soft cap": DecodeCase(LENGTHS, 300, soft_cap=5.0, size=8.0),
    "window and soft cap": DecodeCase(LENGTHS, 300, window=33, soft_cap=2.0, size=4.0),
    "far log-sum-exps": DecodeCase(LENGTHS, 300, size=100.0),
    "int8": DecodeCase(LENGTHS, 300, int8=True),
    "int8, grouped by 8, window": DecodeCase((0, 1, 700, 1100), 1100, 8, 1, 128, window=600, int8=True),
}

# Few and small, because a GPU is emulated slowly: rows with some empty parts, and rings that are filled again.
HOPPER_CASES = {
    "rows in parts": DecodeCase((500, 64, 0), 512, 4, 1, 64),
    "window": DecodeCase((450, 512), 512, 2, 1, 64, window=300),
    "soft cap, filled again": DecodeCase((250, 0), 256, 4, 1, 128, soft_cap=5.0, size=8.0),
    "int8, filled again": DecodeCase((250,), 256, 4, 1, 256, int8=True),
}
