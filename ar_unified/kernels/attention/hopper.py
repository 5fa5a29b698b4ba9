"""Attention on Hopper GPUs (sm_90a), in Pallas Mosaic GPU: blocks outside a query's document are never read.

One thread block has three warpgroups. The last one only issues TMA copies into a ring of shared memory; the other two
multiply (wgmma) 64 rows each. When a thread block starts, it reads the blocks that it must visit from the ranges of
bounds.py. It first visits the blocks that need a mask and then the clean ones, so only one of the two loops computes a
mask.

forward   one block of queries, over its blocks of keys
dq        the same walk, with the weights computed again from the log-sum-exp
dkv       a block of keys, over its blocks of queries for each of the G heads that share them; scores are transposed
          ([S, T]), so that weights stay in registers as the left operand of both products

Backward has two kernels, so it is deterministic. A single kernel would need 5 products instead of 7, but would have to
add up dq by atomic operations.

B batch, T query position, S key position, N query heads, K KV heads, G = N / K, H head dim, I blocks of queries, J
blocks of keys. Scores are kept in base 2: `factor` of tile.py is the softmax's scale times log2(e).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ar_unified.kernels.attention import tile
from ar_unified.kernels.attention.blocks import Tile, blocks
from ar_unified.kernels.attention.bounds import Bounds, key_ranges, pad_queries, query_ranges
from ar_unified.kernels.attention.copies import CONSUMERS, REGISTERS, ROWS, serve_keys, serve_queries
from ar_unified.kernels.attention.spec import Spec
from ar_unified.kernels.attention.warpgroup import (
    BY_COLUMN,
    accumulate,
    across,
    down,
    free_all,
    full,
    iota,
    load,
    opaque,
    product,
    read_walk,
    stacked,
    two_products,
)

HEAD_DIMS = (64, 128, 256)


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Returns the reason why these shapes cannot be computed here, or None if they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"expected q, k and v of bfloat16 or float16, all the same; found {q.dtype} and {k.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"expected a head dim of {', '.join(map(str, HEAD_DIMS))}; found {q.shape[-1]}"
    return None


def recomputed(q: jax.Array, k: jax.Array) -> int:
    """See `attention.recomputed`."""
    return 3


def prepare(spec: Spec, q: jax.Array, k: jax.Array, bounds: Bounds) -> Bounds:
    """Returns the bounds in the form that `forward` and `backward` take, here unchanged."""
    return bounds


def forward(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, T, N, H] in the dtype of v, and log-sum-exp float32 [B, N, T]."""
    if spec.scale <= 0:
        raise ValueError(f"attention: the Hopper kernel's running maximum needs a scale above 0; found {spec.scale}")
    T, S = q.shape[1], k.shape[1]
    block_q, block_k, stages, _ = _tile("forward", q, k)
    q, k, v = _pad(q, block_q), _pad(k, block_k), _pad(v, block_k)
    B, length, N, H = q.shape
    bounds = pad_queries(bounds, length, S)
    out, lse = _launch(
        "forward",
        functools.partial(_forward_kernel, spec, block_k),
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, length), jnp.float32)],
        scratch_types=[
            _tiled((CONSUMERS, ROWS, H), q.dtype),
            *[_tiled((stages, block_k, H), q.dtype)] * 2,
            plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            *[plgpu.SMEM((CONSUMERS, ROWS), jnp.int32)] * 2,
            plgpu.Barrier(num_arrivals=3 * CONSUMERS),
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            *[plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)] * 2,
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
        grid=(N, length // block_q, B),
        interpret=spec.interpret,
    )(q, k, v, *bounds, stacked(key_ranges(bounds, S, block_q, block_k)))
    return out[:, :T], lse[..., :T]


