"""What holds for every quantiser: codes in range and of one meaning, gradients, sums that add up, codes in use."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ar_tokenizers.image import quantizers
from ar_tokenizers.image.quantizers import FSQ, VQ, codebook, lfq
from ar_tokenizers.image.quantizers.base import rotation
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

K = 64
SETTINGS = {
    "fsq": dict(quantizer="fsq", levels=(5, 4, 3)),
    "ifsq": dict(quantizer="fsq", levels=(5, 4, 3), activation="ifsq"),
    "vq": dict(quantizer="vq", codes=K, entropy=0.01),
    "vq-ema": dict(quantizer="vq", codes=K, update="ema"),
    "vq-rotation": dict(quantizer="vq", codes=K, gradient="rotation"),
    "simvq": dict(quantizer="simvq", codes=K),
    "lfq": dict(quantizer="lfq", codes=K),
    "bsq": dict(quantizer="bsq", codes=K),
    "ibq": dict(quantizer="ibq", codes=K, code_dim=8),
    "rq": dict(quantizer="rq", codes=K, depth=3),
    "rq-ema": dict(quantizer="rq", codes=K, depth=2, update="ema", gradient="rotation"),
}
EVERY = pytest.mark.parametrize("name", SETTINGS)


def make(name: str, seed: int = 0, **changes) -> quantizers.Quantizer:
    return quantizers.make(**SETTINGS[name] | changes, rngs=nnx.Rngs(seed))


def latents(quantizer: quantizers.Quantizer, *shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), (*shape, quantizer.dim))


def params_of(quantizer: quantizers.Quantizer) -> dict:
    return nnx.to_pure_dict(nnx.state(quantizer, nnx.Param))


# ---- what codes mean --------------------------------------------------------------------------------------------


@functools.cache
def passes(name: str):
    """The quantiser, and one compiled function: the training pass, encode, and what codes decode to."""
    quantizer = make(name)
    both = lambda z: (quantizer(z), quantizer.encode(z), quantizer.vectors(quantizer.encode(z)))  # noqa: E731
    return quantizer, jax.jit(both)


@EVERY
@given(st.integers(0, 2**31 - 1), st.floats(-3, 3), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=10, deadline=None)
def test_the_training_pass_has_the_vectors_of_its_codes(name, seed, log_scale, dtype):
    quantizer, both = passes(name)
    z = latents(quantizer, 4, 8, seed=seed, scale=10**log_scale).astype(dtype)
    trained, codes, vectors = both(z)
    assert codes.dtype == jnp.int32 and codes.shape == (4, 8, quantizer.depth)[: 2 + (quantizer.depth > 1)]
    assert 0 <= codes.min() and codes.max() < quantizer.codebook_size
    assert trained.vectors.dtype == jnp.float32 and trained.vectors.shape == z.shape and trained.sums == {}
    np.testing.assert_array_equal(trained.codes, codes)
    np.testing.assert_array_equal(trained.vectors, vectors)
    np.testing.assert_array_equal(both(z.astype(jnp.float32))[1], codes)  # nothing is computed in bfloat16
    assert np.isfinite(trained.loss)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("ibq", "rq", "rq-ema")])
def test_a_vector_is_encoded_as_its_own_code(name):
    quantizer = make(name)
    if isinstance(quantizer, FSQ):  # the vector is what `bound` makes, so it is not bounded again
        encode = quantizer.nearest
    else:
        encode = quantizer.encode
    codes = jnp.arange(quantizer.codebook_size)
    np.testing.assert_array_equal(encode(quantizer.vectors(codes)), codes)


@given(st.lists(st.integers(3, 9), min_size=1, max_size=5).map(tuple), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_fsq_codes_and_vectors_are_one_to_one(levels, seed):
    fsq = FSQ(levels)
    codes = np.random.default_rng(seed).integers(0, fsq.codebook_size, 64)
    codes = jnp.array([0, fsq.codebook_size - 1, *codes], jnp.int32)
    np.testing.assert_array_equal(fsq.nearest(fsq.vectors(codes)), codes)


@pytest.mark.parametrize("activation", ["tanh", "ifsq"])
@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (8, 8, 8, 5, 5, 5), (3, 4, 6, 7)])
def test_fsq_reaches_every_level_and_no_other(levels, activation):
    fsq = FSQ(levels, activation)
    z = jnp.linspace(-20, 20, 4001)[:, None] * jnp.ones(fsq.dim)
    vectors = np.asarray(fsq(z).vectors)
    assert [len(np.unique(vectors[:, c])) for c in range(fsq.dim)] == list(levels)
    np.testing.assert_allclose(fsq.bound(jnp.zeros((1, fsq.dim))), 0, atol=1e-6)  # an untrained latent is on a code
    for dtype in (jnp.float32, jnp.bfloat16):
        codes = fsq.encode((1e4 * jax.random.normal(jax.random.key(0), (999, fsq.dim))).astype(dtype))
        assert codes.dtype == jnp.int32 and 0 <= codes.min() and codes.max() < fsq.codebook_size


def test_ifsq_is_the_sigmoid_of_the_paper():
    z = jnp.linspace(-4, 4, 101)[:, None]
    np.testing.assert_allclose(FSQ((5,), "ifsq").bound(z), 2 * jax.nn.sigmoid(1.6 * z) - 1, atol=1e-6)


def test_rq_takes_the_nearest_code_of_what_is_left():
    rq = make("rq")
    z, table = np.asarray(latents(rq, 50)), np.asarray(rq.codebook[...])
    rest, expected = z.copy(), []
    for _ in range(3):
        expected.append(np.linalg.norm(rest[:, None] - table, axis=-1).argmin(1))
        rest -= table[expected[-1]]
    np.testing.assert_array_equal(rq.encode(z), np.stack(expected, -1))
    np.testing.assert_allclose(rq.vectors(rq.encode(z)), z - rest, atol=1e-5)


# ---- blocks of codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [20, 70, 2**24])
def test_blocks_of_codes_change_nothing(scores, monkeypatch):
    """Search, soft lookup and entropy penalty, with gradients, against the [N, K] scores written out."""
    x, table = jax.random.normal(jax.random.key(0), (5, 2, 6)), jax.random.normal(jax.random.key(1), (17, 6))

    def plain(x, table):
        p = jax.nn.softmax(jnp.einsum("abc,kc->abk", x, table) + codebook.nearness(table))
        entropies = -jnp.sum(p * jnp.log(p), -1)
        mean = p.mean((0, 1))
        q = jax.nn.softmax(jnp.einsum("abc,kc->abk", x, table))
        soft = jnp.einsum("abk,kc->abc", q, jax.lax.stop_gradient(table))
        return jnp.sum(jnp.sin(soft)) + entropies.mean() + jnp.sum(mean * jnp.log(mean))

    def ours(x, table):
        penalty = codebook.entropy_penalty(x, table, codebook.nearness(table))
        return jnp.sum(jnp.sin(codebook.soft_lookup(x, table))) + penalty

    monkeypatch.setattr(codebook, "SCORES", scores)
    with jax.default_matmul_precision("highest"):
        for mine, theirs in zip(
            jax.tree.leaves(jax.jit(jax.value_and_grad(ours, (0, 1)))(x, table)),
            jax.tree.leaves(jax.value_and_grad(plain, (0, 1))(x, table)),
            strict=True,
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    distances = np.linalg.norm(np.asarray(x)[:, :, None] - np.asarray(table), axis=-1)
    np.testing.assert_array_equal(codebook.nearest(x, table, codebook.nearness(table)), distances.argmin(-1))
    np.testing.assert_array_equal(codebook.nearest(x, jnp.zeros((17, 6))), np.zeros((5, 2)))  # a draw: the first


def test_a_large_codebook_makes_no_large_array():
    codes, positions = 2**18, 512
    ibq = nnx.eval_shape(lambda: quantizers.make(quantizer="ibq", codes=codes, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(ibq)

    def loss(state, z):
        found = nnx.merge(graph, state)(z)
        return found.loss + jnp.sum(jnp.square(found.vectors))

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(state, jax.ShapeDtypeStruct((positions, ibq.dim), jnp.float32))
    largest = max(math.prod(v.aval.shape) for v in _variables(program.jaxpr))
    assert largest <= codebook.SCORES < codes * positions


def _variables(program):
    for equation in program.eqns:
        yield from equation.outvars
        for part in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if inner := getattr(part, "jaxpr", part if hasattr(part, "eqns") else None):
                yield from _variables(inner)


def test_the_entropy_of_signs_is_that_of_all_codes():
    """LFQ's factors against a softmax over the 2**5 codes."""
    signs = make("lfq", codes=32, beta=0.0, entropy=1.0)
    z = latents(signs, 40, scale=0.5)
    table = signs.vectors(jnp.arange(32))
    p = jax.nn.softmax(-jnp.sum(jnp.square(z[:, None] - table), -1), -1)
    entropies, mean = -jnp.sum(p * jnp.log(p), -1), p.mean(0)
    np.testing.assert_allclose(signs(z).loss, entropies.mean() + jnp.sum(mean * jnp.log(mean)), rtol=1e-4)
    sure = jax.grad(lambda z: signs(z).loss)(1e4 * z)
    assert np.isfinite(sure).all() and lfq.LFQ(2**18).dim == 18


# ---- gradients --------------------------------------------------------------------------------------------------


@EVERY
def test_gradients_reach_the_latents_and_the_codes_that_learn_by_them(name):
    quantizer = make(name)
    graph, state = nnx.split(quantizer)
    z = latents(quantizer, 2, 3)

    def objective(z, state):
        found = nnx.merge(graph, state)(z)
        return jnp.sum(jnp.sin(found.vectors)) + found.loss

    at_latents, at_params = jax.jit(jax.grad(objective, (0, 1)))(z, state)
    assert float(jnp.abs(at_latents).min()) > 0
    moved = jax.tree.map(lambda g: np.asarray(jnp.abs(g) > 0), nnx.to_pure_dict(at_params))
    if name == "simvq":
        assert not moved["codebook"].any() and moved["layer"]["kernel"].all()  # frozen; the layer moves all codes
    elif name == "ibq":
        assert moved["codebook"].all()
    elif "ema" in name:
        assert not moved["codebook"].any()
    elif moved:
        assert 0 < moved["codebook"].any(1).sum() <= (K if name == "vq" else 2 * 3 * quantizer.depth)
