"""The shape of a transformer: one frozen dataclass, and the presets by name.

The presets of published systems give only their architecture. The experiment chooses the dropout for training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ar_unified.errors import nearest
from ar_unified.kernels.attention import OUT
from ar_unified.kernels.backend import BACKENDS
from ar_unified.manifests import Json
from ar_unified.model.remat import INPUT, POLICIES


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer; hashable, so it may be a static argument of `jax.jit`.

    Attributes:
      vocab_size: V, the number of ids in the vocabulary, including reserved ones.
      d_model, n_layers: D, the width of the hidden states, and L, the number of layers.
      n_heads, n_kv_heads, head_dim: N query heads, K KV heads and the width H of a head. K divides N. H is even,
            because RoPE turns pairs of values.
      d_mlp: F, the width of SwiGLU.
      rope_theta: base of the RoPE wavelengths.
      norm_eps: added under the root in every norm, including QK-norm.
      norm_placement: "pre": x + f(norm(x));  "swin": x + norm(f(x)) (Chameleon-34B). Both have a final norm.
      rope_scaling: "linear" or "llama3": how rope_factor stretches the wavelengths for longer texts (model/rope.py,
        which explains rope_low, rope_high and rope_original_length); "none": no change.
      norm_offset: added to the weights of each norm in the residual stream; 1 in Gemma.
      qk_norm: the norm of queries and keys over head_dim, before RoPE. "layernorm" has a bias.
      qk_norm_per_head: whether each head has its own weights for QK-norm. If not, all heads share one set.
      qkv_bias: whether the projections to queries, keys and values have a bias.
      activation: the function of the MLP's gate; gelu_tanh is the tanh approximation of GELU.
      embedding_scale: token vectors are multiplied by it; sqrt(D) in Gemma.
      tie_embeddings: whether the output head is the embedding table.
      dropout: rate on the embeddings and on the output of each residual branch; active only with a dropout key.
      dtype: the dtype of matrix products and activations. Parameters, norms, softmax and RoPE angles are float32.
      scan_layers: compile one layer for all layers (short compile times, TPU); False unrolls them (faster on CPU).
      remat: which results of a layer are kept for backward and which are computed again: a name in model/remat.py's
        POLICIES, from "none", which keeps everything, to "offload", which leaves the least on the device.
      attention: a backend of kernels/backend.py; "auto": the device's own kernel, or XLA if there is none.
      context: only used if the mesh's context axis splits rows. "gather" collects a layer's keys and values on each
        device and waits least; "ring" passes them round, for rows with more keys than fit in memory.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    norm_placement: str = "pre"
    qk_norm: str = "none"
    qk_norm_per_head: bool = False
    qkv_bias: bool = False
    activation: str = "silu"
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_original_length: int = 0
    tie_embeddings: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "auto"
    context: str = "gather"

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            if (found := getattr(self, field)) not in choices:
                near = nearest(found, choices)
                raise ValueError(f"model.{field}: expected one of {', '.join(choices)}; found {found!r}{near}")
        for field in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}: expected at least 1; found {getattr(self, field)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_kv_heads: expected a divisor of n_heads = {self.n_heads}; found {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim: expected an even number (RoPE); found {self.head_dim}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout: expected a rate in [0, 1); found {self.dropout}")
        if self.rope_scaling == "llama3" and not (0 < self.rope_low < self.rope_high and self.rope_original_length > 0):
            raise ValueError(
                "model.rope_scaling: llama3 expects 0 < rope_low < rope_high and a rope_original_length, found "
                f"{self.rope_low}, {self.rope_high} and {self.rope_original_length}"
            )
        self._require_used()
        for field in ("rope_theta", "norm_eps", "embedding_scale", "rope_factor"):
            if not getattr(self, field) > 0:
                raise ValueError(f"model.{field}: expected more than 0; found {getattr(self, field)}")

    def _require_used(self) -> None:
        """Raises ValueError for a field that is set but has no effect without another field."""
        read = _ROPE[self.rope_scaling]
        idle = {name: f"rope_scaling {self.rope_scaling!r}" for name in _ROPE["llama3"] if name not in read}
        if self.qk_norm == "none":
            idle["qk_norm_per_head"] = "qk_norm 'none'"
        for name, why in idle.items():
            if (found := getattr(self, name)) != (default := getattr(type(self), name)):
                raise ValueError(f"model.{name}: expected {default} with {why}, which ignores {name}; found {found}")


_ROPE: dict[str, tuple[str, ...]] = {  # the fields that each rope_scaling uses
    "none": (),
    "linear": ("rope_factor",),
    "llama3": ("rope_factor", "rope_low", "rope_high", "rope_original_length"),
}
CHOICES = {
    "norm_placement": ("pre", "swin"),
    "qk_norm": ("none", "layernorm", "rmsnorm"),
    "activation": ("silu", "gelu_tanh"),
    "rope_scaling": tuple(_ROPE),
    "dtype": ("float32", "bfloat16"),
    "remat": tuple(POLICIES),
    "attention": BACKENDS,
    "context": ("gather", "ring"),
}

# These are chosen for a training or a machine. The same weights are valid with any value.
_RUNTIME = ("dropout", "scan_layers", "remat", "attention", "context", "dtype")


def decisive(config: TransformerConfig) -> dict[str, Json]:
    """The fields that the weights depend on. A bundle or an imported model has all of them."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _RUNTIME}


