"""Shapes in config.json: old and new spellings mean the same, and an unsupported feature is refused by its key."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from ar_unified.errors import UserError
from ar_unified.interop.hf_config import GEMMA, LLAMA, QWEN2, QWEN3, Family, read, write
from ar_unified.model.config import TransformerConfig

OLD: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False,
    "mlp_bias": False, "pretraining_tp": 1, "rope_scaling": None,
}  # fmt: skip
_MOVED = ("rope_theta", "rope_scaling", "torch_dtype")
NEW = {key: value for key, value in OLD.items() if key not in _MOVED} | {
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "dtype": "bfloat16",
    "head_dim": 16,
    "layer_types": ["full_attention"] * 2,
}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_old_and_new_spellings_are_one_shape() -> None:
    expected = TransformerConfig(320, 64, 2, 4, 2, 16, 176, rope_theta=5e5)
    assert read(OLD, LLAMA, "here") == read(NEW, LLAMA, "here") == expected
    least = {key: OLD[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    found = read(least | {"num_attention_heads": 4}, LLAMA, "here")
    assert (found.n_kv_heads, found.head_dim, found.rope_theta, found.norm_eps) == (4, 16, 1e4, 1e-6)


def test_scaled_rope_is_read_in_both_spellings() -> None:
    old = read(OLD | {"rope_scaling": {"type": "llama3", **LLAMA3}}, LLAMA, "here")
    new = read(NEW | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, LLAMA, "here")
    assert old == new and (old.rope_scaling, old.rope_factor, old.rope_original_length) == ("llama3", 8.0, 8192)
    linear = read(OLD | {"rope_scaling": {"type": "linear", "factor": 2.0}}, LLAMA, "here")
    assert (linear.rope_scaling, linear.rope_factor) == ("linear", 2.0)


def test_what_a_class_fixes_needs_no_key() -> None:
    gemma = read(OLD | {"hidden_act": "gelu", "head_dim": 24}, GEMMA, "here")
    assert (gemma.activation, gemma.norm_offset, gemma.embedding_scale) == ("gelu_tanh", 1.0, 8.0)
    assert read({k: v for k, v in OLD.items() if k != "tie_word_embeddings"}, GEMMA, "here").tie_embeddings
    assert read(OLD | {"sliding_window": 4096, "use_sliding_window": False}, QWEN2, "here").qkv_bias
    assert read(OLD, QWEN3, "here").qk_norm == "rmsnorm" and read(OLD, QWEN3, "here").head_dim == 128


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_size": 66, "num_attention_heads": 4}, "hidden_size: expected a multiple of num_attention_heads = 4"),
        ({"head_dim": 15}, "head_dim: expected an even number"),
        ({"num_key_value_heads": 3}, "n_kv_heads: expected a divisor of n_heads = 4"),
        ({"vocab_size": None}, "vocab_size: expected a number above 0, found None"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a number above 0, found True"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps: expected a number above 0, found nan"),
        ({"attention_bias": True}, "attention_bias: expected False"),
        ({"mlp_bias": True}, "mlp_bias: expected False"),
        ({"sliding_window": 4096}, "sliding_window: expected None"),
        ({"use_sliding_window": True}, "use_sliding_window: expected False"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types: expected full_attention alone"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: expected None"),
        ({"num_local_experts": 8}, "num_local_experts: expected None or 0 or 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "expected one set of keys and values for all layers",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: expected default, linear or llama3"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number above 0, found None"),
        ({"rope_scaling": [1.0]}, "rope_scaling: expected one set of keys and values"),
        ({"rope_theta": -1.0}, "rope_theta: expected a number above 0, found -1.0"),
        ({"hidden_act": "relu"}, "hidden_act: expected one of silu"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(OLD | changes, LLAMA, "here")
    assert str(caught.value).startswith("here: ") and said in str(caught.value)


@pytest.mark.parametrize("family", [LLAMA, QWEN2, QWEN3, GEMMA])
def test_what_is_written_is_read_as_the_same_shape(family: Family) -> None:
    config = read(OLD | {"head_dim": 24, "hidden_act": "gelu" if family is GEMMA else "silu"}, family, "here")
    if family is LLAMA:
        config = dataclasses.replace(
            config, rope_scaling="llama3", rope_factor=8.0, rope_original_length=8192, tie_embeddings=True
        )
    assert read(write(config, family, 320, "bfloat16"), family, "there") == config


@pytest.mark.parametrize(
    "changes, family, said",
    [
        ({"qk_norm": "rmsnorm"}, LLAMA, "model.qk_norm: expected 'none', as in LlamaForCausalLM of transformers"),
        ({"norm_placement": "swin"}, LLAMA, "model.norm_placement: expected 'pre', as in LlamaForCausalLM"),
        ({"qk_norm": "none"}, QWEN3, "model.qk_norm: expected 'rmsnorm', as in Qwen3ForCausalLM of transformers"),
        ({"activation": "gelu_tanh"}, LLAMA, "model.activation: expected 'silu', as in LlamaForCausalLM"),
        ({"embedding_scale": 2.0}, LLAMA, "model.embedding_scale"),
    ],
)
def test_what_a_class_cannot_express_is_named(changes: dict[str, Any], family: Family, said: str) -> None:
    config = dataclasses.replace(read(OLD, family, "here"), **changes)
    with pytest.raises(UserError) as caught:
        write(config, family, 320, "bfloat16")
    assert said in str(caught.value)
