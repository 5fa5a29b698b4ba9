"""Reads a transformer's shape from a config.json of transformers, in old and new spellings, and writes it.

One reader serves all systems; a `Family` says how a system differs. A setting that our transformer does not compute is
refused, and the error names its key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ar_unified.errors import UserError
from ar_unified.manifests import Json
from ar_unified.model.config import TransformerConfig

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Keys that must have these values; any other value changes what is computed.
_ONLY = {
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0),
    "pretraining_tp": (None, 1),
    "parallel_residual": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
}


@dataclass(frozen=True)
class Family:
    """What a model class of the library transformers assumes without stating it in its configs.

    Attributes:
        model_type, architecture: the values of these keys in an exported config.json.
        fields: the fields of TransformerConfig that the class fixes.
        act: the key of the activation in a config.json.
        defaults: the values of keys that files may leave out.
        qkv_bias: whether queries, keys and values always have biases (Qwen2, which has no key attention_bias).
        scaled: whether the embedding is multiplied by the square root of D.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, Json] = field(default_factory=dict)
    act: str = "hidden_act"
    defaults: Mapping[str, Json] = field(default_factory=dict)
    qkv_bias: bool = False
    scaled: bool = False


LLAMA = Family("llama", "LlamaForCausalLM", defaults={"rms_norm_eps": 1e-6, "rope_theta": 1e4})
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    {"qkv_bias": True},
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 1e4},
    qkv_bias=True,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    {"qk_norm": "rmsnorm"},
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 1e4, "head_dim": 128},
)
GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    {"norm_offset": 1.0, "activation": "gelu_tanh"},
    act="hidden_activation",
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 1e4, "head_dim": 256, "tie_word_embeddings": True},
    scaled=True,
)


def read(config: Mapping[str, Any], family: Family, where: str, **fields: Any) -> TransformerConfig:
    """The transformer that a config.json describes.

    Args:
        config: the keys of the language model, as in the file.
        where: the file, for messages.
        fields: values for fields of TransformerConfig; they replace what the file says.

    Raises UserError for a missing key, and for a setting that our transformer does not compute, with its key and value.
    """

    def wrong(key: str, expected: str) -> UserError:
        return UserError(f"{where}: {key}: expected {expected}, found {config.get(key)!r:.80}")

    def number(key: str, kind: type = int) -> Any:
        value = config.get(key, family.defaults.get(key))
        if type(value) not in (kind, int) or not 0 < value < math.inf:
            raise wrong(key, "a number above 0")
        return kind(value)

    sizes = {key: number(key) for key in _SIZES}
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    kv_heads = number("num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    given = config.get("head_dim", family.defaults.get("head_dim"))
    head_dim = number("head_dim") if given is not None else width // heads
    if given is None and width % heads:
        raise wrong("hidden_size", f"a multiple of num_attention_heads = {heads}")
    if head_dim % 2:
        raise UserError(f"{where}: head_dim: expected an even number, because RoPE rotates pairs; found {head_dim}")
    for key, allowed in _ONLY.items():
        if key == "sliding_window" and config.get("use_sliding_window") is False:
            continue
        if config.get(key) not in allowed:
            raise wrong(key, f"{' or '.join(map(repr, allowed))}, which is all that this transformer computes")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise wrong("layer_types", "full_attention alone, the only type that this transformer computes")
    if config.get("attention_bias") and not family.qkv_bias:
        raise wrong("attention_bias", "False, because biases of the output projection are not computed")
    act = config.get(family.act) or config.get("hidden_act")
    if family.act == "hidden_activation" and act == "gelu":
        act = "gelu_pytorch_tanh"  # Gemma's class treats "gelu" as this function
    if act is not None and act not in _ACTIVATIONS:
        raise wrong(family.act, f"one of {', '.join(_ACTIVATIONS)}")
    found: dict[str, Any] = dict(
        vocab_size=sizes["vocab_size"],
        d_model=width,
        n_layers=sizes["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        d_mlp=sizes["intermediate_size"],
        norm_eps=number("rms_norm_eps", float),
        tie_embeddings=bool(config.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings", False))),
        **_rope(config, family, where),
    )
    if act is not None:
        found["activation"] = _ACTIVATIONS[act]
    if family.scaled:
        found["embedding_scale"] = math.sqrt(width)
    try:
        return TransformerConfig(**found | dict(family.fields) | fields)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _rope(config: Mapping[str, Json], family: Family, where: str) -> dict[str, Json]:
    """RoPE's base and scaling, from `rope_theta` and `rope_scaling` of older files or `rope_parameters` of newer
    ones."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"{where}: {key}: expected one set of keys and values for all layers; found {rope!r:.80}")
    if rope.get("partial_rotary_factor") not in _ONLY["partial_rotary_factor"]:
        raise UserError(
            f"{where}: {key}.partial_rotary_factor: expected 1, found {rope['partial_rotary_factor']!r:.40}"
        )

    def number(name: str, found: Any) -> float:
        if type(found) not in (int, float) or not 0 < found < math.inf:
            raise UserError(f"{where}: {name}: expected a number above 0, found {found!r:.80}")
        return float(found)

    theta = rope.get("rope_theta", config.get("rope_theta", family.defaults.get("rope_theta")))
    fields: dict[str, Json] = {"rope_theta": number("rope_theta", theta)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return fields
    if kind not in ("linear", "llama3"):
        raise UserError(f"{where}: rope_type: expected default, linear or llama3; found {kind!r:.40}")
    names = {"factor": "rope_factor"}
    if kind == "llama3":
        names |= {"low_freq_factor": "rope_low", "high_freq_factor": "rope_high"}
    fields |= {"rope_scaling": kind} | {ours: number(f"{key}.{name}", rope.get(name)) for name, ours in names.items()}
    if kind == "llama3":
        name = "original_max_position_embeddings"
        fields["rope_original_length"] = int(number(f"{key}.{name}", rope.get(name)))
    return fields


def write(config: TransformerConfig, family: Family, vocab_size: int, dtype: str, **more: Any) -> dict[str, object]:
    """config.json of a transformer, in spellings that old and new versions of transformers read.

    Raises UserError, which names the first field that the family cannot express.
    """
    expected = {
        "norm_placement": "pre",
        "qk_norm": "none",
        "qkv_bias": False,
        "activation": "silu",
        "norm_offset": 0.0,
        "embedding_scale": math.sqrt(config.d_model) if family.scaled else 1.0,
    } | dict(family.fields)
    for name, value in expected.items():
        if (found := getattr(config, name)) != value:
            raise UserError(
                f"model.{name}: expected {value!r}, as in {family.architecture} of transformers; found {found!r}"
            )
    activation = {ours: theirs for theirs, ours in _ACTIVATIONS.items() if theirs != "swish"}[config.activation]
    made: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_mlp,
        "hidden_act": activation,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "torch_dtype": dtype,
    }
    if family.act != "hidden_act":
        made[family.act] = activation
    if config.rope_scaling != "none":
        scaling: dict[str, object] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
        if config.rope_scaling == "llama3":
            scaling |= {
                "low_freq_factor": config.rope_low,
                "high_freq_factor": config.rope_high,
                "original_max_position_embeddings": config.rope_original_length,
            }
        made["rope_scaling"] = scaling
    return made | more
