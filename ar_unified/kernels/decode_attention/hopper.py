"""Decode attention on Hopper GPUs (sm_90a), in Pallas Mosaic GPU, with enough thread blocks to keep HBM busy.

A thread block computes one KV head of one row, over a share of the row's live slots. Rows are split into equal parts
until there are enough thread blocks for every SM. The parts are merged by their log-sum-exps. A thread block goes
through its share in blocks that TMA copies into a ring of shared memory. After a block is used, the copy of another
block begins. While one thread block computes, others on the SM wait for memory.

The G query heads are rows of one wgmma, padded to its 64 rows. The padding costs no time: an SM of an H100 gets 15
bytes per clock from HBM, which are 7.5 bfloat16 numbers. With 64 multiply-adds for each number, the SM uses a quarter
of the 2048 multiply-adds that its tensor cores can do per clock (a third on an H200). CUDA cores, with 128 lanes, would
have to widen each number and then use it G times. At G = 8 this would take half of their throughput, and with int8 all
of it, even without the softmax.

An int8 block is copied as int8. Then it is widened once, from one part of shared memory to another.

B batch, S cache slot, N query heads, K KV heads, G = N / K, H head dim, P parts of a row.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ar_unified.kernels.decode_attention.spec import Cache, Spec
from ar_unified.kernels.merge import merge

HEAD_DIMS = (64, 128, 256)
ROWS = 64  # rows of a wgmma
BLOCK = 64  # slots per block
RING_BYTES = 64 * 1024  # the ring of keys and values of a thread block; an SM has room for more than two rings
THREAD_BLOCKS = 4 * 132  # wanted: each of the 132 SMs of an H100 or H200 gets two thread blocks at once, then two more
SHORTEST_PART = 4 * BLOCK  # the smallest number of slots that is worth a thread block
_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # the maximum before any score; finite, because -inf - -inf is NaN
_WGMMA, _BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Returns the reason why this module cannot compute these arguments, or None if it can."""
    if q.dtype != jnp.bfloat16 or k.dtype not in (jnp.bfloat16, jnp.int8):
        return f"expected q in bfloat16 and a cache in bfloat16 or int8; found {q.dtype} and {k.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"expected a head dim of {', '.join(map(str, HEAD_DIMS))}; found {q.shape[-1]}"
    if q.shape[1] > ROWS * k.shape[1]:
        return f"expected at most {ROWS} query heads per KV head; found {q.shape[1]} for {k.shape[1]} KV heads"
    if k.shape[2] % 8:
        return f"expected a number of slots that is a multiple of 8, which TMA needs; found {k.shape[2]}"
    return None


