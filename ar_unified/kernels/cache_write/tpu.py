"""Writes a slot of each row on TPU: the tiles that contain the slot are read, changed and written back.

Memory is read and written in tiles. A slot is one row of a tile, or one lane in caches whose layout in memory is [B, K,
H, S]. The tiles that contain a row's slot, for all heads, are its window. The windows of a group of rows are copied at
the same time, and the windows of the next group are read meanwhile. So the time depends only on the number of bytes:
for each new slot of a bfloat16 cache, 16 slots are read and 16 are written.

B batch, K KV heads, S cache slot, H head dim, W slots of a window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
WINDOW_BYTES = 4 * 1024 * 1024  # bytes of VMEM, for the windows of two groups of rows


class _Lying(NamedTuple):
    """An array in its layout in memory, [B, K, *, *], and its new entries. `axis`: the axis of slots; `turned`: whether
    axes 2 and 3 of the cache are exchanged in memory.

    `new` is [K, B, *] with elements of 32 bits. The result of a projection to heads has this layout, and the kernel can
    read one row alone. For a turned cache it is [B, K, H, 1]. New scales are [K * B]; the kernel reads them as scalars.
    """

    cache: jax.Array
    new: jax.Array
    axis: int
    turned: bool = False

    @property
    def window(self) -> int:
        """The number of slots that are read and written together."""
        return LANES if self.axis == 3 else 32 // self.cache.dtype.itemsize


def _lying(cache: jax.Array, new: jax.Array) -> _Lying:
    if new.ndim == 2:
        return _Lying(cache, new.T.reshape(-1), 3)
    if cache.shape[3] % LANES:  # kernels/decode_attention/tpu.py says why the axes are exchanged in this case
        return _Lying(jnp.swapaxes(cache, 2, 3), new[..., None], 3, turned=True)
    wide = jnp.int32 if new.dtype == jnp.int8 else jnp.float32
    return _Lying(cache, jnp.swapaxes(new.astype(wide), 0, 1), 2)


def unsupported(layer: tuple[jax.Array, ...]) -> str | None:
    """Returns the reason why the kernel cannot write into these arrays, or None if it can."""
    H, S = layer[0].shape[3], layer[0].shape[2]
    lanes = H % LANES or len(layer) > 2  # some arrays have their slots along the lanes
    window = LANES if lanes else 32 // layer[0].dtype.itemsize
    if H % 64 or S % window or _rows(layer) is None:
        return (
            f"expected a head dim in multiples of 64, a cache length in multiples of {window}, and 8 rows (or all) "
            f"whose windows fit VMEM; found keys {layer[0].shape}"
        )
    return None


def _heads(layer: tuple[jax.Array, ...]) -> int:
    """The number of KV heads per core; two cores of a chip share the heads."""
    K = layer[0].shape[1]
    return K // 2 if K % 2 == 0 else K


def _rows(layer: tuple[jax.Array, ...]) -> int | None:
    """The number of rows in a group: a multiple of 8, so that the group's new entries fill whole tiles, or all rows.
    Returns None if not even the smallest group fits into memory.
    """
    B, _, _, H = layer[0].shape
    window = (LANES if H % LANES else 32 // layer[0].dtype.itemsize) * H * layer[0].dtype.itemsize
    row = _heads(layer) * (2 * window + (len(layer) - 2) * LANES * 4)
    fit = [n for n in range(1, B + 1) if B % n == 0 and (n % 8 == 0 or n == B)]
    return max((n for n in fit if 2 * n * row <= WINDOW_BYTES), default=None)


def forward(
    layer: tuple[jax.Array, ...], new: tuple[jax.Array, ...], slots: jax.Array, *, interpret: bool
) -> tuple[jax.Array, ...]:
    """See `cache_write`."""
    arrays = [_lying(*each) for each in zip(layer, new, strict=True)]
    B, K, heads, rows = *layer[0].shape[:2], _heads(layer), _rows(layer)
    assert rows is not None
    windows = [(heads, *(x.window if at == x.axis else x.cache.shape[at] for at in (2, 3))) for x in arrays]
    groups, in_place = B // rows, [pl.BlockSpec(memory_space=pltpu.HBM)] * len(arrays)
    scalars = [slots, *(x.new for x in arrays if x.new.ndim == 1)]
    vectors = [x.new for x in arrays if x.new.ndim > 1]
    out = pl.pallas_call(
        functools.partial(_kernel, rows, groups, [(x.axis, x.window) for x in arrays], len(scalars)),
        out_shape=[pltpu.HBM(x.cache.shape, x.cache.dtype) for x in arrays],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(K // heads, groups),
            in_specs=[
                *(_of_rows(rows, heads, new) for new in vectors),
                *in_place,
            ],
            out_specs=in_place,
            scratch_shapes=[
                *(pltpu.VMEM((2, rows, *w), x.cache.dtype) for w, x in zip(windows, arrays, strict=True)),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        input_output_aliases={len(scalars) + len(vectors) + i: i for i in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="cache_write",
    )(*scalars, *vectors, *(x.cache for x in arrays))
    return tuple(jnp.swapaxes(x, 2, 3) if each.turned else x for x, each in zip(out, arrays, strict=True))


def _of_rows(rows: int, heads: int, new: jax.Array) -> pl.BlockSpec:
    """The new entries that one core writes for a group of rows."""
    if new.ndim == 3:
        return pl.BlockSpec((heads, rows, new.shape[2]), lambda h, g, *_: (h, g, 0))
    return pl.BlockSpec((rows, heads, *new.shape[2:]), lambda h, g, *_: (g, h, 0, 0))


def _kernel(rows, groups, shapes, n_scalars, slots, *refs):
    n, n_scales = len(shapes), n_scalars - 1
    new = [*refs[n_scales:n], *refs[:n_scales]]  # scales are scalars and come first, but in a layer they come last
    caches, windows, arrived = refs[2 * n : 3 * n], refs[3 * n : 4 * n], refs[-1]
    h, g = pl.program_id(0), pl.program_id(1)

    def begin(length: int, row: jax.Array, window: int) -> jax.Array:
        """The first slot of a row's window; any valid slot for a row that is not written."""
        slot = jnp.clip(slots[row], 0, length - 1)
        return pl.multiple_of(slot & -window, window)

    def copies(group: jax.Array, r: jax.Array, write: bool) -> Iterator[Any]:
        """The copies of the windows of one row of a group, from memory to VMEM or back."""
        row, half = group * rows + r, group & 1
        for (axis, window), cache, held in zip(shapes, caches, windows, strict=True):
            heads, slot = held.shape[2], pl.ds(begin(cache.shape[axis], row, window), window)
            there = cache.at[(row, pl.ds(h * heads, heads), *((slot,) if axis == 2 else (slice(None), slot)))]
            here = held.at[half, r]
            yield pltpu.make_async_copy(*((here, there) if write else (there, here)), arrived.at[int(write), half])

    def of_rows(function: Callable[[jax.Array], object]) -> None:
        jax.lax.fori_loop(0, rows, lambda r, _: function(r) and None, None)

    def start(group: jax.Array, write: bool) -> None:
        of_rows(lambda r: [copy.start() for copy in copies(group, r, write)])

    def wait(group: jax.Array, write: bool) -> None:
        of_rows(lambda r: [copy.wait() for copy in copies(group, r, write)])

    def change(r: jax.Array) -> None:
        row = g * rows + r
        for (axis, window), x, cache, held in zip(shapes, new, caches, windows, strict=True):
            old = held[g & 1, r]
            slot = begin(cache.shape[axis], row, window) + jax.lax.broadcasted_iota(jnp.int32, old.shape, axis - 1)
            if len(x.shape) == 1:
                at = h * old.shape[0] * (groups * rows) + row
                each = [x[at + head * (groups * rows)] for head in range(old.shape[0])]
                added = jnp.stack([jnp.full(old.shape[1:], scale) for scale in each])
            else:
                added = x[:, pl.ds(r, 1), :] if len(x.shape) == 3 else x[r]
            added = jnp.broadcast_to(added, old.shape).astype(old.dtype)
            held[g & 1, r] = jnp.where(slot == slots[row], added, old)

    @pl.when(g == 0)
    def _():
        start(g, False)

    @pl.when(g > 0)
    def _():
        wait(g - 1, True)

    @pl.when(g + 1 < groups)
    def _():
        start(g + 1, False)

    wait(g, False)
    of_rows(change)
    start(g, True)

    @pl.when(g + 1 == groups)
    def _():
        wait(g, True)