def _sizes(
    d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, head_dim: int, d_mlp: int, **more: object
) -> dict:
    return dict(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, d_mlp=d_mlp
    ) | more  # fmt: skip


_BIG: dict[str, Any] = dict(dtype="bfloat16", scan_layers=True, remat="full")
_CHAMELEON: dict[str, Any] = dict(vocab_size=65536, qk_norm="layernorm", qk_norm_per_head=True, **_BIG)
_7B, _34B = (4096, 32, 32, 32, 128, 11008), (8192, 48, 64, 8, 128, 22016)  # Chameleon's sizes; _7B is Llama's too
_QWEN: dict[str, Json] = dict(rope_theta=1e6, norm_eps=1e-6, **_BIG)
_QWEN2_5_1_5B = _sizes(1536, 28, 12, 2, 128, 8960, qkv_bias=True, tie_embeddings=True, **_QWEN)
_QWEN2_5_7B = _sizes(3584, 28, 28, 4, 128, 18944, qkv_bias=True, **_QWEN)
_GEMMA: dict[str, Json] = dict(activation="gelu_tanh", norm_offset=1.0, norm_eps=1e-6, tie_embeddings=True, **_BIG)
_GEMMA_7B = _sizes(3072, 28, 16, 16, 256, 24576, embedding_scale=3072**0.5, **_GEMMA)

# Presets of published systems have the size of the published vocabulary; `config_from` replaces it by yours.
PRESETS: dict[str, dict[str, Any]] = {
    # Ours, named after the number of parameters in their layers. The CPU benchmark uses 25m.
    "debug": _sizes(32, 2, 4, 2, 8, 64),
    "2m": _sizes(192, 4, 6, 6, 32, 512, qk_norm="rmsnorm", tie_embeddings=True),
    "5m": _sizes(256, 6, 8, 8, 32, 704, qk_norm="rmsnorm", tie_embeddings=True),
    "25m": _sizes(512, 8, 8, 8, 64, 1408, tie_embeddings=True),
    "125m": _sizes(768, 12, 12, 12, 64, 2048, qk_norm="rmsnorm", dtype="bfloat16"),
    "350m": _sizes(1024, 24, 16, 16, 64, 2816, qk_norm="rmsnorm", **_BIG),
    "1b": _sizes(2048, 20, 16, 8, 128, 5632, qk_norm="rmsnorm", **_BIG),
    # Chameleon and Anole (arXiv 2405.09818; facebookresearch/chameleon): QK-norm has a vector for each head, as in the
    # files of transformers. Lumina-mGPT (Alpha-VLLM/Lumina-mGPT) has a vector for each shard of Chameleon's
    # training: the 7B has one, and the 34B has four, each for 16 heads.
    "chameleon_7b": _sizes(*_7B, **_CHAMELEON),
    "chameleon_34b": _sizes(*_34B, norm_placement="swin", **_CHAMELEON),
    "lumina_mgpt_7b": _sizes(*_7B, **_CHAMELEON | dict(qk_norm_per_head=False)),
    "lumina_mgpt_34b": _sizes(*_34B, norm_placement="swin", **_CHAMELEON),
    # Emu3 (baaivision/Emu3, configuration_emu3.py). Emu3.5 has the shape of Qwen3-32B; the theta and eps here are
    # Qwen3-32B's too.
    "emu3_8b": _sizes(4096, 32, 32, 8, 128, 14336, vocab_size=184622, rope_theta=1e6, **_BIG),
    "emu3_5_34b": _sizes(5120, 64, 64, 8, 128, 25600, vocab_size=282926, qk_norm="rmsnorm", **_QWEN),
    # LWM-7B (LargeWorldModel/LWM): its text and vision tables (32,000 + 8,448) are joined into one vocabulary.
    "lwm_7b": _sizes(*_7B, vocab_size=40448, rope_theta=5e7, norm_eps=1e-6, **_BIG),
    # Text only, from each model's config.json for transformers and the model builders of pytorch/torchtune.
    "llama3_8b": _sizes(4096, 32, 32, 8, 128, 14336, vocab_size=128256, rope_theta=5e5, **_BIG),
    "qwen2_5_1_5b": _QWEN2_5_1_5B | dict(vocab_size=151936),
    "qwen2_5_7b": _QWEN2_5_7B | dict(vocab_size=152064),
    "qwen3_8b": _sizes(4096, 36, 32, 8, 128, 12288, vocab_size=151936, qk_norm="rmsnorm", **_QWEN),
    "gemma_7b": _GEMMA_7B | dict(vocab_size=256000),
    # Liquid (FoundationVision/Liquid) is Gemma with 8,192 image codes. SimpleAR and Tar are Qwen2.5 with its table cut
    # to the 151,665 tokens that exist. SimpleAR adds 7 marks and 64,000 codes (wdrink/SimpleAR, simpar/train/train.py);
    # Tar adds 5 marks and 65,536 codes (csuhan/Tar, llava/model/llava_arch.py).
    "liquid_7b": _GEMMA_7B | dict(vocab_size=264192),
    "simplear_1_5b": _QWEN2_5_1_5B | dict(vocab_size=215672),
    "tar_1_5b": _QWEN2_5_1_5B | dict(vocab_size=217206),
    "tar_7b": _QWEN2_5_7B | dict(vocab_size=217206),
}


