"""Block sizes of the attention kernels, by device and shape, each with where it comes from.

A row says how many queries and keys a step of a kernel takes. On TPU it also says how many query heads: see tpu.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    queries: int
    keys: int
    heads: int = 1  # query heads in a step, at most


def blocks(device: str, head_dim: int, length: int, group: int, dtype_bytes: int) -> Blocks:
    return Blocks(128, 128, 8) if device == "cpu" else Blocks(512, 512, 8)
