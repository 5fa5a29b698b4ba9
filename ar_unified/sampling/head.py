"""Computes logits with only the part of the head that a step needs: text, controls and sizes, or image codes.

Axes: R rows, C contexts, D model, W ids of text pieces, control tokens and size tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ar_unified.language.grammar import Grammar
from ar_unified.model.config import TransformerConfig
from ar_unified.model.own_rows import with_own
from ar_unified.model.transformer import Params, Transformer
from ar_unified.parallel import rules


class Weights(NamedTuple):
    """The model as the sampler reads it: its layers, and the two parts of its head, each [rows, D]."""

    layers: Params  # unstacked, without a head
    text: Array  # ids 0 .. W - 1
    image: Array  # image codes


def text_ids(grammar: Grammar) -> int:
    """W: the number of ids before the image codes, rounded up so that a mesh can split them."""
    return min(-(-grammar.vocabulary.image_offset // 128) * 128, grammar.vocabulary.size)


def head_parts(config: TransformerConfig, grammar: Grammar, params: Params) -> tuple[Array, Array]:
    """The head's text rows and its image-code rows, in the compute dtype, never in fewer bits."""
    v = grammar.vocabulary
    head = Transformer.bind(config, params).head().astype(config.dtype)
    parts = head[: text_ids(grammar)], head[v.image_offset : v.image_offset + v.codebook_size]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return parts
    text, image = (jax.lax.with_sharding_constraint(x, rules.spec(mesh, ("vocab", "embed"), x.shape)) for x in parts)
    return text, image


def with_head(layers: Params, text: Array, image: Array) -> Weights:
    """Makes Weights from `decoded.unstacked` parameters and the parts of the head. The parameters are not copied."""
    return Weights({name: leaf for name, leaf in layers.items() if name != "head"}, text, image)


def text_logits(weights: Weights, hidden: Array, adapter: Array) -> Array:
    """Logits f32 [R, ..., W] from hidden states [R, ..., D]. adapter: the number of each row's adapter, int32 [R]."""
    return _project(weights, "text", hidden, adapter, weights.text, 0)


def code_logits(grammar: Grammar, weights: Weights, hidden: Array, adapter: Array) -> Array:
    """Logits f32 [R, ..., image codes] from hidden states [R, ..., D]. adapter: the number of each row's adapter, int32
    [R].
    """
    return _project(weights, "image", hidden, adapter, weights.image, grammar.vocabulary.image_offset)


def _project(weights: Weights, part: str, hidden: Array, adapter: Array, head: Array, first: int) -> Array:
    """Logits from one part of the head. A mesh splits the head, and each device reads its share. Then the logits are
    split by rows, and each device draws for its own rows. Only the logits are sent between devices, because they are
    smaller than the head."""
    logits = jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows, between = logits.shape[0], [None] * (logits.ndim - 2)
        dealt = "draws" if rows % mesh.size == 0 else "batch"
        for axes in (("batch", *between, "vocab"), (dealt, *between, None)):
            logits = jax.lax.with_sharding_constraint(logits, rules.spec(mesh, axes, logits.shape, "logits"))
    own = weights.layers.get("rows", {}).get("head", {}).get(part)
    return logits if own is None else with_own(logits, hidden, own, adapter, first)
