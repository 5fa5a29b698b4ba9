"""The decoder-only transformer: Llama's block, optionally with Chameleon's norms.

B batch, T query position, S cache slot, D model, N query heads, K KV heads, H head dim, F MLP, V vocabulary, L layers.

Parameters are plain nested dicts of float32 arrays. Layers are stacked on a leading axis L, whether they are scanned or
unrolled. A module is bound to its parameters inside the traced function, so all transforms are the plain ones of JAX:

    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    hidden = Transformer.bind(config, params)(tokens, positions, doc_start)

All parts are as published: Llama (arXiv 2302.13971), RoPE (2104.09864), GQA (2305.13245), QK-norm and the swin
placement of norms (Chameleon, 2405.09818).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ar_unified.kernels.qk_norm_rope import Rope, qk_norm_rope
from ar_unified.model import own_rows
from ar_unified.model.attention import attend_to_cache, attend_to_documents
from ar_unified.model.cache import Cache, extended
from ar_unified.model.config import TransformerConfig, summed
from ar_unified.model.decoded import each_layer
from ar_unified.model.dropout import dropout, fold
from ar_unified.model.dtypes import MATRICES, cast
from ar_unified.model.embedding import look_up
from ar_unified.model.linear import linear
from ar_unified.model.lora import ADAPTING, Adapt, LoraConfig, adaptation, with_adapters
from ar_unified.model.lora import logical_axes as lora_axes
from ar_unified.model.quantized import Quantized
from ar_unified.model.remat import rematerialised
from ar_unified.model.rope import rope_angles, rope_table
from ar_unified.parallel import rules
from ar_unified.parallel.zigzag import unzigzag, zigzag
from ar_unified.tensors import Params

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
Product = Callable[[jax.Array, str, Any], jax.Array]  # (x, path of a layer's matrix, the matrix) -> their product

# The logical axes of every parameter, by its path; parallel/rules.py maps them to a mesh.
AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "norm": ("embed",),
    "layers/attention/norm": ("layers", "embed"),
    "layers/attention/query": ("layers", "embed", "heads", "head_dim"),
    "layers/attention/key": ("layers", "embed", "kv_heads", "head_dim"),
    "layers/attention/value": ("layers", "embed", "kv_heads", "head_dim"),
    "layers/attention/output": ("layers", "heads", "head_dim", "embed"),
    "layers/attention/query_bias": ("layers", "heads", "head_dim"),
    "layers/attention/key_bias": ("layers", "kv_heads", "head_dim"),
    "layers/attention/value_bias": ("layers", "kv_heads", "head_dim"),
    "layers/attention/query_norm/scale": ("layers", "heads", "head_dim"),  # no "heads" if all heads share it
    "layers/attention/query_norm/bias": ("layers", "heads", "head_dim"),
    "layers/attention/key_norm/scale": ("layers", "kv_heads", "head_dim"),
    "layers/attention/key_norm/bias": ("layers", "kv_heads", "head_dim"),
    "layers/mlp/norm": ("layers", "embed"),
    "layers/mlp/gate": ("layers", "embed", "mlp"),
    "layers/mlp/up": ("layers", "embed", "mlp"),
    "layers/mlp/down": ("layers", "mlp", "embed"),
}
# The inputs and outputs of each matrix of a layer; heads and head dim are one axis.
_MATRIX_AXES = {
    path.removeprefix("layers/").replace("/", "."): tuple(axis for axis in axes[1:] if axis != "head_dim")
    for path, axes in AXES.items()
    if path.rpartition("/")[2] in MATRICES
}


def logical_axes(params: Params) -> Params:
    """A tree like `params`, stacked or unstacked, with the logical axis names of each leaf (tuples of str)."""
    beside = {name: lora_axes(_MATRIX_AXES, params[name]) for name in ADAPTING if name in params}
    if "rows" in params:
        beside["rows"] = own_rows.logical_axes(params["rows"])

    def axes(path: jax.tree_util.KeyPath, leaf: Any) -> tuple[str, ...]:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        stacked = not any(isinstance(entry, jax.tree_util.SequenceKey) for entry in path)
        found = AXES["/".join(names)][0 if stacked else 1 :]
        if stacked and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "scale":
            return tuple(axis for i, axis in enumerate(found) if i not in summed(names[-1]))
        if stacked or names[-1] not in MATRICES:
            return found if len(found) == leaf.ndim else (*found[:-2], found[-1])
        flat = tuple(axis for axis in found if axis != "head_dim")
        return flat[-leaf.ndim :]  # a quantized matrix also has a scale for each output

    own = {name: leaf for name, leaf in params.items() if name not in beside}
    return jax.tree_util.tree_map_with_path(axes, own) | beside


def init(config: TransformerConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; works under `jax.jit` (with `out_shardings`) and `jax.eval_shape`.

    Recipe: a matrix is normal with variance 1 / fan-in, so that its output is as large as its input at any width (LeCun
    et al., "Efficient BackProp", 1998). The two projections that write into the residual stream are divided by sqrt(2
    L), so that the variance of the stream does not grow with depth (GPT-2). An untied embedding is normal with variance
    1; a tied one is initialised like a matrix. Norms start with the factor 1 and the bias 0.
    """
    L, D, F, V = config.n_layers, config.d_model, config.d_mlp, config.vocab_size
    N, K, H = config.n_heads, config.n_kv_heads, config.head_dim
    keys = iter(jax.random.split(key, 9))

    def normal(*shape: int, fan_in: float) -> jax.Array:
        return fan_in**-0.5 * jax.random.normal(next(keys), shape, jnp.float32)

    identity = 1.0 - config.norm_offset
    layer_attention: Params = {
        "norm": jnp.full((L, D), identity, jnp.float32),
        "query": normal(L, D, N, H, fan_in=D),
        "key": normal(L, D, K, H, fan_in=D),
        "value": normal(L, D, K, H, fan_in=D),
        "output": normal(L, N, H, D, fan_in=N * H * 2 * L),
    }
    if config.qk_norm != "none":
        for name, heads in (("query_norm", N), ("key_norm", K)):
            shape = (L, heads, H) if config.qk_norm_per_head else (L, H)
            layer_attention[name] = {"scale": jnp.ones(shape)}
            if config.qk_norm == "layernorm":
                layer_attention[name]["bias"] = jnp.zeros(shape)
    if config.qkv_bias:
        biases = {"query_bias": N, "key_bias": K, "value_bias": K}
        layer_attention |= {name: jnp.zeros((L, heads, H)) for name, heads in biases.items()}
    layer_mlp = {
        "norm": jnp.full((L, D), identity, jnp.float32),
        "gate": normal(L, D, F, fan_in=D),
        "up": normal(L, D, F, fan_in=D),
        "down": normal(L, F, D, fan_in=F * 2 * L),
    }
    params: Params = {
        "embedding": normal(V, D, fan_in=D if config.tie_embeddings else 1),
        "layers": {"attention": layer_attention, "mlp": layer_mlp},
        "norm": jnp.full((D,), identity, jnp.float32),
    }
    if not config.tie_embeddings:
        params["head"] = normal(V, D, fan_in=D)
    return params


