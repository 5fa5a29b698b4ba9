"""LoRA: a matrix W stays fixed, and two small matrices are trained in addition (Hu et al., arXiv:2106.09685).

    x W  becomes  x W + scale * (dropout(x) A) B,   A [I, r], B [r, O],  scale = alpha / r

A is initialised as in PEFT (Kaiming-uniform with a = sqrt(5), which is uniform in +-1 / sqrt(I)) and B with zeros, so
that the first step starts from the base model. `rslora`: scale = alpha / sqrt(r), so that the size of updates does not
depend on the rank (Kalajdzievski, arXiv:2312.03732). The matrix W + scale A B is only made for an export (`merged`).

The parameters of adapters have two forms. In training there is one adapter, params["lora"], with the layers stacked:
{"attention": {"query": {"a": [L, I, r], "b": [L, r, O]}}, ...}. A sampler may have several adapters,
params["adapters"], and each row of a batch chooses one. There "a" is [L, A, I, r] (or a list of layers [A, I, r]), and
"b" includes the scale. Adapter 0 is zeros and means no adapter.

B batch, T position, L layers, A adapters, I inputs, O outputs, r rank. The axes [N, H] of a matrix's heads are one axis
here.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from ar_unified.errors import nearest, outside
from ar_unified.model.config import TransformerConfig, layer_matrices, summed
from ar_unified.model.dropout import dropout, fold
from ar_unified.model.linear import linear
from ar_unified.model.quantized import Quantized, widened
from ar_unified.tensors import Params

_GROUPS = {"attention": ("query", "key", "value", "output"), "mlp": ("gate", "up", "down")}
MATRICES = tuple(f"{group}.{name}" for group, names in _GROUPS.items() for name in names)  # that may have an adapter
ADAPTING = ("lora", "adapters")  # top-level keys: one adapter in training, several in serving
BASE_DTYPES = ("float32", "bfloat16", "int8")
_FIRST_KEY = 2  # number of a layer's first dropout key for adapters; the residual branches use the keys before it
Adapt = Callable[[jax.Array, Any, str, Any], jax.Array]  # (x, A and B, their path, dropout keys) -> what is added


@dataclass(frozen=True)
class LoraConfig:
    """An adapter; hashable.

    Attributes:
      rank: r; 0 means no LoRA, so the whole model is trained.
      alpha: the numerator of the scale.
      ranks, alphas: other values for some matrices, as PLACE=NUMBER, with places written like `targets`. If several
        name a matrix, the last is used.
      dropout: dropout rate on the input of A, drawn separately for each matrix.
      targets: which of a layer's matrices have an adapter: names in MATRICES, or names of groups, where * matches
        anything, such as "attention.query", "mlp", "*". QLoRA found that all of them are needed to match full tuning
        (Dettmers et al., arXiv:2305.14314, section 4).
      rslora: scale = alpha / sqrt(rank).
      base_dtype: dtype of the matrices that a training does not change, one of BASE_DTYPES. bfloat16 halves their
        memory; int8 cuts the memory of layers' matrices to a quarter (`dtypes.held`). Trained parameters and norms are
        float32.

    Raises ValueError, naming the field, if a number is out of range or a target names no matrix.
    """

    rank: int = 0
    alpha: float = 16.0
    ranks: tuple[str, ...] = ()
    alphas: tuple[str, ...] = ()
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention", "mlp")
    rslora: bool = False
    base_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("targets", "ranks", "alphas"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if problems := outside(self, rank="[0, inf)", alpha="(0, inf)", dropout="[0, 1)"):
            raise ValueError(problems[0])
        if self.base_dtype not in BASE_DTYPES:
            near = nearest(self.base_dtype, BASE_DTYPES)
            raise ValueError(f"base_dtype: expected one of {', '.join(BASE_DTYPES)}; found {self.base_dtype!r}{near}")
        if not self.targets:
            raise ValueError(f"targets: expected at least one of {', '.join(MATRICES)}; found none")
        for target in self.targets:
            _require_place("targets", target)
        for name in ("ranks", "alphas"):
            if getattr(self, name) and not self.rank:
                raise ValueError(f"{name}: expected none, because no matrix has an adapter with rank 0")
            for each in getattr(self, name):
                place, number = _of_place(name, each)
                if not any(path in self.matrices for path in MATRICES if _under(path, place)):
                    raise ValueError(f"{name}: {each!r}: no matrix of {place!r} has an adapter; add one to `targets`")
                if not 0 < number < float("inf") or (name == "ranks" and number != int(number)):
                    expected = "a whole number of at least 1" if name == "ranks" else "a number above 0"
                    raise ValueError(f"{name}: {each!r}: expected {expected}, found {number:g}")

    def rank_of(self, path: str) -> int:
        """The rank of the adapter of a matrix. path: one of MATRICES."""
        return int(_last(self.ranks, path, self.rank))

    def alpha_of(self, path: str) -> float:
        """The alpha of the adapter of a matrix, which is the numerator of its scale. path: one of MATRICES."""
        return _last(self.alphas, path, self.alpha)

    def scale_of(self, path: str) -> float:
        """The scale of the adapter of a matrix, which multiplies (x A) B. path: one of MATRICES."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (rank**0.5 if self.rslora else rank)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The MATRICES that have an adapter, in order."""
        return tuple(name for name in MATRICES if any(_under(name, target) for target in self.targets))


def _under(name: str, target: str) -> bool:
    target = target.removeprefix("layers.")
    return fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"{target}.*")


def _require_place(key: str, place: str) -> None:
    if not any(_under(name, place) for name in MATRICES):
        near = nearest(place, MATRICES)
        raise ValueError(f"{key}: {place!r} matches no matrix of a layer ({', '.join(MATRICES)}){near}")


