"""Makes the KV cache and updates it in place; each device of the mesh has its own rows and heads.

B batch, T position, S cache slot, N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ar_unified.kernels import device
from ar_unified.kernels.cache_write import cache_write
from ar_unified.kernels.decode_attention import quantize
from ar_unified.model.config import TransformerConfig
from ar_unified.parallel.rules import spec

# Keys and values [B, K, S, H]; an int8 cache also has a scale for each vector, float32 [B, K, 1, S].
Layer = tuple[jax.Array, ...]
Cache = tuple[Layer, ...]  # one entry per layer
AXES = ("batch", "kv_heads", None, None)  # the logical axes of every array


def default_dtype(config: TransformerConfig) -> str:
    """The dtype of a cache if none is asked for: the compute dtype, but never bfloat16 on a CPU.

    XLA on a CPU (jaxlib 0.10) converts a bfloat16 cache to float32 in each step, to read it and to write into it. This
    took half the time of decoding 16 rows with a model of 25M parameters.
    """
    return "float32" if device.current().platform == "cpu" else config.dtype


def init_cache(config: TransformerConfig, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache of `length` positions for `batch` rows.

    dtype: None means `default_dtype`. "int8" needs half the bytes of bfloat16; each vector is rounded with its own
    scale (kernels/decode_attention).
    """
    shape = (batch, config.n_kv_heads, length, config.head_dim)
    dtype = jnp.dtype(dtype or default_dtype(config))
    scales = (jnp.zeros((*shape[:2], 1, length)),) * 2 if dtype == jnp.int8 else ()
    # Separate arrays, because a buffer that two of them share cannot be donated.
    return tuple(
        tuple(jnp.array(x) for x in (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales))
        for _ in range(config.n_layers)
    )


def extended(layer: Layer, start: jax.Array, key: jax.Array, value: jax.Array, backend: str = "auto") -> Layer:
    """Writes T positions into each row b of a layer's cache, from start[b] on, and returns the cache. Positions beyond
    the cache's end are not written.

    Args:
      key, value: [B, T, K, H].
      start: int32 [B].
      backend: one of kernels.backend.BACKENDS.
    """

    def part(start: jax.Array, key: jax.Array, value: jax.Array, *layer: jax.Array) -> Layer:
        new = _as_kept(layer, key, value)
        if key.shape[1] == 1:
            return cache_write(layer, tuple(x[:, 0] for x in new), start, backend=backend)
        rows = jnp.arange(len(start))[:, None]
        slots = start[:, None] + jnp.arange(key.shape[1], dtype=jnp.int32)
        return tuple(
            (old.at[rows, :, slots] if x.ndim == 4 else old.at[rows, :, 0, slots]).set(x, mode="drop")
            for old, x in zip(layer, new, strict=True)
        )

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return part(start, key, value, *layer)
    new = spec(mesh, ("batch", None, "kv_heads", None), key.shape, "key")
    specs = tuple(spec(mesh, AXES, x.shape, "cache") for x in layer)
    return jax.shard_map(
        part,
        in_specs=(spec(mesh, ("batch",), start.shape, "start"), new, new, *specs),
        out_specs=specs,
        check_vma=False,
    )(start, key, value, *layer)


def with_rows(layer: Layer, rows: jax.Array, key: jax.Array, value: jax.Array) -> Layer:
    """Copies key and value [M, K, S', H], S' <= S, to the first slots of `rows`, int32 [M], and returns the layer's
    cache.

    Row numbers beyond the last row are ignored.
    """
    length = key.shape[2]
    new = tuple(x if x.ndim == 4 else x[:, :, None] for x in _as_kept(layer, key, value))
    return tuple(
        (old.at[rows, :, :length] if i < 2 else old.at[rows, :, :, :length]).set(x, mode="drop")
        for i, (old, x) in enumerate(zip(layer, new, strict=True))
    )


def slots_of(layer: Layer, slots: slice) -> Layer:
    """Copies some slots of all rows."""
    return tuple(x[:, :, slots] if i < 2 else x[..., slots] for i, x in enumerate(layer))


def with_slots(layer: Layer, slots: slice, kept: Layer) -> Layer:
    """A layer's cache with the slots restored from the result of `slots_of`."""
    return tuple(
        (old.at[:, :, slots] if i < 2 else old.at[..., slots]).set(x)
        for i, (old, x) in enumerate(zip(layer, kept, strict=True))
    )


def _as_kept(layer: Layer, key: jax.Array, value: jax.Array) -> Layer:
    """Keys and values [..., H] in the cache's dtype, and for int8 their scales [...]."""
    if layer[0].dtype == jnp.int8:
        (key, key_scale), (value, value_scale) = quantize(key), quantize(value)
        return key, value, key_scale, value_scale
    return key.astype(layer[0].dtype), value.astype(layer[1].dtype)