def forward(spec: Spec, q: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, N, H] in the dtype of q, and log-sum-exp float32 [B, N]."""
    B, N, H = q.shape
    K, S = cache.k.shape[1:3]
    G = N // K
    parts = min(pl.cdiv(THREAD_BLOCKS, B * K), pl.cdiv(S, SHORTEST_PART))
    stages = max(2, RING_BYTES // (2 * BLOCK * H * cache.k.dtype.itemsize))
    query = jnp.pad(q.reshape(B, K, G, H), [(0, 0), (0, 0), (0, -G % 8), (0, 0)])  # whole tiles of 8 rows
    quantized = cache.scales is not None
    # TMA copies whole blocks only if strides are multiples of 16 bytes; the cache itself is never padded.
    scales = [jnp.pad(x[:, :, 0], [(0, 0), (0, 0), (0, -S % BLOCK)]) for x in cache.scales or ()]
    out, lse = plgpu.kernel(
        functools.partial(_kernel, spec, quantized),
        out_type=[
            jax.ShapeDtypeStruct((parts, *query.shape), q.dtype),
            jax.ShapeDtypeStruct((parts, B, K, ROWS), jnp.float32),
        ],
        scratch_types=[
            _tiled((ROWS, H), q.dtype),
            *[_tiled((stages, BLOCK, H), cache.k.dtype)] * 2,
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            *[plgpu.Barrier(num_arrivals=1 + quantized, num_barriers=stages)] * 2,
            *([_tiled((BLOCK, H), q.dtype), *[plgpu.SMEM((stages, BLOCK), jnp.float32)] * 2] if quantized else []),
        ],
        grid=(parts, K, B),
        grid_names=("part", "head", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="decode_attention",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if spec.interpret else None,  # type: ignore[attr-defined]
    )(cache.begin, cache.end, query, cache.k, cache.v, *scales)
    out, lse = merge(out[..., :G, :], lse[..., :G]) if parts > 1 else (out[0, ..., :G, :], lse[0, ..., :G])
    return out.reshape(B, N, H), lse.reshape(B, N)


def _kernel(spec, quantized, begin_ref, end_ref, q_ref, k_ref, v_ref, *refs):
    *scale_refs, out_ref, lse_ref = refs[: 2 + 2 * quantized]
    q_smem, k_smem, v_smem, lse_smem, q_ready, k_ready, v_ready, *more_smem = refs[2 + 2 * quantized :]
    none: Any = (None,) * 3
    k_scale_ref, v_scale_ref = scale_refs or none[:2]
    wide_smem, k_scale_smem, v_scale_smem = more_smem or none
    stages, H = k_smem.shape[0], k_smem.shape[2]
    part, head, row = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("row")
    first, behind = begin_ref[row], end_ref[row]
    row_begin, row_end = first // BLOCK, pl.cdiv(behind, BLOCK)
    share = pl.cdiv(row_end - row_begin, lax.axis_size("part"))
    begin = row_begin + part * share
    count = jnp.clip(row_end - begin, 0, share)  # number of blocks; 0 if the row has fewer blocks than parts

    def fetcher(ref, scale_ref, smem, scale_smem, ready):
        def fetch(i):
            """Starts the copy of block i of the share, if there is one."""
            slot, slots = lax.rem(i, stages), pl.ds((begin + i) * BLOCK, BLOCK)

            @pl.when(i < count)
            def _():
                plgpu.copy_gmem_to_smem(ref.at[row, head, slots], smem.at[slot], ready.at[slot])
                if quantized:
                    plgpu.copy_gmem_to_smem(scale_ref.at[row, head, slots], scale_smem.at[slot], ready.at[slot])

        return fetch

    fetch_k = fetcher(k_ref, k_scale_ref, k_smem, k_scale_smem, k_ready)
    fetch_v = fetcher(v_ref, v_scale_ref, v_smem, v_scale_smem, v_ready)

    # The rows of q_smem after the G heads need no value, because each row of a product depends only on its own row.
    plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[pl.ds(0, q_ref.shape[2])], q_ready)
    for i in range(stages):
        fetch_k(jnp.int32(i))
        fetch_v(jnp.int32(i))
    plgpu.barrier_wait(q_ready)
    factor = (spec.scale if spec.soft_cap is None else spec.soft_cap) * _LOG2_E  # a GPU computes powers of 2

    def step(i, carry):
        acc, highest, total = carry
        slot = lax.rem(i, stages)
        plgpu.barrier_wait(k_ready.at[slot])
        k_scale = plgpu.layout_cast(k_scale_smem[slot], _BY_COLUMN) if quantized else None
        scores = _product(q_smem, plgpu.transpose_ref(_operand(k_smem.at[slot], wide_smem), (1, 0)))
        if k_scale is not None:
            scores *= lax.broadcast_in_dim(k_scale, scores.shape, [1])
        fetch_k(i + stages)
        if spec.soft_cap is not None:
            scores = jnp.tanh(scores * (spec.scale / spec.soft_cap))
        s = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_WGMMA) + (begin + i) * BLOCK
        scores = jnp.where((first <= s) & (s < behind), scores * factor, -jnp.inf)
        new = jnp.maximum(highest, scores.max(1))
        weights, shrink = jnp.exp2(scores - _down(new, scores)), jnp.exp2(highest - new)
        total = total * shrink + weights.sum(1)
        acc = acc * _down(shrink, acc)
        plgpu.barrier_wait(v_ready.at[slot])
        if quantized:
            v_scale = plgpu.layout_cast(v_scale_smem[slot], _BY_COLUMN)
            weights *= lax.broadcast_in_dim(v_scale, weights.shape, [1])
        acc = _accumulate(spec, acc, weights.astype(q_smem.dtype), _operand(v_smem.at[slot], wide_smem))
        fetch_v(i + stages)
        return acc, new, total

    start = _full((ROWS, H), 0.0, _WGMMA), _full((ROWS,), _LOWEST, _BY_ROW), _full((ROWS,), 0.0, _BY_ROW)
    acc, highest, total = lax.fori_loop(0, count, step, start)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    q_smem[...] = (acc / _down(total, acc)).astype(q_smem.dtype)
    lse_smem[...] = jnp.where(some, highest * (1 / _LOG2_E) + jnp.log(total), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(0, q_ref.shape[2])], out_ref.at[part, row, head])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[part, row, head])
    plgpu.wait_smem_to_gmem(0)


def _operand(smem, wide_smem):
    """The block in shared memory, in the form that wgmma takes. wide_smem: memory for a widened int8 block; None for
    other blocks."""
    if wide_smem is None:
        return smem
    H = smem.shape[1]
    for column in range(0, H, 128):  # a block of H = 256 at once would spill registers
        columns = pl.ds(column, min(H, 128))
        piece = plgpu.layout_cast(smem[:, columns], plgpu.Layout.WGMMA_UPCAST_2X)
        wide_smem[:, columns] = plgpu.layout_cast(piece.astype(wide_smem.dtype), _WGMMA)
    plgpu.commit_smem()
    return wide_smem


def _product(a, b) -> jax.Array:
    """a @ b, with a and b in shared memory."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _accumulate(spec: Spec, acc: jax.Array, a: jax.Array, b) -> jax.Array:
    """acc + a @ b, with a in registers and b in shared memory."""
    if spec.interpret:  # JAX's GPU emulation lacks run_state and left operands in registers
        b = b[...]
        plgpu.commit_smem()  # wgmma uses the async proxy; this ordinary read needs the fence
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)

    def run(ref):
        plgpu.wgmma(ref, a, b)

    return pl.run_state(run)(plgpu.ACC.init(acc))


def _full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _down(x: jax.Array, tile: jax.Array) -> jax.Array:
    """Broadcasts a value for each row of a tile to the tile's shape."""
    return lax.broadcast_in_dim(x, tile.shape, [0])


def _tiled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory for an operand of wgmma, with rows of at most 128 bytes, swizzled over their length."""
    width = min(128, shape[-1] * jnp.dtype(dtype).itemsize)
    transforms = plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(width)
    return plgpu.SMEM(shape, dtype, transforms=transforms)
