"""One step of attention over a KV cache. It is limited by memory, so the work is the bytes of the live slots, each read
once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ar_unified.kernels.decode_attention import decode_attention, quantize
from experiments.benchmarks.gpu.measure import Check, Row
from experiments.benchmarks.gpu.sizes import Size


def checks(size: Size) -> list[Check]:
    """Bytes per second of one step over a bfloat16 and an int8 cache, of our kernel and of the others."""
    contenders: dict[str, Callable] = {"ours": _by(size.backend), "xla": _by("xla")}
    found: list[Check] = []
    for narrow, more in ((False, {"cudnn": jax.jit(_cudnn)}), (True, {})):
        name, work = named(size, narrow)
        row = Row(work, "GB/s", functools.partial(arrays, size, narrow), contenders | more)
        found.append((name, functools.partial(row.measure, size.repeats)))
    return found


def named(size: Size, int8: bool) -> tuple[str, float]:
    """A description of the case, and the bytes of its live slots."""
    B, N, K, S, live = size.decode
    name = f"decode B={B} live={live} of {S} N={N} K={K} {'int8' if int8 else 'bfloat16'}"
    return name, 2 * B * K * live * (size.head_dim + 4.0 if int8 else 2.0 * size.head_dim)


def arrays(size: Size, int8: bool) -> tuple:
    """Random q, k, v, lengths, k_scale and v_scale. The scales are None if the cache is not int8."""
    B, N, K, S, live = size.decode
    H = size.head_dim
    keys, shapes = jax.random.split(jax.random.key(0), 3), ((B, N, H), (B, K, S, H), (B, K, S, H))
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    (k, *k_scale), (v, *v_scale) = (quantize(k), quantize(v)) if int8 else ((k,), (v,))
    scales = (x[0][:, :, None] if x else None for x in (k_scale, v_scale))
    return q, k, v, jnp.full(B, live, jnp.int32), *scales


def _by(backend: str) -> Callable:
    def run(q, k, v, lengths, k_scale, v_scale):
        return decode_attention(q, k, v, lengths=lengths, k_scale=k_scale, v_scale=v_scale, backend=backend)

    return jax.jit(run)


def _cudnn(q, k, v, lengths, k_scale, v_scale):
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    ends = dict(query_seq_lengths=jnp.ones_like(lengths), key_value_seq_lengths=lengths)
    return jax.nn.dot_product_attention(q[:, None], k, v, implementation="cudnn", **ends)
