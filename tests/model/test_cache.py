"""The KV cache: its dtype by default, and that a step of decoding on a CPU leaves it where it is."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from ar_unified.model.cache import init_cache
from ar_unified.model.decoded import unstacked
from ar_unified.model.transformer import Transformer, init
from ar_unified.planning.targets import parse_target
from tests.kernels.topologies import TPUS, needs_libtpu
from tests.training.tiny import MODEL

BFLOAT16 = dataclasses.replace(MODEL, dtype="bfloat16")


@pytest.mark.parametrize("asked, found", [(None, "float32"), ("bfloat16", "bfloat16"), ("int8", "int8")])
def test_a_cpu_keeps_keys_in_float32_unless_asked(asked, found):
    assert {x.dtype.name for layer in init_cache(BFLOAT16, 2, 8, asked) for x in layer[:2]} == {found}


@needs_libtpu
def test_a_tpu_keeps_them_in_the_compute_dtype():
    with jax.set_mesh(parse_target(TPUS["v5e"]).mesh(dict(data=-1))):
        cache = jax.eval_shape(lambda: init_cache(BFLOAT16, 2, 8))
    assert cache[0][0].dtype == jnp.bfloat16


def test_a_step_on_a_cpu_converts_no_cache():
    """In bfloat16 jaxlib 0.10 converts all keys and values to read them, and twice more to write one of each row."""
    params = jax.eval_shape(lambda: unstacked(BFLOAT16, init(BFLOAT16, jax.random.key(0))))

    def step(params, cache, token, start):
        hidden, cache = Transformer.bind(BFLOAT16, params).extend(token, cache, start)
        return Transformer.bind(BFLOAT16, params).logits(hidden[:, 0]).argmax(-1), cache

    def converted(dtype):
        cache = jax.eval_shape(lambda: init_cache(BFLOAT16, 4, 48, dtype))
        start = jax.ShapeDtypeStruct((4,), jnp.int32)
        token = jax.ShapeDtypeStruct((4, 1), jnp.int32)
        text = jax.jit(step, donate_argnums=1).lower(params, cache, token, start).compile().as_text()
        shape = ",".join(map(str, cache[0][0].shape))
        return re.findall(rf"(?:f32|bf16)\[{shape}\]\S* convert\(", text or "")

    assert not converted(None)
    assert converted("bfloat16") or jax.__version_info__ >= (0, 12)
