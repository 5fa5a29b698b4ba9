"""Adapters in the sampler: with a cache, and several for one model, so that each row uses its own."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.interop.peft import Adapter
from ar_unified.model.cache import init_cache
from ar_unified.model.config import config_from
from ar_unified.model.decoded import unstacked
from ar_unified.model.lora import MATRICES, LoraConfig, init, merged
from ar_unified.model.transformer import Transformer, logical_axes
from ar_unified.model.transformer import init as init_model
from ar_unified.sampling.low_rank import beside
from tests import adapters

CONFIG = config_from("debug", vocab_size=48, qk_norm="rmsnorm")
LORAS = LoraConfig(rank=3, alpha=6.0), LoraConfig(rank=2, alpha=2.0, targets=("attention.value", "mlp.down"))
DRAWN = [adapters.drawn(CONFIG, lora, seed) for seed, lora in enumerate(LORAS)]


def served(params):
    found = []
    for lora, drawn in zip(LORAS, DRAWN, strict=True):
        pairs = {path: (drawn[path.split(".")[0]][path.split(".")[1]]) for path in lora.matrices}
        scales = {path: (lora.scale_of(path),) * CONFIG.n_layers for path in pairs}
        ranks = {path: (lora.rank,) * CONFIG.n_layers for path in pairs}
        matrices = {path: (pair["a"], pair["b"]) for path, pair in pairs.items()}
        found.append(Adapter(Path("a"), matrices, ranks, scales, ""))
    return params | {"adapters": beside(CONFIG, params, found, None)}


def test_forward_prefill_and_decode_are_those_of_the_merged_models() -> None:
    params = jax.device_get(jax.jit(init_model, static_argnums=0)(CONFIG, jax.random.key(0)))
    rows, T = 4, 12
    which = jnp.asarray([0, 1, 2, 1])
    tokens = jax.random.randint(jax.random.key(1), (rows, T), 0, 48)
    positions, zeros = jnp.broadcast_to(jnp.arange(T), (rows, T)), jnp.zeros((rows, T), jnp.int32)

    @jax.jit
    def whole(params):
        return Transformer.bind(CONFIG, params)(tokens, positions, zeros)

    alone = [whole(params), *(whole(merged(lora, params | {"lora": d})) for lora, d in zip(LORAS, DRAWN, strict=True))]
    expected = np.stack([alone[n][row] for row, n in enumerate(which)])
    several = served(params)

    @jax.jit
    def forward(params):
        return Transformer.bind(CONFIG, params)(tokens, positions, zeros, adapter=which)

    @jax.jit
    def in_pieces(params):
        model = Transformer.bind(CONFIG, unstacked(CONFIG, params))
        first, cache = model.extend(tokens[:, : T - 1], init_cache(CONFIG, rows, 64), jnp.zeros(rows, jnp.int32), which)
        last, _ = model.extend(tokens[:, T - 1 :], cache, jnp.full(rows, T - 1), which)
        return jnp.concatenate([first, last], axis=1)

    for run in (forward, in_pieces):
        np.testing.assert_allclose(run(several), expected, rtol=1e-5, atol=1e-5)
    assert min(np.abs(alone[n] - alone[0]).max() for n in (1, 2)) > 0.1, "an adapter that does nothing"
    axes = logical_axes(several)["adapters"]["mlp"]["down"]
    assert axes == {"a": ("layers", None, "mlp", None), "b": ("layers", None, None, "embed")}


def test_a_fresh_adapter_begins_as_pefts_and_changes_nothing() -> None:
    lora = LoraConfig(rank=4)
    made = jax.device_get(init(CONFIG, lora, jax.random.key(0)))
    for path in MATRICES:
        group, name = path.split(".")
        a, b = made[group][name]["a"], made[group][name]["b"]
        bound = a.shape[1] ** -0.5
        assert not b.any() and 0.9 * bound < np.abs(a).max() <= bound, "Kaiming's bound for a = sqrt(5)"
        assert abs(a.std() - bound / 3**0.5) < 0.15 * bound and len(np.unique(a)) > 0.9 * a.size
    assert LoraConfig(rank=4, alpha=8.0, rslora=True).scale_of("mlp.up") == 4.0
    several = LoraConfig(rank=4, alpha=8.0, ranks=("mlp=2", "mlp.up=16"), alphas=("attention.*=1",))
    assert [several.rank_of(path) for path in ("attention.key", "mlp.gate", "mlp.up")] == [4, 2, 16]
    assert [several.scale_of(path) for path in ("attention.key", "mlp.gate", "mlp.up")] == [0.25, 4.0, 0.5]
    shapes = jax.eval_shape(lambda: init(CONFIG, several, jax.random.key(0)))
    assert shapes["mlp"]["up"]["b"].shape[1] == 16 and shapes["mlp"]["down"]["a"].shape[2] == 2
    assert LoraConfig(rank=1, targets=("layers.attention.query", "*.up")).matrices == ("attention.query", "mlp.up")
