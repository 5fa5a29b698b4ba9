"""Cases for compiling the decode kernels on a machine without their device, with each part of them at least once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ar_unified.kernels.decode_attention import decode_attention

# B, S, N, K, H, dtype, int8, options.
TPU = {
    "grouped by 4": (32, 4096, 32, 8, 128, jnp.bfloat16, False, {}),
    "int8": (16, 2048, 16, 2, 128, jnp.bfloat16, True, {}),
    "multi-head, float32, ragged end": (2, 1100, 4, 4, 64, jnp.float32, False, {}),
    "multi-query, window and soft cap": (1, 8192, 8, 1, 256, jnp.bfloat16, False, dict(window=1024, soft_cap=50.0)),
}
HOPPER = {
    "grouped by 4": (32, 4096, 32, 8, 128, jnp.bfloat16, False, {}),
    "multi-head, ragged end": (2, 1104, 4, 4, 64, jnp.bfloat16, False, {}),
    "multi-query, window and soft cap": (1, 8192, 8, 1, 256, jnp.bfloat16, False, dict(window=1024, soft_cap=50.0)),
    "int8": (16, 2048, 16, 2, 128, jnp.bfloat16, True, {}),
    "int8, head dim 64": (2, 1104, 16, 1, 64, jnp.bfloat16, True, {}),
    "int8, head dim 256": (1, 1104, 8, 1, 256, jnp.bfloat16, True, {}),
}


def decode_kernels(backend: str, sharding: Any = None) -> Iterator[tuple[str, Callable, dict[str, Any]]]:
    """(name, function, its arguments as shapes) of each, for `jax.jit(function).trace(**arguments)`."""
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    for name, (B, S, N, K, H, dtype, int8, options) in dict(tpu=TPU, hopper=HOPPER)[backend].items():
        arrays = dict(q=shape((B, N, H), dtype), lengths=shape((B,), jnp.int32))
        arrays |= {x: shape((B, K, S, H), jnp.int8 if int8 else dtype) for x in ("k", "v")}
        if int8:
            arrays |= {x: shape((B, K, 1, S), jnp.float32) for x in ("k_scale", "v_scale")}
        yield name, functools.partial(decode_attention, backend=backend, return_lse=True, **options), arrays
