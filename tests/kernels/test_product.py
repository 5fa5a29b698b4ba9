import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.kernels import device
from ar_unified.kernels.product import product

AXES = "BTI,IO->BTO"


def arrays(dtype):
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((2, 24, 64), (64, 48))))
    return a.astype(dtype), b.astype(dtype)


def made(a, b):
    """The dtype of the product itself, before it is rounded."""
    jaxpr = jax.make_jaxpr(lambda a, b: product(AXES, a, b))(a, b)
    (dot,) = [each for each in jaxpr.jaxpr.eqns if each.primitive.name == "dot_general"]
    return dot.outvars[0].aval.dtype


def test_bfloat16_is_the_exact_product_rounded_once():
    a, b = arrays(jnp.bfloat16)
    out = jax.jit(lambda a, b: product(AXES, a, b))(a, b)
    assert out.dtype == jnp.bfloat16
    exact = np.einsum(AXES, np.asarray(a, np.float64), np.asarray(b, np.float64))
    # Half a unit in the last of bfloat16's 8 bits, plus the error of sums of 64 float32 products.
    assert np.all(np.abs(np.asarray(out, np.float64) - exact) <= np.abs(exact) * 2**-8 + 1e-5)


def test_a_cpu_makes_bfloat16_into_float32_and_others_make_what_is_asked_for(monkeypatch):
    a, b = arrays(jnp.bfloat16)
    assert made(a, b) == jnp.float32
    assert made(*arrays(jnp.float32)) == jnp.float32
    for platform in ("tpu", "gpu"):
        monkeypatch.setattr(device, "current", lambda platform=platform: device.Device(platform, "any"))
        assert made(a, b) == jnp.bfloat16


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_gradients_are_those_of_einsum(dtype):
    a, b = arrays(dtype)

    def gradients(function):
        return jax.grad(lambda a, b: function(AXES, a, b).astype(jnp.float32).sum(), (0, 1))(a, b)

    for ours, theirs in zip(gradients(product), gradients(jnp.einsum), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=2**-7)
