"""QK-norm with RoPE: values and gradients equal those of the plain formula, and few residuals are kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ar_unified.kernels.qk_norm_rope import qk_norm_rope
from ar_unified.planning.targets import parse_target
from tests.kernels.topologies import TPUS, needs_libtpu

B, T, N, H, EPS = 2, 5, 3, 8, 1e-3


def plain(x, rope, scale=None, bias=None):
    if bias is not None:
        x = x - x.mean(-1, keepdims=True)
    if scale is not None:
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale
    x = x if bias is None else x + bias
    cos, sin = (r[..., H // 2 :] for r in rope)
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.fixture(params=["none", "rmsnorm", "layernorm"])
def arguments(request):
    keys = jax.random.split(jax.random.key(0), 4)
    angles = jax.random.uniform(keys[0], (B, T, 1, H // 2)) * 6
    weights = [1 + jax.random.normal(keys[1], (H,)), jax.random.normal(keys[2], (H,))]
    used = weights[: ["none", "rmsnorm", "layernorm"].index(request.param)]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    rope = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    return jax.random.normal(keys[3], (B, T, N, H)), rope, used


@pytest.mark.parametrize("way", ["default", "tpu"])
def test_values_and_gradients_are_those_of_the_plain_formula(arguments, way, monkeypatch):
    x, rope, weights = arguments
    # A CPU can compute both ways, so the test chooses one.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, **ways: ways[way](x))
    bar = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def run(function):
        out, pull = jax.vjp(lambda x, weights: function(x, rope, *weights), x, weights)
        return out, pull(bar)

    found = run(lambda *a: qk_norm_rope(*a, eps=EPS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, run(plain))


def test_backward_keeps_the_input_as_it_came_and_one_number_a_head(arguments):
    x, rope, weights = arguments
    x = x.astype(jnp.bfloat16)
    pull = jax.eval_shape(
        lambda x, weights: jax.vjp(lambda *a: qk_norm_rope(a[0], rope, *a[1]), x, weights)[1], x, weights
    )
    large = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > x.size // H and leaf.shape[-2] != 1]
    assert [(leaf.shape, leaf.dtype) for leaf in large] == [(x.shape, jnp.bfloat16)] * bool(weights)
    assert qk_norm_rope(x, rope, *weights).dtype == jnp.bfloat16


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", ["v5p", "v6e"])
def test_on_a_tpu_no_padded_or_widened_copies_are_made(name):
    """Queries have the size of chameleon_7b's. The temporaries of the program that libtpu compiles are compared with
    the bytes that must be read and written."""
    mesh = parse_target(TPUS[name]).mesh(dict(data=-1))
    shape = 2, 4096, 32, 128

    def array(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P()))

    x, rope = array(jnp.bfloat16, *shape), (array(jnp.float32, 2, 4096, 1, 128),) * 2
    weights = [array(jnp.float32, 128)] * 2

    def backward(x, rope, weights, bar):
        return jax.vjp(lambda x, weights: qk_norm_rope(x, rope, *weights), x, weights)[1](bar)

    def both(x, rope, weights, bar):
        return qk_norm_rope(x, rope, *weights), backward(x, rope, weights, bar)

    size = 2 * np.prod(shape)
    programs = {
        qk_norm_rope: ((x, rope, *weights), 2),
        backward: ((x, rope, weights, x), 3),
        both: ((x, rope, weights, x), 5),
    }
    for function, (arguments, touched) in programs.items():
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 1.2 * touched * size
        # Includes the reads of a second pass for the sums, and copies into the layout of this test's arguments.
        assert compiled.cost_analysis()["bytes accessed"] <= 6 * touched * size
