"""Fused attention of one or a few queries per row over the row's KV cache: one public function, one kernel per device.

Reading the cache takes most of the time of decoding. So the kernels read only the live part of each row, once for all
query heads of a KV head. A cache in int8 with one scale per vector (`quantize`) is read as int8.

spec.py       the arguments of every implementation
reference.py  what it computes, in a few lines
xla.py        with XLA: any platform and shape; it reads the whole cache or a prefix
tpu.py        Pallas for TPU
hopper.py     Pallas for Hopper GPUs
int8.py       converts keys and values to int8
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ar_unified.kernels import backend as backends
from ar_unified.kernels.decode_attention.int8 import quantize as quantize
from ar_unified.kernels.decode_attention.spec import Cache, Spec


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention of one query per row over a cache that already has the query's own key and value.

    Row b's query is at position lengths[b] - 1 and sees the slots max(0, lengths[b] - window) <= s < lengths[b]. A row
    of length 0 gets exact zeros, and a log-sum-exp of -inf. The values of unseen slots do not matter but must be
    finite. If a row has several queries, all of this is true for the last one. The other queries are at the positions
    directly before it, in order. Queries beyond the cache get an unspecified finite value. XLA reads the cache once for
    all queries; the kernels read it once per query. This function cannot be differentiated; the attempt raises
    TypeError. `attention` with q_offset = lengths - 1 computes the same, and can be differentiated.

    Args:
      q: [B, N, H], or [B, T, N, H], rotated, not scaled.
      k, v: [B, K, S, H]; K divides N, and query head n reads KV head n // (N / K). Floating point, or int8 with scales.
      lengths: int32 [B], live slots of each row, 0 .. S; with T queries per row, live slots of the last query, 0 .. S +
          T - 1.
      k_scale, v_scale: float32 [B, K, 1, S], only for an int8 cache: the key and value of slot s are k[..., s, :] *
        k_scale[..., s] and v[..., s, :] * v_scale[..., s], as from `quantize`. TPUs read this shape without a copy.
      scale: factor of the scores; None: H ** -0.5.
      window: the largest number of slots that a query sees, including its own; None: all live slots.
      soft_cap: c; each score becomes c * tanh(score / c) (Gemma 2, arXiv 2408.00118). None: plain scores.
      return_lse: also return the log of the sum of exponentiated scores, float32 [B, N].
      backend: one of kernels.backend.BACKENDS; "auto": the kernel of the current device, and xla on CPUs.

    Returns:
      An array like q; with return_lse, also the log-sum-exp, without the axis H. Scores and softmax are float32.
    """
    _check(q, k, v, lengths, k_scale, v_scale, window)
    end = jnp.clip(lengths, 0, k.shape[2] + (q.shape[1] - 1 if q.ndim == 4 else 0))
    begin = jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0)
    one = q[:, -1] if q.ndim == 4 else q
    backend = backends.choose(__name__, backend, one, k)
    spec = Spec(q.shape[-1] ** -0.5 if scale is None else scale, soft_cap, interpret=backend.endswith("_interpret"))
    scales = None if k_scale is None or v_scale is None else (k_scale, v_scale)
    cache = Cache(k, v, scales, begin, end)
    if q.ndim == 3 or backend == "xla":
        out, lse = _decode_attention(backend, spec, q, cache)
    else:
        T = q.shape[1]
        each = [_decode_attention(backend, spec, q[:, t], cache.before(T - 1 - t)) for t in range(T)]
        out, lse = (jnp.stack(x, axis=1) for x in zip(*each, strict=True))
    return (out, lse) if return_lse else out


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _decode_attention(backend: str, spec: Spec, q: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array]:
    return backends.module(__name__, backend).forward(spec, q, cache)


@_decode_attention.defjvp
def _no_derivative(backend, spec, primals, tangents):
    raise TypeError("decode_attention has no derivative; use kernels.attention with q_offset = lengths - 1")


def _check(q, k, v, lengths, k_scale, v_scale, window) -> None:
    B, *_, N, H = q.shape
    cache = (B, k.shape[1], k.shape[2], H)
    if q.ndim not in (3, 4) or k.shape != cache or v.shape != cache or k.dtype != v.dtype or N % k.shape[1]:
        raise ValueError(
            "decode_attention: expected q [B, N, H] or [B, T, N, H], k and v [B, K, S, H] of one dtype, K dividing N; "
            f"found q {q.shape}, k {k.dtype} {k.shape}, v {v.dtype} {v.shape}"
        )
    if lengths.shape != (B,) or lengths.dtype != jnp.int32:
        raise ValueError(f"decode_attention: expected lengths int32 {(B,)}; found {lengths.dtype} {lengths.shape}")
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: expected a window of at least 1 slot; found {window}")
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (x is not None) != (k.dtype == jnp.int8):
            raise ValueError(
                "decode_attention: an int8 cache needs scales, and other caches must have none; found a cache in "
                f"{k.dtype} {'without' if x is None else 'with'} {name}"
            )
        shape = (B, k.shape[1], 1, k.shape[2])
        if x is not None and (x.shape != shape or x.dtype != jnp.float32):
            raise ValueError(f"decode_attention: expected {name} float32 {shape}; found {x.dtype} {x.shape}")
