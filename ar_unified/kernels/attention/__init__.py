"""Fused causal attention over packed documents: one public function, one meaning, a kernel for each kind of device.

reference.py  what it computes, in a few lines
bounds.py     finds the mask and the blocks that every kernel must read, from `doc_start`
xla.py        XLA, in chunks: any platform and shape
tpu.py        Pallas for TPU, over the list of blocks that visits.py makes, with tpu_steps.py, tpu_scores.py and
              tpu_backward.py
hopper.py     Pallas for Hopper GPUs, built from warpgroup.py, copies.py and tile.py (the arithmetic)
blocks.py     block sizes by device and shape, each with its origin
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ar_unified.kernels import backend as backends
from ar_unified.kernels.attention import reference
from ar_unified.kernels.attention.bounds import make_bounds
from ar_unified.kernels.attention.spec import Spec

# Names of the arrays that backward needs from forward, for policies of `jax.checkpoint`. If all are saved, forward does
# not run again. WORK names the arrays that kernels make from the bounds of documents.
OUT, LSE, WORK = "attention_out", "attention_lse", "attention_work"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    doc_start: jax.Array,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    q_offset: jax.Array | int = 0,
    kv_offset: jax.Array | int = 0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention of each query to the keys of its own document up to itself.

    The query at position p = q_offset + t sees the keys at positions max(doc_start[t], p - window + 1) .. p. A query
    that sees no key (padding has doc_start = T, the length of the whole row) gets exact zeros, forward and backward,
    and a log-sum-exp of -inf. The result is differentiable in q, k and v, also through the log-sum-exp.

    Args:
      q: [B, T, N, H], rotated, not scaled.
      k, v: [B, S, K, H]; K divides N, and query head n reads KV head n // (N / K).
      doc_start: int32 [B, T], position of the first key of each query's document. It should not decrease along a row,
        except at padding; otherwise the result is still right, but less work is skipped.
      scale: factor of the scores; None: H ** -0.5.
      window: the largest number of keys that a query sees, including its own; None: its whole document.
      soft_cap: c; each score becomes c * tanh(score / c) (Gemma 2, arXiv 2408.00118). None: plain scores.
      q_offset, kv_offset: positions of the first query and key in their row, int or int32 [] or [B]. They are for a
        part of a row under context parallelism, and for queries that continue a cache.
      return_lse: also return the log of the sum of exponentiated scores, float32 [B, T, N].
      backend: one of kernels.backend.BACKENDS; "auto": the kernel of the current device, and xla on CPUs.

    Returns:
      [B, T, N, H] in the dtype of v; with return_lse, also the log-sum-exp. Scores and softmax are float32.
    """
    backend, spec, work = _prepare(
        q, k, v, doc_start, scale, window, soft_cap, q_offset=q_offset, kv_offset=kv_offset, backend=backend
    )
    if backend == "reference":  # JAX differentiates it
        out, lse = reference.forward(spec, q, k, v, work)
    else:
        out, lse = _attention(backend, spec, q, k, v, work)
    return (out, jnp.swapaxes(lse, 1, 2)) if return_lse else out


def attention_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    *,
    doc_start: jax.Array,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    q_offset: jax.Array | int = 0,
    kv_offset: jax.Array | int = 0,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of attention to one part of the keys. The output was merged (kernels/merge.py) from several such parts.

    The gradient of q is this part's share, and must be summed over all parts. The gradients of k and v are complete.

    Args:
      q, k, v, doc_start and the arguments after it: as in the call of `attention` for this part.
      lse: float32 [B, T, N], over all keys.
      delta: float32 [B, T, N], sum(dout * out) over H with the merged output, minus the gradient of `lse`.
      dout: [B, T, N, H], the gradient of the merged output.
    """
    backend, spec, work = _prepare(
        q, k, v, doc_start, scale, window, soft_cap, q_offset=q_offset, kv_offset=kv_offset, backend=backend
    )
    lse, delta = jnp.swapaxes(lse, 1, 2), jnp.swapaxes(delta, 1, 2)
    return backends.module(__name__, backend).backward(spec, q, k, v, work, lse, delta, dout)


def recomputed(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct, backend: str = "auto") -> int:
    """The number of matrix products in backward besides its four gradients. Backward computes the scores again. If it
    has two kernels, each computes the scores and the gradient of the weights.

    Args:
      q, k: the shapes and the dtype of `attention`'s arguments on one device.
      backend: as for `attention`.
    """
    backend = backends.choose(__name__, backend, q, k)
    return 0 if backend == "reference" else backends.module(__name__, backend).recomputed(q, k)


def _prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    doc_start: jax.Array,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    *,
    q_offset: jax.Array | int,
    kv_offset: jax.Array | int,
    backend: str,
) -> tuple[str, Spec, Any]:
    _check(q, k, v, doc_start, window)
    bounds = make_bounds(doc_start, k.shape[1], window=window, q_offset=q_offset, kv_offset=kv_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = backends.choose(__name__, backend, q, k)
    shift = q_offset - kv_offset if isinstance(q_offset, int) and isinstance(kv_offset, int) else None
    spec = Spec(scale, soft_cap, shift, interpret=backend.endswith("_interpret"))
    work = backends.module(__name__, backend).prepare(spec, q, k, bounds)
    return backend, spec, jax.tree.map(lambda x: checkpoint_name(x, WORK), work)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    backend: str, spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, work: Any
) -> tuple[jax.Array, jax.Array]:
    return backends.module(__name__, backend).forward(spec, q, k, v, work)


def _forward(backend, spec, q, k, v, work):
    out, lse = backends.module(__name__, backend).forward(spec, q, k, v, work)
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return (out, lse), (q, k, v, work, out, lse)


def _backward(backend, spec, residuals, cotangents):
    q, k, v, work, out, lse = residuals
    dout, dlse = cotangents
    delta = jnp.einsum("BTNH,BTNH->BNT", out.astype(jnp.float32), dout.astype(jnp.float32)) - dlse
    return *backends.module(__name__, backend).backward(spec, q, k, v, work, lse, delta, dout), None


_attention.defvjp(_forward, _backward)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, doc_start: jax.Array, window: int | None) -> None:
    B, T, N, H = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != H or N % k.shape[2]:
        raise ValueError(
            f"attention: expected q [B, T, N, H], k and v [B, S, K, H] with K dividing N; "
            f"found q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if doc_start.shape != (B, T) or doc_start.dtype != jnp.int32:
        raise ValueError(f"attention: expected doc_start int32 {(B, T)}; found {doc_start.dtype} {doc_start.shape}")
    if window is not None and window < 1:
        raise ValueError(f"attention: expected a window of at least 1 key; found {window}")
