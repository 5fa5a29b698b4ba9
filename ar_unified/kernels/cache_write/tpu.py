"""A slot of each row on TPU: the tiles that hold it are read, changed and written back.

Memory is read and written in tiles, of which a slot is one row (or, of the caches that lie as [B, K, H, S], one lane).
The tiles of all heads of a row are one window. The windows of a group of rows are on their way at once, those of the
next group behind them, so that the time is that of the bytes: 2 x 16 slots of a bfloat16 cache for each that is new.

B batch, K KV heads, S cache slot, H head dim, W slots of a window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
WINDOW_BYTES = 4 * 1024 * 1024  # of VMEM, for the windows of two groups of rows


class _Lying(NamedTuple):
    """An array as it lies in memory, [B, K, *, *], and what is new, with as many axes; which one is that of the slots;
    whether it is turned: memory has the axes 2 and 3 of the cache the other way round."""

    cache: jax.Array
    new: jax.Array
    axis: int
    turned: bool = False

    @property
    def window(self) -> int:
        """Slots that are read and written together."""
        return LANES if self.axis == 3 else 32 // self.cache.dtype.itemsize


def _lying(cache: jax.Array, new: jax.Array) -> _Lying:
    if new.ndim == 2:
        return _Lying(cache, jnp.broadcast_to(new[:, :, None], (*new.shape, LANES)), 3)
    if cache.shape[3] % LANES:  # kernels/decode_attention/tpu.py says why
        return _Lying(jnp.swapaxes(cache, 2, 3), new[..., None], 3, turned=True)
    return _Lying(cache, new, 2)


def supported(layer: tuple[jax.Array, ...]) -> bool:
    """Whether the kernel can write into these: heads in half rows of lanes, and windows that are whole."""
    H, S = layer[0].shape[3], layer[0].shape[2]
    lanes = H % LANES or len(layer) > 2  # some array has its slots along the lanes
    return H % 64 == 0 and S % (LANES if lanes else 32 // layer[0].dtype.itemsize) == 0


def forward(
    layer: tuple[jax.Array, ...], new: tuple[jax.Array, ...], slots: jax.Array, *, interpret: bool
) -> tuple[jax.Array, ...]:
    """As `cache_write`."""
    arrays = [_lying(*each) for each in zip(layer, new, strict=True)]
    B, K = slots.shape[0], layer[0].shape[1]
    heads = K // 2 if K % 2 == 0 else K  # where a chip has two cores, they share the heads
    windows = [(heads, *(x.window if at == x.axis else x.cache.shape[at] for at in (2, 3))) for x in arrays]
    row = sum(math.prod(window) * x.cache.dtype.itemsize for window, x in zip(windows, arrays, strict=True))
    rows = max(n for n in range(1, B + 1) if B % n == 0 and (n == 1 or 2 * n * row <= WINDOW_BYTES))
    groups, in_place = B // rows, [pl.BlockSpec(memory_space=pltpu.HBM)] * len(arrays)
    out = pl.pallas_call(
        functools.partial(_kernel, rows, groups, [(x.axis, x.window) for x in arrays]),
        out_shape=[pltpu.HBM(x.cache.shape, x.cache.dtype) for x in arrays],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(K // heads, groups),
            in_specs=[
                *(_of_rows(rows, heads, x.new) for x in arrays),
                *in_place,
            ],
            out_specs=in_place,
            scratch_shapes=[
                *(pltpu.VMEM((2, rows, *w), x.cache.dtype) for w, x in zip(windows, arrays, strict=True)),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        input_output_aliases={1 + len(arrays) + i: i for i in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="cache_write",
    )(slots, *(x.new for x in arrays), *(x.cache for x in arrays))
    return tuple(jnp.swapaxes(x, 2, 3) if each.turned else x for x, each in zip(out, arrays, strict=True))


def _of_rows(rows: int, heads: int, new: jax.Array) -> pl.BlockSpec:
    """Of a group of rows a core's heads; all heads where they lie in one tile, which XLA would have to take apart."""
    if new.ndim == 3:
        return pl.BlockSpec((rows, *new.shape[1:]), lambda h, g, slots: (g, 0, 0))
    return pl.BlockSpec((rows, heads, *new.shape[2:]), lambda h, g, slots: (g, h, 0, 0))


def _kernel(rows, groups, shapes, slots, *refs):
    n = len(shapes)
    new, caches, windows, arrived = refs[:n], refs[2 * n : 3 * n], refs[3 * n : 4 * n], refs[-1]
    h, g = pl.program_id(0), pl.program_id(1)

    def begin(length: int, row: jax.Array, window: int) -> jax.Array:
        """Of the window of a row; of a row that is not written, any."""
        slot = jnp.clip(slots[row], 0, length - 1)
        return pl.multiple_of(slot & -window, window)

    def copies(group: jax.Array, r: jax.Array, write: bool) -> Iterator[Any]:
        """Of the windows of a row of a group, from memory to VMEM or back."""
        row, half = group * rows + r, group & 1
        for (axis, window), cache, held in zip(shapes, caches, windows, strict=True):
            heads, slot = held.shape[2], pl.ds(begin(cache.shape[axis], row, window), window)
            there = cache.at[(row, pl.ds(h * heads, heads), *((slot,) if axis == 2 else (slice(None), slot)))]
            here = held.at[half, r]
            yield pltpu.make_async_copy(*((here, there) if write else (there, here)), arrived.at[int(write), half])

    def of_rows(function: Callable[[jax.Array], Any]) -> None:
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
            added = x[r]
            if added.ndim == 2:  # all heads: rows of a tile become tiles of their own, as 32 bits
                added = added.astype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
                heads = len(old)
                added = added if heads == len(added) else jnp.where(h == 0, added[:heads], added[heads:])
                added = added[:, None]
            added = jnp.broadcast_to(added, old.shape).astype(x.dtype)
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