def backward(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: Bounds,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v; `delta` float32 [B, N, T] is sum(dout * out) over H, minus the gradient of `lse`."""
    T, S = q.shape[1], k.shape[1]
    dq_tile, dkv_tile = _tile("dq", q, k), _tile("dkv", q, k)
    # Of the blocks of dq and dkv the larger is a multiple of the smaller one, for queries and for keys.
    q, dout = (_pad(x, max(dq_tile.block_q, dkv_tile.block_q)) for x in (q, dout.astype(q.dtype)))
    k, v = (_pad(x, max(dq_tile.block_k, dkv_tile.block_k)) for x in (k, v))
    B, length, N, H = q.shape
    K = k.shape[2]
    bounds = pad_queries(bounds, length, S)
    # A query that sees nothing has +inf here: exp2(score - inf) is exactly 0, in clean blocks too.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * tile.LOG2_E)
    lse = jnp.pad(lse, [(0, 0), (0, 0), (0, length - T)], constant_values=jnp.inf)
    delta = jnp.pad(delta, [(0, 0), (0, 0), (0, length - T)])
    operands = q, k, v, dout, lse, delta, *bounds

    block_q, block_k, stages, _ = dq_tile
    dq = _launch(
        "dq",
        functools.partial(_dq_kernel, spec, block_k),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            *[_tiled((CONSUMERS, ROWS, H), q.dtype)] * 2,
            *[_tiled((stages, block_k, H), q.dtype)] * 2,
            *[plgpu.SMEM((CONSUMERS, ROWS), jnp.float32)] * 2,
            *[plgpu.SMEM((CONSUMERS, ROWS), jnp.int32)] * 2,
            plgpu.Barrier(num_arrivals=6 * CONSUMERS),
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            *[plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)] * 2,
        ],
        grid=(N, length // block_q, B),
        interpret=spec.interpret,
    )(*operands, stacked(key_ranges(bounds, S, block_q, block_k)))

    block_q, block_k, stages, _ = dkv_tile
    by_query = key_ranges(bounds, S, block_q, block_k)
    # Two [64, 256] sums in float32 do not fit a warpgroup's registers. So at a head dim of 256 both warpgroups compute
    # the same 64 keys, and each sums half of the columns.
    parts = CONSUMERS * ROWS // block_k
    dk, dv = _launch(
        "dkv",
        functools.partial(_dkv_kernel, spec, block_q),
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        scratch_types=[
            *[_tiled((block_k // ROWS, parts, ROWS, H // parts), q.dtype)] * 2,
            *[_tiled((stages, parts, block_q, H // parts), q.dtype)] * 2,
            *[plgpu.SMEM((stages, block_q), jnp.float32)] * 2,
            *[plgpu.SMEM((stages, block_q), jnp.int32)] * 2,
            plgpu.Barrier(num_arrivals=2 * CONSUMERS),
            plgpu.Barrier(num_arrivals=parts + 3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=parts + 1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
        grid=(K, k.shape[1] // block_k, B),
        interpret=spec.interpret,
    )(*operands, stacked(query_ranges(by_query, k.shape[1] // block_k)))
    return dq[:, :T], dk[:, :S], dv[:, :S]


# ---- forward -------------------------------------------------------------------------------------------------------


def _forward_kernel(
    spec, block_k,
    q_ref, k_ref, v_ref, first_ref, last_ref, ranges_ref, out_ref, lse_ref,
    q_smem, k_smem, v_smem, lse_smem, first_smem, last_smem, q_ready, k_ready, v_ready, k_free, v_free, turn,
):  # fmt: skip
    n, i, b, warpgroup = _place(backwards=True)
    row = (i * CONSUMERS + warpgroup) * ROWS
    walk = read_walk(ranges_ref.at[b, i])

    def take_turns():
        """Lets one warpgroup's softmax run at the same time as the other's products (FlashAttention-3's ping-pong)."""
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < CONSUMERS)
    def _compute():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        free_all(k_free, v_free)
        query = q_smem.at[warpgroup]
        plgpu.barrier_wait(q_ready)
        first, last = load(first_smem.at[warpgroup]), load(last_smem.at[warpgroup])
        pl.when(warpgroup == 1)(take_turns)

        def step(masked, at, carry):
            acc, highest, total = carry
            slot = opaque(lax.rem(at, k_smem.shape[0]))
            plgpu.barrier_wait(k_ready.at[slot])
            scores = product(query, k_smem.at[slot], take_turns)
            plgpu.barrier_arrive(k_free.at[slot])
            scores = tile.scores(spec, scores)
            if masked:
                s = iota(scores.shape, 1) + walk.block(at) * block_k
                scores = jnp.where(tile.seen(down(first, s), down(last, s), s), scores, -jnp.inf)
            weights, fade, highest = tile.softmax_step(spec, scores, highest, down)
            total = total * fade + weights.sum(1)
            acc = acc * down(fade, acc)
            weights = weights.astype(v_smem.dtype)
            # Without the barrier, the compiler would move this work after the turn, next to its use.
            acc, total, highest, weights = lax.optimization_barrier((acc, total, highest, weights))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)
            (acc,) = accumulate(spec, (acc, weights, v_smem.at[slot]))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, highest, total

        start = full((ROWS, q_smem.shape[-1]), 0.0), full(ROWS, tile.LOWEST), full(ROWS, 0.0)
        acc, highest, total = walk.fold(step, start)
        pl.when(warpgroup == 0)(take_turns)
        some = total > 0
        query[...] = (acc * down(jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0), acc)).astype(q_smem.dtype)
        lse_smem.at[warpgroup][...] = tile.log_sum_exp(highest, total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query, out_ref.at[b, pl.ds(row, ROWS), n])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[b, n, pl.ds(row, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _copy():
        bounds = (first_ref, first_smem), (last_ref, last_smem)
        keys, values = (k_ref, k_smem, k_free, k_ready), (v_ref, v_smem, v_free, v_ready)
        serve_queries(n, i, b, walk, block_k, q_ready, [(q_ref, q_smem)], [], bounds, keys, values)


# ---- backward ------------------------------------------------------------------------------------------------------


def _dq_kernel(
    spec, block_k,
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, first_ref, last_ref, ranges_ref, dq_ref,
    q_smem, dout_smem, k_smem, v_smem, lse_smem, delta_smem, first_smem, last_smem,
    q_ready, k_ready, v_ready, k_free, v_free,
):  # fmt: skip
    n, i, b, warpgroup = _place(backwards=True)
    row = (i * CONSUMERS + warpgroup) * ROWS
    walk = read_walk(ranges_ref.at[b, i])

    @pl.when(warpgroup < CONSUMERS)
    def _compute():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        free_all(k_free, v_free)
        plgpu.barrier_wait(q_ready)
        first, last = load(first_smem.at[warpgroup]), load(last_smem.at[warpgroup])
        lse, delta = load(lse_smem.at[warpgroup]), load(delta_smem.at[warpgroup])

        def step(masked, at, carry):
            slot = opaque(lax.rem(at, k_smem.shape[0]))
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.barrier_wait(v_ready.at[slot])

            def dscores(scores, dweights):
                scores = tile.scores(spec, scores())
                weights = tile.weights(spec, scores, down(lse, scores))
                if masked:
                    s = iota(scores.shape, 1) + walk.block(at) * block_k
                    weights = jnp.where(tile.seen(down(first, s), down(last, s), s), weights, 0.0)
                slopes = tile.slopes(spec, scores, weights)
                return (slopes * (dweights() - down(delta, slopes))).astype(k_smem.dtype)

            own = opaque(warpgroup)
            ds = two_products(
                (q_smem.at[own], k_smem.at[slot]), (dout_smem.at[own], v_smem.at[slot]), dscores, overlap=True
            )
            plgpu.barrier_arrive(v_free.at[slot])
            (dq,) = accumulate(spec, (*carry, ds, k_smem.at[slot]))
            plgpu.barrier_arrive(k_free.at[slot])
            return (dq,)

        (dq,) = walk.fold(step, (full((ROWS, q_smem.shape[-1]), 0.0),))
        q_smem.at[warpgroup][...] = (dq * spec.scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], dq_ref.at[b, pl.ds(row, ROWS), n])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _copy():
        tiles, numbers = ((q_ref, q_smem), (dout_ref, dout_smem)), ((lse_ref, lse_smem), (delta_ref, delta_smem))
        bounds = (first_ref, first_smem), (last_ref, last_smem)
        keys, values = (k_ref, k_smem, k_free, k_ready), (v_ref, v_smem, v_free, v_ready)
        serve_queries(n, i, b, walk, block_k, q_ready, tiles, numbers, bounds, values, keys)


def _dkv_kernel(
    spec, block_q,
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, first_ref, last_ref, ranges_ref, dk_ref, dv_ref,
    k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, first_smem, last_smem,
    kv_ready, q_ready, dout_ready, free, done,
):  # fmt: skip
    kv, j, b, warpgroup = _place(backwards=False)
    G = q_ref.shape[2] // k_ref.shape[2]
    walk = read_walk(ranges_ref.at[b, j], repeat=G)
    stages, parts, _, columns = q_smem.shape
    groups = CONSUMERS // parts  # groups of 64 keys
    registers = REGISTERS if parts == 1 else (232, 40)  # a thread that copies two parts needs more
    # With two parts both warpgroups have the keys of group 0; otherwise each has its own keys and all columns.
    group, part = (warpgroup, 0) if parts == 1 else (0, warpgroup)

    def keys(ref, group, part):
        """The part of a [B, S, K, H] array that belongs in [group, part] of shared memory."""
        return ref.at[b, pl.ds((j * groups + group) * ROWS, ROWS), kv, pl.ds(part * columns, columns)]

    @pl.when(warpgroup < CONSUMERS)
    def _compute():
        plgpu.set_max_registers(registers[0], action="increase")
        free_all(free)
        plgpu.barrier_wait(kv_ready)

        def step(masked, at, carry):
            dk, dv = carry
            slot = opaque(lax.rem(at, stages))
            plgpu.barrier_wait(q_ready.at[slot])
            plgpu.barrier_wait(dout_ready.at[slot])

            def weights_and_dscores(scores, dweights):
                scores = tile.scores(spec, scores())
                weights = tile.weights(spec, scores, across(load(lse_smem.at[slot], BY_COLUMN), scores))
                slopes = tile.slopes(spec, scores, weights)
                # The barrier is needed because the scores and all later arrays would not fit the registers together.
                weights, slopes = lax.optimization_barrier((weights.astype(q_smem.dtype), slopes))
                if masked:
                    s = iota(slopes.shape, 0) + (j * groups + group) * ROWS
                    first, last = load(first_smem.at[slot], BY_COLUMN), load(last_smem.at[slot], BY_COLUMN)
                    seen = tile.seen(across(first, s), across(last, s), s)
                    weights, slopes = jnp.where(seen, weights, 0), jnp.where(seen, slopes, 0.0)
                dweights = dweights()
                delta = across(load(delta_smem.at[slot], BY_COLUMN), slopes)
                return weights, (slopes * (dweights - delta)).astype(q_smem.dtype)

            own = opaque(group)
            weights, ds = two_products(
                (k_smem.at[own], q_smem.at[slot]),
                (v_smem.at[own], dout_smem.at[slot]),
                weights_and_dscores,
                overlap=spec.soft_cap is None,  # with a soft cap, both products do not fit the registers
            )
            dv, dk = accumulate(spec, (dv, weights, dout_smem.at[slot, part]), (dk, ds, q_smem.at[slot, part]))
            plgpu.barrier_arrive(free.at[slot])
            return dk, dv

        zeros = full((ROWS, columns), 0.0)
        dk, dv = walk.fold(step, (zeros, zeros))
        # The other warpgroup may still read the data that the results will replace.
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        for x, smem, ref in ((dk * spec.scale, k_smem, dk_ref), (dv, v_smem, dv_ref)):
            smem.at[group, part][...] = x.astype(smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem.at[group, part], keys(ref, group, part))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _copy():
        rings: Any = (
            ((q_ref, q_smem), [(lse_ref, lse_smem)], [(first_ref, first_smem), (last_ref, last_smem)], q_ready),
            ((dout_ref, dout_smem), [(delta_ref, delta_smem)], [], dout_ready),
        )
        serve_keys(kv, b, walk, block_q, registers[1], keys, [(k_ref, k_smem), (v_ref, v_smem)], kv_ready, free, *rings)


# ---- launching -----------------------------------------------------------------------------------------------------


def _launch(
    name: str, kernel: Callable, *, out_type: Any, scratch_types: list, grid: tuple[int, int, int], interpret: Any
) -> Any:
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=grid,
        grid_names=("head", "block", "row"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=f"attention_{name}",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,  # type: ignore[attr-defined]
    )


def _place(backwards: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns (head, block, row of the batch, warpgroup) of this thread. Thread blocks start in order, and those with
    most work should start first. In long documents, these are the last queries and the first keys.
    """
    block = lax.axis_index("block")
    if backwards:
        block = lax.axis_size("block") - 1 - block
    return lax.axis_index("head"), block, lax.axis_index("row"), lax.axis_index("warpgroup")


def _tiled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory for operands of wgmma: rows of 64 16-bit elements, swizzled over 128 bytes."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _tile(kernel: str, q: jax.Array, k: jax.Array) -> Tile:
    return blocks("hopper", kernel, q.shape[3], q.shape[1], q.shape[2] // k.shape[2])


def _pad(x: jax.Array, block: int) -> jax.Array:
    """Pads [B, T, N, H] with zeros to a multiple of `block` positions."""
    missing = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else x
