"""Parameters in the form for decoding: a padded MLP computes the same as before."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.model import decoded
from ar_unified.model.cache import init_cache
from ar_unified.model.lora import LoraConfig
from ar_unified.model.lora import init as init_adapter
from ar_unified.model.transformer import Transformer, init
from ar_unified.parallel.mesh import make_mesh
from tests.training.tiny import MODEL


@pytest.mark.parametrize("weights_dtype", [None, "int8"])
def test_channels_of_zeros_change_nothing(weights_dtype, monkeypatch):
    """The same is true with adapters: row 0 has none, row 1 has one for all matrices."""
    params = init(MODEL, jax.random.key(0))
    adapter = init_adapter(MODEL, LoraConfig(rank=3), jax.random.key(1))
    served = jax.tree.map(lambda x: jnp.stack([0 * x, x + 0.1], axis=1), adapter)

    def extended():
        ready = decoded.unstacked(MODEL, params | {"adapters": served}, weights_dtype)
        model = Transformer.bind(MODEL, ready)
        tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, MODEL.vocab_size)
        hidden, _ = model.extend(tokens, init_cache(MODEL, 2, 8), jnp.zeros(2, jnp.int32), jnp.arange(2))
        return ready["layers"][0]["mlp"]["down"].shape, ready["adapters"][0]["mlp"], hidden

    (before, _, expected) = extended()
    monkeypatch.setattr(decoded, "mlp_width", lambda config: 96)
    (after, pairs, found) = extended()
    assert (before, after) == ((64, 32), (96, 32))
    assert [pairs[name][side].shape for name, side in (("up", "b"), ("down", "a"))] == [(2, 3, 96), (2, 96, 3)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2


def test_what_is_filled_up_already_stays():
    params = init(MODEL, jax.random.key(0))
    ready = decoded.unstacked(MODEL, params)
    jax.tree.map(np.testing.assert_array_equal, decoded.unstacked(MODEL, ready), ready)


def test_only_a_tpu_has_lanes_to_fill(monkeypatch):
    wide = dataclasses.replace(MODEL, d_mlp=11008)
    with jax.set_mesh(make_mesh(dict(data=2, tensor=4))):
        assert decoded.mlp_width(wide) == 11008
        monkeypatch.setattr(decoded.device, "current", lambda: decoded.device.Device("tpu", "TPU v5p"))
        assert decoded.mlp_width(wide) == 4 * 2816  # 2,752 per device are 21.5 lanes
        assert decoded.mlp_width(MODEL) == MODEL.d_mlp, "narrower than the lanes"
    assert decoded.mlp_width(wide) == 11008  # one device: 86 lanes