def config_from(
    preset: str | Mapping[str, object], vocab_size: int | None = None, **overrides: object
) -> TransformerConfig:
    """Makes a config from a preset's name or from a mapping of fields. The mapping may also name a `preset`.
    `overrides` replace fields.

    `vocab_size` may be None only if the preset has one. Raises ValueError for an unknown preset, an unknown field or a
    value out of range.
    """
    fields: dict[str, Any] = {"preset": preset} if isinstance(preset, str) else dict(preset)
    name = fields.pop("preset", None)
    if name is not None and name not in PRESETS:
        raise ValueError(f"model preset: expected one of {', '.join(PRESETS)}; found {name!r}")
    fields = (PRESETS[name] if name else {}) | fields | overrides
    if vocab_size is not None:
        fields["vocab_size"] = vocab_size
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"model: unknown field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}")
    required = {f.name for f in dataclasses.fields(TransformerConfig) if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(fields)):
        raise ValueError(f"model: neither the preset nor the config gives {', '.join(missing)}")
    return TransformerConfig(**fields)


def layer_matrices(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each matrix of a layer, by the name of the matrix."""
    D, N, K, F = (config.d_model, *(n * config.head_dim for n in (config.n_heads, config.n_kv_heads)), config.d_mlp)
    return {
        "query": (D, N), "key": (D, K), "value": (D, K), "output": (N, D), "gate": (D, F), "up": (D, F), "down": (F, D),
    }  # fmt: skip


def summed(name: str) -> tuple[int, ...]:
    """The axes that a product sums over, in the stacked matrices that are called `name`."""
    return (1, 2) if name == "output" else (1,)


def offloaded_bytes(config: TransformerConfig) -> int:
    """Bytes that `remat` sends to the host's memory per token, over all layers."""
    policy = POLICIES[config.remat]
    if policy is None:
        return 0
    widths = {name: columns for name, (_, columns) in layer_matrices(config).items()}
    widths |= {INPUT: config.d_model, OUT: config.n_heads * config.head_dim}
    return config.n_layers * sum(widths[name] for name in policy.offloaded) * jnp.dtype(config.dtype).itemsize


def matmul_parameters(config: TransformerConfig) -> tuple[int, int]:
    """The numbers of weights that a token is multiplied with: (in all layers, in the head). The embedding table and the
    norms do not count."""
    layer = sum(rows * columns for rows, columns in layer_matrices(config).values())
    return config.n_layers * layer, config.vocab_size * config.d_model


def parameter_count(config: TransformerConfig, *, embedding: bool = True) -> int:
    """The number of parameters, by formula. `embedding=False` leaves out the embedding table; a tied table still counts
    as the head.

    With embedding=False, 6 * parameters * tokens estimates the matrix FLOPs of a training step.
    """
    c = config
    heads = (c.n_heads + c.n_kv_heads) if c.qk_norm_per_head else 2
    norms = {"none": 0, "rmsnorm": 1, "layernorm": 2}[c.qk_norm] * heads * c.head_dim + 2 * c.d_model
    norms += (c.n_heads + 2 * c.n_kv_heads) * c.head_dim * c.qkv_bias
    tables = 1 if c.tie_embeddings or not embedding else 2
    layers, head = matmul_parameters(c)
    return layers + tables * head + c.n_layers * norms + c.d_model
