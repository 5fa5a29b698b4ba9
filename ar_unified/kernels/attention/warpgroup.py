"""The parts of the Hopper kernels: the walk over blocks, and the products and tiles of one warpgroup.

A tile is [64, columns] in the registers of the 128 threads of a warpgroup, in the layout of wgmma's results. A vector
over a tile's rows or columns has the same layout, reduced over the other axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ar_unified.kernels.attention.bounds import BlockRanges
from ar_unified.kernels.attention.spec import Spec

BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


# ---- the walk over blocks ------------------------------------------------------------------------------------------


class Walk(NamedTuple):
    """The blocks that one block visits, in order: first `left` masked blocks from `begin` on, then the other masked
    blocks from `clean_end` on, then the clean blocks. All masked blocks are visited `repeat` times before the clean
    blocks, which are then visited `repeat` times, too.
    """

    begin: jax.Array
    left: jax.Array
    clean_begin: jax.Array
    clean_end: jax.Array
    masked: jax.Array
    clean: jax.Array
    repeat: int

    def block(self, at: jax.Array) -> jax.Array:
        """The block of a masked visit. at: the number of the visit within one repeat."""
        return jnp.where(at < self.left, self.begin + at, self.clean_end + at - self.left)

    def fold(self, step: Callable, carry: tuple) -> tuple:
        """Calls step(whether it needs a mask, number of the visit, carry) for all visits."""
        masked, clean = self.masked * self.repeat, self.clean * self.repeat
        carry = lax.fori_loop(0, masked, functools.partial(step, True), carry)
        return lax.fori_loop(masked, masked + clean, functools.partial(step, False), carry)

    def visit(self, do: Callable) -> None:
        """Calls do(number of the visit, repeat, block) for all visits."""

        @pl.loop(0, self.masked * self.repeat)
        def _(at):
            do(at, at // self.masked, self.block(lax.rem(at, self.masked)))

        @pl.loop(0, self.clean * self.repeat)
        def _(at):
            do(self.masked * self.repeat + at, at // self.clean, self.clean_begin + lax.rem(at, self.clean))


def read_walk(ranges_ref, repeat: int = 1) -> Walk:
    """The walk of a block: which blocks it visits, and which of them need a mask."""
    begin, end, clean_begin, clean_end = (ranges_ref[i] for i in range(4))
    left = clean_begin - begin
    return Walk(begin, left, clean_begin, clean_end, left + end - clean_end, clean_end - clean_begin, repeat)


def stacked(ranges: BlockRanges) -> jax.Array:
    """The ranges as one array, int32 [B, blocks, 4]. If no block is clean, the whole range belongs to the part before
    the clean blocks.
    """
    clean_begin = jnp.clip(ranges.clean_begin, ranges.begin, ranges.end)
    empty = ranges.clean_begin >= ranges.clean_end
    clean_begin = jnp.where(empty, ranges.end, clean_begin)
    return jnp.stack([ranges.begin, ranges.end, clean_begin, jnp.where(empty, ranges.end, ranges.clean_end)], -1)


# ---- products and tiles --------------------------------------------------------------------------------------------


def _multiply(acc, a, b) -> None:
    """Issues acc += a @ b.T and does not wait for it. If a and b are [parts, rows, columns], it adds the products of
    all parts.
    """
    for left, right in [(a, b)] if len(a.shape) == 2 else [(a.at[p], b.at[p]) for p in range(a.shape[0])]:
        plgpu.wgmma(acc, left, right.transpose((1, 0)))


def product(a, b, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """a @ b.T, with a and b in shared memory. `meanwhile` runs after the product is issued, before its result is
    awaited."""

    def run(acc):
        _multiply(acc, a, b)
        meanwhile()
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[-2], b.shape[-2]), jnp.float32))


def two_products(first: tuple, second: tuple, then: Callable, *, overlap: bool) -> Any:
    """Calls then(f, g), where f() and g() give a @ b.T for the two pairs (a, b) in shared memory.

    With overlap, both products are issued at once, so that the work of `then` between f and g runs during the second
    product.
    """
    if not overlap:
        return then(lambda: product(*first), lambda: product(*second))

    def run(acc_first, acc_second):
        _multiply(acc_first, *first)
        _multiply(acc_second, *second)
        behind = 1 if len(second[0].shape) == 2 else second[0].shape[0]

        def result(acc, wait_n):
            # The wait does not name the registers that it waits for. Without the barrier, code that uses them could
            # move before the wait.
            return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=wait_n))

        return then(lambda: result(acc_first, behind), lambda: result(acc_second, 0))

    shape = first[0].shape[-2], first[1].shape[-2]
    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * 2)


def accumulate(spec: Spec, *terms: tuple) -> list[jax.Array]:
    """[acc + a @ b for acc, a, b in terms], with a in registers and b in shared memory."""
    accs, lefts, rights = zip(*terms, strict=True)
    if spec.interpret:  # JAX 0.12's emulation of a GPU supports neither run_state nor a left operand in registers
        out = [acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32) for acc, a, b in terms]
        plgpu.commit_smem()  # signals that wgmma has read b, so that TMA may write there next
        return out

    def run(refs):
        for ref, a, b in zip(refs, lefts, rights, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(run)([plgpu.ACC.init(acc) for acc in accs])


def free_all(*rings) -> None:
    """Gives every slot of the rings to the copying warpgroup."""
    for ring in rings:
        for slot in range(ring.shape[0]):
            plgpu.barrier_arrive(ring.at[slot])


def load(ref, layout=BY_ROW) -> jax.Array:
    """An array from memory into registers, laid out by `layout`."""
    return plgpu.layout_cast(ref[...], layout)


def full(shape, value: float) -> jax.Array:
    """A float32 array in registers, filled with `value`: a matrix if `shape` is a tuple, else a vector over rows."""
    layout = plgpu.Layout.WGMMA if isinstance(shape, tuple) else BY_ROW
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Positions along `axis` as int32 in registers, in the layout of a matrix product."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def down(x: jax.Array, tile: jax.Array) -> jax.Array:
    """Broadcasts a vector with a value for each row to the tile's shape."""
    return lax.broadcast_in_dim(x, tile.shape, [0])


def across(x: jax.Array, tile: jax.Array) -> jax.Array:
    """Broadcasts a vector with a value for each column to the tile's shape."""
    return lax.broadcast_in_dim(x, tile.shape, [1])


def opaque(index: jax.Array | int) -> jax.Array:
    """Hides from the compiler that an index does not change in a loop. Otherwise the compiler would compute the
    addresses of all slices of an operand before the loop, need too many registers, and spill.
    """
    return lax.optimization_barrier(jnp.asarray(index, jnp.int32))
