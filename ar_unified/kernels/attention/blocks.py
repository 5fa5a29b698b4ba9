"""A table of the kernels' block sizes by device, head dim, length and GQA ratio. Each row says where it comes from.

A row is the best known choice for its case; `blocks` takes the first row that fits, so rows for special cases come
first.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Tile(NamedTuple):
    """
    Attributes:
      block_q: queries in a block.
      block_k: keys in a block.
      stages: blocks of the inner loop that are copied at the same time (hopper.py).
      heads: the largest number of query heads in a step (tpu.py).
    """

    block_q: int
    block_k: int
    stages: int = 1
    heads: int = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """
    Attributes:
      device: the beginning of JAX's name of the device kind, such as "TPU v5 lite", or "hopper" for H100, H200 and
        similar GPUs, which attention treats alike.
      kernel: "forward", "dq" or "dkv"; None: all.
      head_dim: H; None: any.
      tile: the choice.
      origin: the run that led to this choice, or another reason for it.
      length: the largest T or S for which the row may be used; None: any.
      group: the number of query heads per KV head; None: any.
      dtype_bytes: the bytes of an element of q; None: any.
    """

    device: str
    kernel: str | None
    head_dim: int | None
    tile: Tile
    origin: str
    length: int | None = None
    group: int | None = None
    dtype_bytes: int | None = None


# ---- TPU. None of these was chosen by a run on a TPU yet. Splash attention is best with 1024 to 2048 queries and 256
# (v5p) or 512 (v6e, 7x) keys computed at once (tokamax data/autotuning, mid-2026). A step here does as much work with
# several heads: 8 heads of 512 x 512 are as many scores as one head of 2048 x 1024, and short blocks fit documents
# better. The number of heads is what fits the 16 MiB of VMEM that a kernel has by default
# (tests/kernels/test_tpu_compiles.py). Each row was compiled for v4, which has the least VMEM, by libtpu 0.0.42.1; the
# tests compile some for the other TPUs.
FITS_TPU = "fits VMEM (compiled by libtpu, 2026-11-24); not timed"
LONG_TPU = "fits VMEM, and scalar memory for 128k queries and keys (compiled by libtpu, 2026-11-24); not timed"

_UP_TO = 1 << 15
_TPU = [
    # Blocks of float32 are smaller, because one float32 product is computed as six bfloat16 products.
    Row("TPU", None, 256, Tile(256, 256, heads=2), FITS_TPU, length=_UP_TO, dtype_bytes=4),
    Row("TPU", None, None, Tile(256, 256, heads=4), FITS_TPU, length=_UP_TO, dtype_bytes=4),
    Row("TPU", None, 256, Tile(512, 512, heads=2), FITS_TPU, length=_UP_TO, group=1),
    Row("TPU", None, 256, Tile(512, 512, heads=4), FITS_TPU, length=_UP_TO),
    Row("TPU", None, None, Tile(512, 512, heads=4), FITS_TPU, length=_UP_TO, group=1),
    Row("TPU", None, None, Tile(512, 512, heads=8), FITS_TPU, length=_UP_TO),
    Row("TPU", None, None, Tile(512, 512, heads=1), LONG_TPU, dtype_bytes=4),
    Row("TPU", None, 256, Tile(1024, 512, heads=1), LONG_TPU),
    Row("TPU", None, None, Tile(1024, 512, heads=2), LONG_TPU),
    Row("cpu", None, None, Tile(128, 128, heads=4), "the smallest blocks that TPU kernels take, for interpreted tests"),
]

# ---- Hopper. None of these was chosen by timing alternatives. They are published tilings if there are any, reduced
# until `make check-hopper` compiles them without a register spill and within 227 KiB of shared memory. The rows for
# heads of 128 have run on an H200 (docs/benchmarks.md).
FA3_TILE = "FlashAttention-3's tile for causal rows (its SM90_BLOCK_SIZE_TUNING.md)"
FITS_HOPPER = "fits registers and shared memory (make check-hopper), not timed here"

_HOPPER = [
    Row("hopper", "forward", 64, Tile(128, 128, 4), FITS_HOPPER),
    Row("hopper", "forward", 128, Tile(128, 128, 2), FA3_TILE),
    Row("hopper", "forward", 256, Tile(128, 64, 2), FITS_HOPPER),
    Row("hopper", "dq", 64, Tile(128, 64, 4), FITS_HOPPER),
    Row("hopper", "dq", 128, Tile(128, 64, 4), FITS_HOPPER),
    Row("hopper", "dq", 256, Tile(128, 64, 1), FITS_HOPPER),
    Row("hopper", "dkv", 64, Tile(64, 128, 4), FITS_HOPPER),
    Row("hopper", "dkv", 128, Tile(64, 128, 3), FA3_TILE),
    Row("hopper", "dkv", 256, Tile(64, 64, 2), FITS_HOPPER),
]

TABLE = [*_TPU, *_HOPPER]

# The bytes of a core's VMEM in which the fused backward kernel may sum the gradients of queries, by the beginning of
# the device kind. A kernel has 16 MiB by default, and the sums come on top: v5p and 7x have 64 MiB, v5e and v6e 128 MiB
# (pltpu.get_tpu_info). The rest is left to XLA, which keeps arrays in VMEM between kernels. v4 has 16 MiB in all, which
# is too little: with four heads of 64 numbers in a step, the kernel needs 16.01 MiB.
MiB = 1 << 20
VMEM = 16 * MiB
ROOM = {
    "TPU v5 lite": 64 * MiB,
    "TPU v5": 32 * MiB,
    "TPU v6": 64 * MiB,
    "TPU7": 32 * MiB,
    "cpu": MiB,
}


def cores(device: str) -> int:
    """The number of TensorCores of a device; they share the first axis of a grid. It is 2 on v4, on v5p and (for tests)
    on a CPU.
    """
    return 2 if device.startswith(("TPU v4", "TPU v5", "cpu")) and not device.startswith("TPU v5 lite") else 1


def room_for_sums(device: str) -> int:
    """The bytes of ROOM for a device; 0 if ROOM has no entry for it."""
    return next((room for kind, room in ROOM.items() if device.startswith(kind)), 0)


def blocks(device: str, kernel: str, head_dim: int, length: int, group: int, dtype_bytes: int = 2) -> Tile:
    """The tile of the first row of TABLE that fits; KeyError if none does."""
    for row in TABLE:
        asked = {"kernel": kernel, "head_dim": head_dim, "group": group, "dtype_bytes": dtype_bytes}
        if not device.startswith(row.device) or (row.length is not None and length > row.length):
            continue
        if all(getattr(row, name) in (None, value) for name, value in asked.items()):
            return row.tile
    raise KeyError(
        f"no block sizes for {kernel} on {device} with head_dim {head_dim}; add a row to TABLE in {__name__}"
    )