def _of_place(key: str, said: str) -> tuple[str, float]:
    """Parses PLACE=NUMBER. Raises ValueError."""
    place, _, number = said.rpartition("=")
    try:
        found = float(number)
    except ValueError:
        place = ""
    if not place:
        raise ValueError(f"{key}: expected PLACE=NUMBER, such as mlp=8; found {said!r}")
    _require_place(key, place)
    return place, found


def _last(said: Sequence[str], path: str, default: float) -> float:
    """The NUMBER of the last PLACE=NUMBER in `said` whose PLACE contains `path`; `default` without one."""
    numbers = [float(each.rpartition("=")[2]) for each in said if _under(path, each.rpartition("=")[0])]
    return numbers[-1] if numbers else default


def init(config: TransformerConfig, lora: LoraConfig, key: jax.Array) -> Params:
    """A new float32 adapter in the form of params["lora"]. Each matrix and layer draws from its own key."""
    L, sizes = config.n_layers, layer_matrices(config)
    made: Params = {}
    for index, path in enumerate(MATRICES):
        if path not in lora.matrices:
            continue
        group, _, name = path.partition(".")
        inputs, outputs = sizes[name]
        r = lora.rank_of(path)
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), (L, inputs, r), jnp.float32, -bound, bound)
        made.setdefault(group, {})[name] = {"a": a, "b": jnp.zeros((L, r, outputs), jnp.float32)}
    return made


def logical_axes(matrices: Mapping[str, tuple[str, ...]], tree: Any) -> Any:
    """A tree like params["lora"] or params["adapters"] with the logical axis names of each leaf.

    matrices: the logical axes of each matrix's inputs and outputs, by its name in MATRICES.
    """

    def axes(path: KeyPath, leaf: Any) -> tuple[str | None, ...]:
        *_, group, name, side = (entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        inputs, outputs = matrices[f"{group}.{name}"]
        stacked = not isinstance(path[0], jax.tree_util.SequenceKey)
        before = (("layers",) if stacked else ()) + (None,) * (leaf.ndim - 2 - stacked)
        return (*before, inputs, None) if side == "a" else (*before, None, outputs)

    return jax.tree_util.tree_map_with_path(axes, tree)


def with_adapters(params: Params) -> Any:
    """The layers of a transformer (stacked or a list). The key "beside" of a layer has the adapters of this layer."""
    layers = params["layers"]
    beside = next((params[name] for name in ADAPTING if name in params), None)
    if beside is None:
        return layers
    if isinstance(layers, list):
        return [layer | {"beside": own} for layer, own in zip(layers, beside, strict=True)]
    return layers | {"beside": beside}


def adaptation(lora: LoraConfig | None, adapter: jax.Array | None = None) -> Adapt | None:
    """Returns the function that computes an adapter's addition to a matrix product of a layer; None without adapters.

    lora: in training, the adapter's config. adapter: in serving, the number of each row's adapter, int32 [B].
    """
    if lora is not None:
        return functools.partial(_trained, lora)
    return None if adapter is None else functools.partial(_chosen, adapter)


def _trained(
    lora: LoraConfig, x: jax.Array, pair: Mapping[str, jax.Array], path: str, keys: jax.Array | None
) -> jax.Array:
    """scale * (dropout(x) A) B: x [B, T, I] -> [B, T, O]. keys: one per token, [B, T]; None means no dropout."""
    if lora.dropout:
        x = dropout(x, lora.dropout, fold(keys, _FIRST_KEY + MATRICES.index(path)))
    return linear(linear(x, pair["a"]), pair["b"]) * lora.scale_of(path)


def _chosen(
    adapter: jax.Array, x: jax.Array, pair: Mapping[str, jax.Array], path: str, keys: jax.Array | None
) -> jax.Array:
    """(x A) B, where row i of x [B, T, I] uses adapter[i]. The pair has A as [A, I, r] and B as [A, r, O]."""
    low = jnp.einsum("BTI,BIR->BTR", x, pair["a"][adapter])
    return jnp.einsum("BTR,BRO->BTO", low, pair["b"][adapter])


def merged(lora: LoraConfig, params: Params, dtype: str = "float32") -> Params:
    """The parameters without "lora": each adapted matrix becomes W + scale A B, summed in float32 and stored in the
    dtype of W.

    params: with stacked layers, as in training; the adapter may have any dtype. dtype: the new dtype of matrices that
    are in 8 bits.
    """
    layers = {group: dict(leaves) for group, leaves in params["layers"].items()}
    rounded = {path for path in MATRICES if isinstance(_at(layers, path), Quantized)}
    for path in {*lora.matrices, *rounded}:
        group, _, name = path.partition(".")
        weight = _at(layers, path)
        kind = jnp.dtype(dtype) if path in rounded else weight.dtype
        if path in rounded:
            weight = widened(weight, summed(name))
        if path in lora.matrices:
            pair = _at(params["lora"], path)
            a, b = pair["a"].astype(jnp.float32), pair["b"].astype(jnp.float32)
            added = lora.scale_of(path) * jnp.einsum("LIR,LRO->LIO", a, b, precision="highest")
            weight = weight.astype(jnp.float32) + added.reshape(weight.shape)
        layers[group][name] = weight.astype(kind)
    return {name: leaf for name, leaf in params.items() if name != "lora"} | {"layers": layers}


def _at(groups: Mapping[str, Any], path: str) -> Any:
    """The value in the tree at a path such as "mlp.up"."""
    group, _, name = path.partition(".")
    return groups[group][name]