def abstract_params(config: TransformerConfig, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Shapes and dtypes of the parameters, and their shardings on a mesh. Nothing is allocated or computed.

    The key is made inside, so that nothing is computed. This function checks a config before the processes of a job
    join, and a process that has already computed something cannot join.
    """
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    if mesh is None:
        return shapes
    places = rules.shardings(mesh, logical_axes(shapes), shapes)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, places)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32; the result has the dtype of x."""
    x32 = x.astype(jnp.float32)
    return (x32 * (jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + eps) * scale)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with RoPE. The caller's `attend` stores keys and values and computes attention over
    them."""

    def __init__(self, config: TransformerConfig, params: Params):
        self.eps = config.norm_eps
        self.head_dim = config.head_dim
        self.query, self.key, self.value, self.output = (
            nnx.data(params[name]) for name in ("query", "key", "value", "output")
        )
        self.query_norm = nnx.data(params.get("query_norm", {}))
        self.key_norm = nnx.data(params.get("key_norm", {}))
        self.biases = nnx.data([params.get(f"{name}_bias") for name in ("query", "key", "value")])

    def __call__(self, x: jax.Array, rope: Rope, attend: Callable, product: Product) -> tuple[jax.Array, Any]:
        """[B, T, D] -> ([B, T, D], the state of `attend`, with the keys and values)."""
        weights = {"query": self.query, "key": self.key, "value": self.value}
        query, key, value = (
            self._heads(product(x, f"attention.{name}", _flat(w)), name, b)
            for (name, w), b in zip(weights.items(), self.biases, strict=True)
        )
        query = qk_norm_rope(query, rope, **self.query_norm, eps=self.eps)
        key = qk_norm_rope(key, rope, **self.key_norm, eps=self.eps)
        out, state = attend(query, key, value)
        out = product(out.reshape(*x.shape[:2], -1), "attention.output", _flat(self.output, len(self.output.shape) - 1))
        return checkpoint_name(out, "output"), state

    def _heads(self, flat: jax.Array, name: str, bias: jax.Array | None) -> jax.Array:
        heads = checkpoint_name(flat.reshape(*flat.shape[:2], -1, self.head_dim), name)
        return heads if bias is None else heads + bias.astype(heads.dtype)


def _flat(weight: jax.Array | Quantized, inputs: int = 1) -> jax.Array | Quantized:
    """Reshapes a matrix to [I, O]. Its first `inputs` axes become I: a product sums over them."""
    if isinstance(weight, Quantized):
        return weight.flat(inputs)
    return weight.reshape(math.prod(weight.shape[:inputs]), -1)


class MLP(nnx.Module):
    """A gated MLP: SwiGLU, or the same with another activation."""

    def __init__(self, config: TransformerConfig, params: Params):
        self.activation = _ACTIVATIONS[config.activation]
        self.gate, self.up, self.down = (nnx.data(params[name]) for name in ("gate", "up", "down"))

    def __call__(self, x: jax.Array, product: Product) -> jax.Array:
        """[B, T, D] -> [B, T, D]: a gated linear unit."""
        gate = checkpoint_name(product(x, "mlp.gate", self.gate), "gate")
        up = checkpoint_name(product(x, "mlp.up", self.up), "up")
        return checkpoint_name(product(self.activation(gate) * up, "mlp.down", self.down), "down")


class Block(nnx.Module):
    """One layer: x + f(norm(x)) ("pre") or x + norm(f(x)) ("swin"), where f is first the attention and then the MLP.

    params: parameters of one layer; "beside" has the layer's adapters, if there are any.
    """

    def __init__(self, config: TransformerConfig, params: Params):
        self.config = config
        self.attention_norm = nnx.Param(params["attention"]["norm"])
        self.attention = Attention(config, params["attention"])
        self.mlp_norm = nnx.Param(params["mlp"]["norm"])
        self.mlp = MLP(config, params["mlp"])
        self.beside = nnx.data(params.get("beside", {}))

    def __call__(
        self,
        x: jax.Array,
        rope: Rope,
        attend: Callable,
        dropout_keys: jax.Array | None = None,
        adapt: Adapt | None = None,
    ) -> tuple[jax.Array, Any]:
        """[B, T, D] -> ([B, T, D], the state of `attend`): attention, then the MLP, each added to the residual
        stream."""
        pre, eps, rate = self.config.norm_placement == "pre", self.config.norm_eps, self.config.dropout
        attention_norm, mlp_norm = (_norm(self.config, x[...]) for x in (self.attention_norm, self.mlp_norm))

        def product(x: jax.Array, path: str, matrix: jax.Array | Quantized) -> jax.Array:
            group, _, name = path.partition(".")
            pair, made = self.beside.get(group, {}).get(name), linear(x, matrix)
            return made if pair is None or adapt is None else made + adapt(x, pair, path, dropout_keys)

        y, state = self.attention(rms_norm(x, attention_norm, eps) if pre else x, rope, attend, product)
        x = x + dropout(y if pre else rms_norm(y, attention_norm, eps), rate, fold(dropout_keys, 0))
        y = self.mlp(rms_norm(x, mlp_norm, eps) if pre else x, product)
        x = x + dropout(y if pre else rms_norm(y, mlp_norm, eps), rate, fold(dropout_keys, 1))
        return x, state


class Transformer(nnx.Module):
    """Computes hidden states from tokens, and logits from hidden states. `Transformer.bind(config, params)` makes it.

    If there is params["lora"], that adapter is part of the model. If there is params["adapters"], each row names one of
    them (model/lora.py); with params["rows"], each adapter also has its own table rows (model/own_rows.py).
    """

    def __init__(self, config: TransformerConfig, params: Params, lora: LoraConfig | None = None):
        if ("lora" in params) != (lora is not None):
            raise ValueError("expected a LoraConfig and params['lora'], or neither; found only one of them")
        self.config, self.adapting = config, lora
        self.embedding = nnx.Param(params["embedding"])
        self.layers = nnx.data(with_adapters(params))
        self.norm = nnx.Param(params["norm"])
        self.output = nnx.Param(params["head"]) if "head" in params else None
        self.rows = nnx.data(params["rows"]) if "rows" in params else None

    @classmethod
    def bind(cls, config: TransformerConfig, params: Params, lora: LoraConfig | None = None) -> Transformer:
        """A module that uses `params`; the caller still owns them. Binding is cheap; do it inside a traced function.

        lora: the config of params["lora"]. Raises ValueError if there is only one of `lora` and params["lora"].
        """
        return cls(config, params, lora)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        doc_start: jax.Array,
        dropout_keys: jax.Array | None = None,
        adapter: jax.Array | None = None,
    ) -> jax.Array:
        """The teacher-forced forward pass over packed rows.

        Args:
          tokens, positions: int32 [B, T]; positions count from the beginning of each document.
          doc_start: int32 [B, T], where in the row the document of each position begins; T on padding.
          dropout_keys: keys [B], one per row; None means no dropout.
          adapter: int32 [B], the number of each row's adapter in params["adapters"]; None means no adapter.

        Returns:
          Hidden states after the last norm, [B, T, D] in the compute dtype. `token_losses` or `logits` take them.
        """
        config = self.config
        tokens, positions, doc_start, columns, rope = self._begin(tokens, positions, doc_start)
        if dropout_keys is not None:  # one key for each token
            dropout_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(dropout_keys, columns)
        x = dropout(
            self._look_up(tokens, "sequence", adapter),
            config.dropout,
            fold(dropout_keys, config.n_layers),
        )

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, None]:
            return attend_to_documents(query, key, value, doc_start, config.attention, config.context), None

        def layer(x: jax.Array, params: Params, index: jax.Array | int) -> jax.Array:
            block = Block(config, cast(params, config.dtype))
            return block(x, rope, attend, fold(dropout_keys, index), adaptation(self.adapting, adapter))[0]

        layer = rematerialised(layer, config.remat, config.scan_layers)
        if config.scan_layers and not isinstance(self.layers, list):
            indices = jnp.arange(config.n_layers)
            x, _ = jax.lax.scan(lambda x, xs: (layer(x, *xs), None), x, (self.layers, indices))
        else:
            for index, params in enumerate(each_layer(self.layers, config.n_layers)):
                x = layer(x, params, index)
        return unzigzag(rms_norm(x, _norm(config, self.norm[...]), config.norm_eps))

    def observe(self, tokens: jax.Array, positions: jax.Array, doc_start: jax.Array, look: Callable[..., Any]) -> Any:
        """A forward pass like `__call__`, without dropout. It calls `look` in each layer and returns the results.

        Args:
          tokens, positions, doc_start: as in `__call__`.
          look: called in each layer with the rotated query [B, T, N, H] and key [B, T, K, H], in the order of the row.

        Returns:
          The arrays that `look` returned, stacked on a leading axis L.
        """
        config = self.config
        tokens, positions, doc_start, _, rope = self._begin(tokens, positions, doc_start)

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
            out = attend_to_documents(query, key, value, doc_start, config.attention, config.context)
            return out, look(unzigzag(query), unzigzag(key))

        def layer(x: jax.Array, params: Params) -> tuple[jax.Array, Any]:
            return Block(config, cast(params, config.dtype))(x, rope, attend, None, adaptation(self.adapting))

        return jax.lax.scan(layer, self._look_up(tokens, "sequence", None), self.layers)[1]

    def _begin(self, tokens: jax.Array, positions: jax.Array, doc_start: jax.Array) -> tuple[Any, ...]:
        """Returns tokens, positions, doc_start and columns, int32 [B, T] and in zigzag order on a mesh, and RoPE's
        angles.
        """
        columns = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        tokens, positions, doc_start, columns = (zigzag(x) for x in (tokens, positions, doc_start, columns))
        rope = rope_table(self.config, positions, tokens.shape[1])
        return tokens, positions, doc_start, columns, rope

    def extend(
        self, tokens: jax.Array, cache: Cache, start: jax.Array, adapter: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Processes T more tokens of each row after those in the cache. Prefill and decode both use it.

        Row b's tokens take the positions start[b] .. start[b] + T - 1, and each sees all positions up to its own.
        Rows of different lengths are padded on the right. Padding writes after the row's end, and the row's next tokens
        overwrite it before anything reads it. Positions beyond the cache's length are not written.

        Args:
          tokens: int32 [B, T].
          cache: from `init_cache` or an earlier call.
          start: int32 [B].
          adapter: as in `__call__`. Parameters may be stacked or unstacked.

        Returns:
          Hidden states [B, T, D] as `__call__` gives them, and the cache with the new keys and values.
        """
        config = self.config
        positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        # The barrier is needed because XLA CPU would otherwise compute cos and sin again for each head of each layer.
        rope = jax.lax.optimization_barrier(rope_angles(config, positions))
        x, states = self._look_up(tokens, None, adapter), []
        for params, cached in zip(each_layer(self.layers, config.n_layers), cache, strict=True):

            def attend(query, key, value, cached=cached):
                cached = extended(cached, start, key, value, config.attention)
                return attend_to_cache(query, cached, start, config.attention), cached

            x, state = Block(config, cast(params, config.dtype))(
                x, rope, attend, None, adaptation(self.adapting, adapter)
            )
            states.append(state)
        return rms_norm(x, _norm(config, self.norm[...]), config.norm_eps), tuple(states)

    def _look_up(self, tokens: jax.Array, sequence: str | None, adapter: jax.Array | None) -> jax.Array:
        x = look_up(self.embedding[...], tokens, self.config.dtype, sequence)
        if self.rows is not None and adapter is not None and "embedding" in self.rows:
            x = own_rows.looked_up(x, tokens, self.rows["embedding"], adapter)
        scale = self.config.embedding_scale  # rounded to the compute dtype, as Gemma's is
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def head(self) -> jax.Array:
        """The output weight [V, D], float32; the embedding table if the two are tied."""
        return (self.embedding if self.output is None else self.output)[...]

    def logits(self, hidden: jax.Array, adapter: jax.Array | None = None) -> jax.Array:
        """The logits of hidden states [B, ..., D], float32 [B, ..., V]. This is for sampling; a loss uses `head` and
        never stores all logits.

        adapter: as in `__call__`.
        """
        head = self.head().astype(hidden.dtype)
        logits = jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)
        if self.rows is not None and adapter is not None:
            for own in self.rows.get("head", {}).values():
                logits = own_rows.with_own(logits, hidden, own, adapter)
        return logits


def _norm(config: TransformerConfig, weight: jax.Array) -> jax.Array:
    """The factor of a norm: its weight, or in Gemma 1 + its weight."""
    return weight + config.norm_offset if config.norm_offset else weight
