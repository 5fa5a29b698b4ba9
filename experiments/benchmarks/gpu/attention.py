"""Attention forward and backward in bfloat16: dense causal rows, and rows of eight documents.

FLOPs of the forward pass are 4 B N T S H / 2, for B rows of T tokens, N query heads, documents of S tokens, and heads
of H dimensions. The 2 is there because causal attention needs only half of the products. The backward pass has 2.5
times as many. cuDNN has no packed rows, so a dense row is timed instead. Stock Pallas
(jax.experimental.pallas.ops.gpu.attention: Triton, deprecated) has its default blocks, and as many KV heads as query
heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ar_unified.kernels.attention import attention
from experiments.benchmarks.gpu.measure import Check, Row
from experiments.benchmarks.gpu.sizes import Size


def checks(size: Size) -> list[Check]:
    """Times of forward and backward passes, dense and packed, of our kernel and of the others."""
    ours = functools.partial(_ours, size.backend)
    peers: dict[str, Callable] = {"ours": ours, "cudnn": _cudnn}
    found: list[Check] = []
    for T in size.lengths:
        for N, K in size.heads:
            more = {"stock_pallas": _stock_pallas} if N == K else {}
            found += _both(size, f"dense T={T} N={N} K={K}", T, N, K, size.head_dim, T, peers | more)
    T = size.lengths[1]
    for N, K, H in size.more_heads:
        found += _both(size, f"dense T={T} N={N} K={K} H={H}", T, N, K, H, T, peers)
    row = 8 * size.document
    for N, K in size.heads:
        found += _both(size, f"packed T={row} N={N} K={K}", row, N, K, size.head_dim, size.document, peers)
    # The shortest dense rows and the packed rows come first, because they say most.
    return sorted(found, key=lambda check: (f"dense T={size.lengths[0]} " not in check[0], "dense" in check[0]))


def _both(
    size: Size, name: str, T: int, N: int, K: int, H: int, document: int, contenders: dict[str, Callable]
) -> list[Check]:
    B = max(size.tokens // T, 1)
    flops = 0.5 * 4 * B * N * T * document * H
    found: list[Check] = []
    for what, wrap, factor in (("forward", _forward, 1.0), ("forward+backward", _forward_and_backward, 3.5)):
        row = Row(
            factor * flops,
            "TFLOP/s",
            functools.partial(_arrays, B, T, N, K, H, document),
            {who: jax.jit(wrap(function)) for who, function in contenders.items()},
        )
        found.append((f"{name} {what}", functools.partial(row.measure, size.repeats)))
    return found


def _ours(backend: str, q, k, v, doc_start):
    return attention(q, k, v, doc_start=doc_start, backend=backend)


def _cudnn(q, k, v, doc_start):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _stock_pallas(q, k, v, doc_start):
    from jax.experimental.pallas.ops.gpu.attention import mha

    return mha(q, k, v, segment_ids=None, sm_scale=q.shape[-1] ** -0.5, causal=True)


def _forward_and_backward(function: Callable) -> Callable:
    def run(q, k, v, doc_start, bar):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, doc_start), q, k, v)
        return out, *pull(bar)

    return run


def _forward(function: Callable) -> Callable:
    return lambda q, k, v, doc_start, bar: function(q, k, v, doc_start)


def _arrays(B: int, T: int, N: int, K: int, H: int, document: int) -> tuple:
    """q, k, v and doc_start of documents of one length, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, bar = (
        jax.random.normal(key, (B, T, n, H), jnp.bfloat16) for key, n in zip(keys, (N, K, K, N), strict=True)
    )
    doc_start = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // document * document, (B, T))
    return q, k, v, doc_start, bar
