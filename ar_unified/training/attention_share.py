"""Measures how much attention the positions of one modality give to the other modality, for each layer.

A model of text and images may learn to ignore one of them. For each layer, and for each pair (modality of the query,
modality of the key), the share is

    share(a -> b) = mean over queries q of modality a, and over heads, of  sum over keys k of modality b of  w(q, k)

where w(q, k) is the softmax of q . k / sqrt(H) over the keys that q sees (its own document up to itself,
without padding). Only queries that see keys of both modalities count. A share is a number in [0, 1]. For each a, the
shares sum to at most 1; control and size tokens get the rest. `uniform` is reported together with the layers. It is the
share that would result if the same queries gave equal weight to all keys that they see. It depends only on the data. If
a layer has a larger share than this, it attends to that modality more than by chance.

The training step does not store attention weights. The shares come from a separate forward pass over a held-out batch,
which computes the weights for one chunk of queries at a time.

B batch, T query position, S key position, N query heads, K KV heads, G = N / K, H head dim, L layers, M modality.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ar_tokenizers.trees import Metrics

from ar_unified.data.batch import PackedBatch
from ar_unified.language.vocabulary import Role, Vocabulary
from ar_unified.metrics import ATTENTION
from ar_unified.model.transformer import Transformer
from ar_unified.parallel.rules import spec

MODALITIES = (Role.TEXT, Role.IMAGE)
_WEIGHTS = 2**23  # attention weights per device at one time, 32 MiB: 64 queries of 32 heads over 4,096 keys


def attention_shares(model: Transformer, vocabulary: Vocabulary, batch: PackedBatch[jax.Array]) -> Metrics:
    """(sum, count) pairs of one batch, named "attention/text_to_image/layer_00", ...,
    "attention/text_to_image/uniform"."""
    role = jnp.where(batch.segment_ids > 0, vocabulary.role(batch.tokens), Role.PAD)
    modality = jnp.stack([role == each for each in MODALITIES], -1)  # [B, T, M]
    doc_start = batch.doc_start

    def look(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return layer_shares(query, key, doc_start, modality)

    sums, uniform, counts = model.observe(batch.tokens, batch.positions, doc_start, look)
    metrics: Metrics = {}
    width = len(str(len(sums) - 1))
    for a, asking in enumerate(MODALITIES):
        for b, asked in enumerate(MODALITIES):
            name = f"{ATTENTION}{asking.name.lower()}_to_{asked.name.lower()}"
            for layer in range(len(sums)):
                metrics[f"{name}/layer_{layer:0{width}}"] = (sums[layer, a, b], counts[layer, a])
            metrics[f"{name}/uniform"] = (uniform[0, a, b], counts[0, a])
    return metrics


def layer_shares(
    query: jax.Array, key: jax.Array, doc_start: jax.Array, modality: jax.Array, room: int = _WEIGHTS
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (sums of shares, sums of uniform shares, numbers of queries), f32 [M, M], [M, M] and [M], for one layer.
    Only queries that see keys of both modalities count.

    Args:
      query: [B, T, N, H], rotated.
      key: [B, T, K, H].
      doc_start: int32 [B, T]; T on padding.
      modality: bool [B, T, M].
      room: how many attention weights may exist on a device at one time. A chunk has at least one query of each row.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1
    if not mesh.empty and mesh.size > 1:  # each device has all positions of its rows
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        query, key, doc_start, modality = (
            jax.lax.with_sharding_constraint(x, spec(mesh, ("batch",) + (None,) * (x.ndim - 1), x.shape))
            for x in (query, key, doc_start, modality)
        )
    width = max(1, min(T, room * ways // (B * N * T)))
    pad = -T % width
    key, asked = key.astype(jnp.float32), modality.astype(jnp.float32)
    columns = jnp.arange(T)

    def pieces(x: jax.Array, fill: int = 0) -> jax.Array:
        """Cuts [B, T, ...] into chunks of queries, [chunks, B, width, ...]"""
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(B, -1, width, *x.shape[2:]), 1, 0)

    def add(total, piece):
        query, first, last, asking = piece
        query = query.astype(jnp.float32).reshape(B, width, K, N // K, H)
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, key, precision="highest") * H**-0.5
        seen = (first[..., None] <= columns) & (columns <= last[..., None])  # [B, T, S]
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), where=seen[:, None, None])
        shares = jnp.einsum("BKGTS,BSM->BTM", weights, asked, precision="highest") / N
        keys = jnp.einsum("BTS,BSM->BTM", seen.astype(jnp.float32), asked, precision="highest")
        uniform = keys / jnp.maximum(seen.sum(-1, keepdims=True), 1)
        counted = (asking & (keys > 0).all(-1, keepdims=True)).astype(jnp.float32)
        new = *(jnp.einsum("BTA,BTM->AM", counted, x) for x in (shares, uniform)), counted.sum((0, 1))
        return jax.tree.map(jnp.add, total, new), None

    M = modality.shape[-1]
    zeros = jnp.zeros((M, M)), jnp.zeros((M, M)), jnp.zeros(M)
    last = jnp.broadcast_to(columns, (B, T))
    parts = pieces(query), pieces(doc_start, T), pieces(last, -1), pieces(modality, 0)
    return jax.lax.scan(add, zeros, parts)[0]
