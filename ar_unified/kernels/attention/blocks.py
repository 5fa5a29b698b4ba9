"""Block sizes of the attention kernels, by device and shape, each with where it comes from.

To add a row: time the kernel (experiments/benchmarks/attention.py), write what won and where it was measured. The first
row that fits a call is taken.
"""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    queries: int
    keys: int
    heads: int = 1  # query heads in one step of a TPU kernel, at most


class Row(NamedTuple):
    device: str  # how its kind begins, as JAX names it
    blocks: Blocks
    source: str
    head_dim: int | None = None  # None: any
    longest: int | None = None  # of queries and keys, up to this; None: any
    group: int | None = None  # query heads to a KV head, at least; None: any
    dtype_bytes: int | None = None  # of q, k and v; None: any


# ---- TPU: not timed, no TPU was at hand -----------------------------------------------------------------------------
# What is known of other kernels there: the best blocks of splash attention are 1024 to 2048 queries with 256 (v5p) or 512
# (v6e, 7x) keys computed at once (tokamax data/autotuning, mid-2026). Steps here are as long, by heads rather than by
# queries: 8 heads x 512 queries x 512 keys are the scores of 2048 x 1024 of one head, and blocks of 512 waste less at
# the edges of documents of 1k. The number of heads is what fits the 16 MiB of VMEM that a kernel has by default,
# as tests/kernels/test_tpu_compiles.py checks with libtpu.
_FITS = "not timed: as in the comment above, compiled for v4, v5e, v5p, v6e, 7x by libtpu 0.0.42.1 and 0.0.50.1"
_LONG = "not timed: as many scores a step, in fewer steps, whose list must fit the scalar memory"
_TPU = [
    Row("TPU", Blocks(512, 512, 4), _FITS, head_dim=64, longest=1 << 15, dtype_bytes=4),
]

TABLE = [
    *_TPU,
    Row("cpu", Blocks(128, 128, 8), "to interpret in tests: the smallest that TPU kernels take"),
]


def blocks(device: str, *, head_dim: int, length: int, group: int, dtype_bytes: int) -> Blocks:
    """Block sizes for a call on a device of this kind; `length` is the greater of queries and keys."""
    for row in TABLE:
        if (
            device.startswith(row.device)
            and row.head_dim in (None, head_dim)
            and (row.longest is None or length <= row.longest)
            and (row.group is None or group >= row.group)
            and row.dtype_bytes in (None, dtype_bytes)
        ):
            return row.blocks
    return Blocks(128, 128)
