"""Calls the attention kernels for the transformer: each device of the mesh runs them on its part.

The compiler (GSPMD) cannot split a Pallas kernel, so the split is written here: rows over the batch axes, heads over
tensor, and the sequence over context (model/context.py). Without a mesh in scope (`jax.set_mesh`) the kernels are
called directly.

B batch, T query position, S key position, N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ar_unified.kernels.attention import attention, recomputed
from ar_unified.kernels.decode_attention import decode_attention
from ar_unified.model import context as contexts
from ar_unified.model.cache import AXES, Layer
from ar_unified.model.config import TransformerConfig
from ar_unified.parallel.rules import spec

FEW = 8  # most new positions per row for which the decoding kernel is used; more are treated as a prompt


def attend_to_documents(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    doc_start: jax.Array,
    backend: str = "auto",
    context: str = "gather",
) -> jax.Array:
    """Attention in packed rows, [B, T, N, H]. Each position sees the positions of its own document up to itself.

    Args:
      query: [B, T, N, H], rotated.
      key, value: [B, T, K, H].
      doc_start: int32 [B, T], where the document of each position begins; T on padding. If the mesh splits sequences,
        all arrays are in the order of parallel/zigzag.py, but each value of doc_start is a position in the row's
        original order.
      backend: one of kernels.backend.BACKENDS.
      context: how a device gets the keys of other devices, "gather" or "ring".
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attention(query, key, value, doc_start=doc_start, backend=backend)
    key, value = (_repeated(x, 2, query.shape[2], mesh.shape["tensor"]) for x in (key, value))
    heads = spec(mesh, ("batch", "sequence", "heads", "head_dim"), query.shape, "attention")
    rows = spec(mesh, ("batch", "sequence"), doc_start.shape, "doc_start")

    def part(query, key, value, doc_start):
        if mesh.shape["context"] > 1:
            way = contexts.gather if context == "gather" else contexts.ring
            return way(backend, query, key, value, doc_start)
        return attention(query, key, value, doc_start=doc_start, backend=backend)

    # check_vma=False, because JAX cannot know whether a kernel's output is the same on several devices.
    return jax.shard_map(part, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(
        query, key, value, doc_start
    )


def recomputed_products(config: TransformerConfig, mesh: Mesh, length: int) -> int:
    """The number of matrix products that the backward pass of `attend_to_documents` computes again. It is for one
    device of this mesh and for rows of `length` tokens; see `kernels.attention.recomputed`."""
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    queries = length // (2 * context) if context > 1 else length
    keys = queries if config.context == "ring" else length
    kv_heads = config.n_kv_heads * (tensor // math.gcd(config.n_kv_heads, tensor))
    q, k = (
        jax.ShapeDtypeStruct((1, positions, heads // tensor, config.head_dim), config.dtype)
        for positions, heads in ((queries, config.n_heads), (keys, kv_heads))
    )
    with jax.set_mesh(mesh):
        return recomputed(q, k, config.attention)


def attend_to_cache(query: jax.Array, cache: Layer, start: jax.Array, backend: str = "auto") -> jax.Array:
    """Attention over a cache in which slot s holds the key of position s: [B, T, N, H].

    Args:
      query: [B, T, N, H], rotated, at the positions start[b] .. start[b] + T - 1. Each query sees the slots
        up to its own.
      cache: as in model/cache.py; it already has the keys and values of the queries' positions.
      start: int32 [B].
      backend: one of kernels.backend.BACKENDS.
    """

    def part(query, start, keys, values, *scales):
        T = query.shape[1]
        if T <= FEW:
            named = dict(zip(("k_scale", "v_scale"), scales, strict=False))
            few = query[:, 0] if T == 1 else query
            return decode_attention(few, keys, values, lengths=start + T, backend=backend, **named).reshape(query.shape)
        if scales:
            keys, values = (x * jnp.swapaxes(scale, 2, 3) for x, scale in zip((keys, values), scales, strict=True))
        key, value = (jnp.swapaxes(x.astype(query.dtype), 1, 2) for x in (keys, values))
        doc_start = jnp.zeros(query.shape[:2], jnp.int32)
        return attention(query, key, value, doc_start=doc_start, q_offset=start, backend=backend)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return part(query, start, *cache)
    cache = tuple(_repeated(x, 1, query.shape[2], mesh.shape["tensor"]) for x in cache)
    heads = spec(mesh, ("batch", None, "heads", "head_dim"), query.shape, "attention")
    rows = spec(mesh, ("batch",), start.shape, "start")
    specs = [spec(mesh, AXES, x.shape, "cache") for x in cache]
    return jax.shard_map(part, in_specs=(heads, rows, *specs), out_specs=heads, check_vma=False)(query, start, *cache)


def _repeated(x: jax.Array, axis: int, query_heads: int, ways: int) -> jax.Array:
    """Repeats the KV heads of x along `axis`, if needed, so that each of `ways` devices has a whole head."""
    times = ways // math.gcd(x.shape[axis], ways)
    if query_heads % (x.shape[axis] * times):
        raise ValueError(
            f"attention: {query_heads} query heads over {x.shape[axis]} KV heads cannot be split over tensor={ways} "
            "devices: choose a size of the tensor axis that divides the number of query heads"
        )
    return jnp.repeat(x, times, axis=axis) if times > 1 else x
