"""Converts tensors of a published transformer to ours and back: a table of names for each dialect, and a conversion for
each leaf.

All dialects have the same transformer block. They differ in four ways: the names of tensors, the order of a matrix's
axes ([out, in] in torch, [in, out] in flax), the pairs of numbers that RoPE rotates, and the order of ids.

Axes: D model, N query heads, K KV heads, H head dim, F MLP, V ids, G groups of heads, each with its own QK-norm
weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from ar_unified.language.border import Border
from ar_unified.model.config import TransformerConfig
from ar_unified.model.leaves import named
from ar_unified.model.transformer import abstract_params

_ROWS = ("embedding", "head")
_BLOCK = 64  # rows of a matrix that are transposed at once, chosen to fit a cache line and a cache
_HEADS = {"query": "n_heads", "key": "n_kv_heads", "value": "n_kv_heads"}


@dataclass(frozen=True)
class Dialect:
    """How one kind of file writes a transformer.

    Attributes:
        name: what messages call the files of this kind.
        names: for each of our leaves (`leaves.named`), the name of its tensor; {} stands for the number of the layer.
            "embedding" and "head" may have several tensors, the parts of one table in order.
        out_first: whether matrices are [out, in], as in torch. Otherwise they are [in, out], and the head is [D, V].
        interleaved: whether RoPE rotates neighbours as pairs (0 and 1). Our code and transformers pair 0 with H/2.
        ignored: endings of the names of tensors that are not parameters, such as buffers.
    """

    name: str
    names: Mapping[str, str | tuple[str, ...]]
    out_first: bool = True
    interleaved: bool = False
    ignored: tuple[str, ...] = ()

    def prefixed(self, changes: Mapping[str, str]) -> Dialect:
        """The same dialect with other prefixes of names, such as {"model.": "text_model.model."}."""

        def new(name: str) -> str:
            for old, other in changes.items():
                if name.startswith(old):
                    return other + name.removeprefix(old)
            return name

        names = {
            ours: new(found) if isinstance(found, str) else tuple(map(new, found)) for ours, found in self.names.items()
        }
        return replace(self, names=MappingProxyType(names))


HF = Dialect(
    "transformers",
    MappingProxyType(
        {
            "embedding": "model.embed_tokens.weight",
            "head": "lm_head.weight",
            "norm": "model.norm.weight",
            "layers.attention.norm": "model.layers.{}.input_layernorm.weight",
            "layers.attention.query": "model.layers.{}.self_attn.q_proj.weight",
            "layers.attention.query_bias": "model.layers.{}.self_attn.q_proj.bias",
            "layers.attention.query_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
            "layers.attention.query_norm.bias": "model.layers.{}.self_attn.q_norm.bias",
            "layers.attention.key": "model.layers.{}.self_attn.k_proj.weight",
            "layers.attention.key_bias": "model.layers.{}.self_attn.k_proj.bias",
            "layers.attention.key_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
            "layers.attention.key_norm.bias": "model.layers.{}.self_attn.k_norm.bias",
            "layers.attention.value": "model.layers.{}.self_attn.v_proj.weight",
            "layers.attention.value_bias": "model.layers.{}.self_attn.v_proj.bias",
            "layers.attention.output": "model.layers.{}.self_attn.o_proj.weight",
            "layers.mlp.norm": "model.layers.{}.post_attention_layernorm.weight",
            "layers.mlp.gate": "model.layers.{}.mlp.gate_proj.weight",
            "layers.mlp.up": "model.layers.{}.mlp.up_proj.weight",
            "layers.mlp.down": "model.layers.{}.mlp.down_proj.weight",
        }
    ),
    ignored=("rotary_emb.inv_freq",),
)
META = Dialect(
    "Meta's checkpoints",
    MappingProxyType(
        {
            "embedding": "tok_embeddings.weight",
            "head": "output.weight",
            "norm": "norm.weight",
            "layers.attention.norm": "layers.{}.attention_norm.weight",
            "layers.attention.query": "layers.{}.attention.wq.weight",
            "layers.attention.query_norm.scale": "layers.{}.attention.q_normalization.weight",
            "layers.attention.query_norm.bias": "layers.{}.attention.q_normalization.bias",
            "layers.attention.key": "layers.{}.attention.wk.weight",
            "layers.attention.key_norm.scale": "layers.{}.attention.k_normalization.weight",
            "layers.attention.key_norm.bias": "layers.{}.attention.k_normalization.bias",
            "layers.attention.value": "layers.{}.attention.wv.weight",
            "layers.attention.output": "layers.{}.attention.wo.weight",
            "layers.mlp.norm": "layers.{}.ffn_norm.weight",
            "layers.mlp.gate": "layers.{}.feed_forward.w1.weight",
            "layers.mlp.up": "layers.{}.feed_forward.w3.weight",
            "layers.mlp.down": "layers.{}.feed_forward.w2.weight",
        }
    ),
    interleaved=True,
    ignored=("rope.freqs",),
)
LWM = Dialect(
    "LWM's streams",
    MappingProxyType(
        {
            "embedding": ("transformer/wte/embedding", "transformer/vte/embedding"),
            "head": ("lm_head/kernel", "vision_head/kernel"),
            "norm": "transformer/ln_f/kernel",
            "layers.attention.norm": "transformer/h/{}/attention_norm/kernel",
            "layers.attention.query": "transformer/h/{}/attention/wq/kernel",
            "layers.attention.key": "transformer/h/{}/attention/wk/kernel",
            "layers.attention.value": "transformer/h/{}/attention/wv/kernel",
            "layers.attention.output": "transformer/h/{}/attention/wo/kernel",
            "layers.mlp.norm": "transformer/h/{}/ffn_norm/kernel",
            "layers.mlp.gate": "transformer/h/{}/feed_forward/w1/kernel",
            "layers.mlp.up": "transformer/h/{}/feed_forward/w3/kernel",
            "layers.mlp.down": "transformer/h/{}/feed_forward/w2/kernel",
        }
    ),
    out_first=False,
    interleaved=True,
)
LWM_TEXT = replace(
    LWM,
    names=MappingProxyType({**LWM.names, "embedding": "transformer/wte/embedding", "head": "lm_head/kernel"}),
)


@dataclass(frozen=True)
class Slot:
    """One of our leaves, or one layer of it, and the published tensors from which it is made.

    Attributes:
        leaf: the path of our leaf among the parameters.
        layer: the layer's number; None for leaves outside the layers.
        names, shapes: names and shapes of the published tensors. The shape of a QK-norm is [H] or [G, H].
        shape: the shape of our leaf for one layer.
    """

    leaf: str
    layer: int | None
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Keys:
    """The tensors of one model in one dialect.

    Attributes:
        tables: the number of ids in each part of "embedding" and "head"; one number unless the dialect has several
            parts.
        qk_groups: for (query, key), the number of groups of heads that have their own QK-norm weights; 0 means one
            vector [H] for all heads.
    """

    dialect: Dialect
    config: TransformerConfig
    border: Border
    tables: tuple[int, ...] = ()
    qk_groups: tuple[int, int] = (0, 0)
    _leaves: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", self.tables or (self.border.size,))
        object.__setattr__(self, "_leaves", named(abstract_params(self.config)))
        if unwritable := [leaf for leaf in self._leaves if leaf not in self.dialect.names]:
            raise ValueError(f"there is no tensor in {self.dialect.name} for {', '.join(unwritable)}")

    def slots(self) -> Iterator[Slot]:
        """Every slot, layer by layer, so that a file is read once, from its beginning to its end."""
        outside = [leaf for leaf in self._leaves if not leaf.startswith("layers.")]
        for leaf in outside:
            if leaf != "head":
                yield self._slot(leaf, None)
        for layer in range(self.config.n_layers):
            for leaf in self._leaves:
                if leaf.startswith("layers."):
                    yield self._slot(leaf, layer)
        if "head" in outside:
            yield self._slot("head", None)

    def _slot(self, leaf: str, layer: int | None) -> Slot:
        found = self.dialect.names[leaf]
        names = tuple(name.format(layer) for name in ((found,) if isinstance(found, str) else found))
        shape = self._leaves[leaf].shape[0 if layer is None else 1 :]
        return Slot(leaf, layer, names, self._theirs(leaf, shape), shape)

    def _theirs(self, leaf: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        last = leaf.split(".")[-1]
        if leaf in _ROWS:
            sides = [(ids, shape[1]) for ids in self.tables]
            turned = leaf == "head" and not self.dialect.out_first
            return tuple(side[::-1] if turned else side for side in sides)
        if last in _HEADS:
            matrix = (shape[0], shape[1] * shape[2])
        elif last == "output":
            matrix = (shape[0] * shape[1], shape[2])
        elif last.endswith("_bias"):
            return ((shape[0] * shape[1],),)
        elif "_norm." in leaf:
            groups = self.qk_groups["key_norm" in leaf]
            return ((groups, shape[-1]) if groups else shape[-1:],)
        elif len(shape) == 2:
            matrix = (shape[0], shape[1])
        else:
            return (shape,)
        return (matrix[::-1] if self.dialect.out_first else matrix,)

    # ---- one leaf of one layer -----------------------------------------------------------------------------------

    def to_ours(self, slot: Slot, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Our array of a slot, made from the published tensors, in their dtype. Rows after the first V are zeros."""
        last = slot.leaf.split(".")[-1]
        if slot.leaf in _ROWS:
            turned = slot.leaf == "head" and not self.dialect.out_first
            table = np.concatenate([transposed(array) if turned else array for array in arrays])
            out = np.zeros(slot.shape, table.dtype)
            out[: self.border.size] = self.border.gather(table)
            return out
        (array,) = arrays
        if "_norm." in slot.leaf:
            if len(slot.shape) == 2:
                array = array.reshape(-1, array.shape[-1])
                array = np.repeat(array, slot.shape[0] // len(array), axis=0)
            return self._turned(array.reshape(slot.shape), slot.leaf)
        if array.ndim == 2 and self.dialect.out_first:
            array = transposed(array)
        array = array.reshape(slot.shape)
        return self._turned(array, slot.leaf) if last != "value" else np.ascontiguousarray(array)

    def to_theirs(self, slot: Slot, array: np.ndarray) -> tuple[np.ndarray, ...]:
        """The inverse of `to_ours`. Raises ValueError if training has made QK-norm weights differ within a group of
        heads."""
        last = slot.leaf.split(".")[-1]
        if slot.leaf in _ROWS:
            turned = slot.leaf == "head" and not self.dialect.out_first
            ends = np.cumsum(self.tables)[:-1]
            parts = np.split(self.border.scatter(array), ends)
            return tuple(transposed(part) if turned else np.ascontiguousarray(part) for part in parts)
        array = self._turned(array, slot.leaf, back=True) if last != "value" else array
        if "_norm." in slot.leaf and array.ndim == 2:
            groups = array.reshape(slot.shapes[0][0] if len(slot.shapes[0]) == 2 else 1, -1, array.shape[-1])
            if (groups != groups[:, :1]).any():
                raise ValueError(
                    f"{slot.names[0]}: expected one vector for each of {len(groups)} groups of heads; found different "
                    "vectors within a group, because training has changed the heads separately"
                )
            array = groups[:, 0]
        (shape,) = slot.shapes
        if len(shape) == 2 and "_norm." not in slot.leaf:
            array = array.reshape(shape[::-1] if self.dialect.out_first else shape)
            array = transposed(array) if self.dialect.out_first else array
        return (np.ascontiguousarray(array.reshape(shape)),)

    def _turned(self, array: np.ndarray, leaf: str, back: bool = False) -> np.ndarray:
        """Changes the last axis, [..., H], of queries and keys from the published order of RoPE's pairs to ours, or
        back."""
        if not self.dialect.interleaved or not any(name in leaf for name in ("query", "key")):
            return np.ascontiguousarray(array)
        H = array.shape[-1]
        order = np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)])
        return np.ascontiguousarray(array[..., np.argsort(order) if back else order])


def transposed(matrix: np.ndarray) -> np.ndarray:
    """Turns [A, B] into a contiguous [B, A]. It copies block by block, because numpy's copy of `.T` takes four times as
    long.
    """
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for begin in range(0, len(matrix), _BLOCK):
        out[:, begin : begin + _BLOCK] = matrix[begin : begin + _BLOCK].T
    return out
