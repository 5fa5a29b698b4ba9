"""transformers' stored results for small random weights, compared with ours for the same tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ar_unified.interop import hf_config
from ar_unified.interop.hf_config import GEMMA, LLAMA, QWEN2, QWEN3, Family
from ar_unified.interop.keys import HF, Keys
from ar_unified.language.border import Border
from ar_unified.model.cache import init_cache
from ar_unified.model.config import TransformerConfig
from ar_unified.model.decoded import unstacked
from ar_unified.model.transformer import Params, Transformer
from tests.sources import ROOT

VECTORS = ROOT.parent / "shared" / "vectors"
pytestmark = pytest.mark.skipif(not VECTORS.exists(), reason="the reference vectors are not beside this repository")
SIZES = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
CHAMELEON = dict(qk_norm="layernorm", qk_norm_per_head=True)
SYSTEMS: dict[str, tuple[Family, dict[str, Any], dict[str, Any]]] = {
    "ref_llama": (LLAMA, {"rope_theta": 1e6}, {}),
    "ref_qwen2": (QWEN2, {"rms_norm_eps": 1e-6}, {}),
    "ref_qwen3": (QWEN3, {"head_dim": 24, "rms_norm_eps": 1e-6, "rope_theta": 1e6}, {}),
    "ref_gemma": (GEMMA, {"head_dim": 24, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh"}, {}),
    "ref_cham_pre_eq": (LLAMA, {}, CHAMELEON),
    "ref_cham_pre_ph": (LLAMA, {}, CHAMELEON),
    "ref_cham_swin_eq": (LLAMA, {}, CHAMELEON | {"norm_placement": "swin"}),
}


def read(name: str) -> tuple[Keys, Params, dict[str, np.ndarray]]:
    family, changes, fields = SYSTEMS[name]
    config = hf_config.read(SIZES | changes, family, name, **fields)
    tensors = load_file(VECTORS / f"{name}.safetensors")
    groups = (4, 2) if config.qk_norm_per_head else (0, 0)
    keys = Keys(HF, config, Border(((0, 0, 256),)), qk_groups=groups)
    layers: dict[str, list[np.ndarray]] = {}
    for slot in keys.slots():
        theirs = [tensors[key] for key in slot.names]
        assert tuple(array.shape for array in theirs) == slot.shapes, slot
        layers.setdefault(slot.leaf, []).append(keys.to_ours(slot, theirs))
    params: Params = {}
    for leaf, parts in layers.items():
        *parents, last = leaf.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.stack(parts) if parents[:1] == ["layers"] else parts[0]
    return keys, params, dict(np.load(VECTORS / f"{name}.npz"))


def forward(config: TransformerConfig, params: Params, ids: np.ndarray) -> tuple[jax.Array, jax.Array]:
    @jax.jit
    def run(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = Transformer.bind(config, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model(tokens, positions, jnp.zeros_like(tokens))
        return hidden, model.logits(hidden)

    return run(params, jnp.asarray(ids, jnp.int32))


@pytest.mark.parametrize("name", SYSTEMS)
def test_hidden_states_and_logits_are_those_of_transformers(name: str) -> None:
    keys, params, want = read(name)
    hidden, logits = forward(keys.config, params, want["ids"])
    np.testing.assert_allclose(hidden, want["hidden"], atol=2e-5)
    np.testing.assert_allclose(logits, want["logits"], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ref_gemma", "ref_qwen2", "ref_cham_pre_ph"])
def test_the_cache_gives_the_same(name: str) -> None:
    keys, params, want = read(name)
    ids = jnp.asarray(want["ids"], jnp.int32)

    @jax.jit
    def step(params: Params, tokens: jax.Array, cache: Any, start: jax.Array) -> Any:
        return Transformer.bind(keys.config, params).extend(tokens, cache, start)

    weights, cache, found = unstacked(keys.config, params), init_cache(keys.config, 2, 200), []
    for begin in range(0, 200, 50):
        hidden, cache = step(weights, ids[:, begin : begin + 50], cache, jnp.full(2, begin))
        found.append(hidden)
    np.testing.assert_allclose(np.concatenate(found, 1), want["hidden"], atol=2e-5)


def test_one_head_s_norm_for_all_is_far_off() -> None:
    keys, params, want = read("ref_cham_pre_ph")
    for name in ("query_norm", "key_norm"):
        norm = params["layers"]["attention"][name]
        params["layers"]["attention"][name] = {key: leaf[:, 0] for key, leaf in norm.items()}
    config = dataclasses.replace(keys.config, qk_norm_per_head=False)
    _, logits = forward(config, params, want["ids"])
    assert np.abs(logits - want["logits"]).max() > 1000 * 5e-5


def test_norms_of_heads_stay_float32_in_bfloat16() -> None:
    keys, params, _ = read("ref_cham_pre_ph")
    layer = unstacked(dataclasses.replace(keys.config, dtype="bfloat16"), params)["layers"][0]["attention"]
    assert layer["query_norm"]["scale"].dtype == np.float32 and layer["query"].dtype == jnp.bfloat16
