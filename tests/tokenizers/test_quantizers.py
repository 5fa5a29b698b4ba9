"""Properties of every quantizer: codes are in range and consistent, gradients are right, statistics add up over parts
of a batch, codes are used."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ar_tokenizers.image import quantizers
from ar_tokenizers.image.quantizers import FSQ, codebook, lfq
from ar_tokenizers.image.quantizers.base import rotation
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

K = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "fsq": dict(quantizer="fsq", levels=(5, 4, 3)),
    "ifsq": dict(quantizer="fsq", levels=(5, 4, 3), activation="ifsq"),
    "vq": dict(quantizer="vq", codes=K, entropy=0.01),
    "vq-ema": dict(quantizer="vq", codes=K, codebook_update="ema", entropy=0.01),
    "vq-rotation": dict(quantizer="vq", codes=K, gradient="rotation"),
    "simvq": dict(quantizer="simvq", codes=K),
    "lfq": dict(quantizer="lfq", codes=K),
    "bsq": dict(quantizer="bsq", codes=K),
    "ibq": dict(quantizer="ibq", codes=K, code_dim=8),
    "rq": dict(quantizer="rq", codes=K, depth=3),
    "rq-ema": dict(quantizer="rq", codes=K, depth=2, codebook_update="ema", gradient="rotation"),
}
EVERY = pytest.mark.parametrize("name", SETTINGS)


def make(name: str, seed: int = 0, **changes) -> Any:
    return quantizers.make(**SETTINGS[name] | changes, rngs=nnx.Rngs(seed))


def latents(quantizer: quantizers.Quantizer, *shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), (*shape, quantizer.dim))


def params_of(quantizer: quantizers.Quantizer) -> dict:
    return nnx.to_pure_dict(nnx.state(quantizer, nnx.Param))


# ---- what codes mean --------------------------------------------------------------------------------------------


@functools.cache
def passes(name: str):
    """The quantizer, and one compiled function for the training pass, encode, and the vectors of codes."""
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
    if isinstance(quantizer, FSQ):  # vectors are already in the space of `bound`, so they are not bounded again
        encode = quantizer.nearest
    else:
        encode = quantizer.encode
    codes = jnp.arange(quantizer.codebook_size)
    np.testing.assert_array_equal(jax.jit(lambda codes: encode(quantizer.vectors(codes)))(codes), codes)


@given(st.lists(st.integers(3, 9), min_size=1, max_size=5).map(tuple), st.integers(0, 2**31 - 1))
@settings(max_examples=15, deadline=None)
def test_fsq_codes_and_vectors_are_one_to_one(levels, seed):
    fsq = FSQ(levels)
    drawn = np.random.default_rng(seed).integers(0, fsq.codebook_size, 64)
    codes = jnp.array([0, fsq.codebook_size - 1, *drawn], jnp.int32)
    np.testing.assert_array_equal(jax.jit(lambda codes: fsq.nearest(fsq.vectors(codes)))(codes), codes)


@pytest.mark.parametrize(
    ("levels", "activation"), [((8, 5, 5, 5), "tanh"), ((8, 8, 8, 5, 5, 5), "ifsq"), ((3, 4, 6, 7), "tanh")]
)
def test_fsq_reaches_every_level_and_no_other(levels, activation):
    fsq = FSQ(levels, activation)
    z = jnp.linspace(-20, 20, 4001)[:, None] * jnp.ones(fsq.dim)
    vectors = np.asarray(jax.jit(lambda z: fsq(z).vectors)(z))
    assert [len(np.unique(vectors[:, c])) for c in range(fsq.dim)] == list(levels)
    np.testing.assert_allclose(
        jax.jit(fsq.bound)(jnp.zeros((1, fsq.dim))), 0, atol=1e-6
    )  # a zero latent is exactly on a level
    for dtype in (jnp.float32, jnp.bfloat16):
        codes = jax.jit(fsq.encode)((1e4 * jax.random.normal(jax.random.key(0), (999, fsq.dim))).astype(dtype))
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
    """Search, soft lookup and entropy penalty, with gradients, equal those from full [N, K] scores."""
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
    np.testing.assert_array_equal(codebook.nearest(x, jnp.zeros((17, 6))), np.zeros((5, 2)))  # a tie: the first


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
    """LFQ's factors equal a softmax over the 2**5 codes."""
    signs = make("lfq", codes=32, beta=0.0, entropy=1.0)
    z = latents(signs, 40, scale=0.5)
    table = signs.vectors(jnp.arange(32))
    p = np.exp(-np.sum(np.square(np.asarray(z)[:, None] - np.asarray(table)), -1, dtype=np.float64))
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    loss = jax.jit(jax.value_and_grad(lambda z: signs(z).loss))
    np.testing.assert_allclose(loss(z)[0], np.sum(mean * np.log(mean)) - np.sum(p * np.log(p)) / 40, rtol=1e-4)
    sure = loss(1e4 * z)[1]
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
        assert (
            not moved["codebook"].any() and moved["layer"]["kernel"].all()
        )  # the codebook is frozen; the layer moves all codes
    elif name == "ibq":
        assert moved["codebook"].all()
    elif "ema" in name:
        assert not moved["codebook"].any()
    elif moved:
        assert 0 < moved["codebook"].any(1).sum() <= (K if name == "vq" else 2 * 3 * quantizer.depth)


def test_rotation_turns_the_gradient_as_the_latent_would_turn():
    """A gradient along the code becomes one along the latent, and one orthogonal to both keeps its direction; both are
    scaled by |code| / |latent|."""
    latent, vector = jnp.array([2.0, 0.0, 0.0]), jnp.array([0.0, 6.0, 0.0])
    gradient = lambda along: jax.grad(lambda z: rotation(z, vector) @ jnp.array(along))(latent)  # noqa: E731
    np.testing.assert_allclose(gradient([0.0, 1.0, 0.0]), [3.0, 0.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(gradient([0.0, 0.0, 1.0]), [0.0, 0.0, 3.0], atol=1e-5)


@pytest.mark.parametrize("space", ["sphere", "euclidean"])
def test_vq_finds_the_nearest_code_and_puts_beta_on_the_commitment(space):
    vq = make("vq", entropy=0.0, space=space)
    z = latents(vq, 50)
    placed = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True) if space == "sphere" else x  # noqa: E731
    distances = np.linalg.norm(placed(np.asarray(z))[:, None] - placed(np.asarray(vq.codebook[...])), axis=-1)
    np.testing.assert_array_equal(vq.encode(z), distances.argmin(1))
    latent = jax.jit(jax.grad(lambda z: vq(z).loss))(z)
    fixed = vq.vectors(vq.encode(z))
    full = jax.jit(jax.grad(lambda z: jnp.mean(jnp.square(vq.bound(z) - fixed))))(z)
    np.testing.assert_allclose(latent, 0.25 * full, rtol=1e-4, atol=1e-8)


# ---- the state beside the parameters ----------------------------------------------------------------------------

KEEPING = pytest.mark.parametrize("name", ["vq", "vq-ema", "rq", "rq-ema"])


@KEEPING
def test_sums_add_up_over_parts_of_a_batch_and_over_devices(name):
    quantizer = make(name)
    z, keys = latents(quantizer, 8, 5), jax.random.split(jax.random.key(3), 8)
    sums = jax.jit(lambda z, keys: quantizer(z, keys).sums)
    whole = sums(z, keys)
    halves = jax.tree.map(jnp.add, sums(z[:4], keys[:4]), sums(z[4:], keys[4:]))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    spread = sums(*jax.device_put((z, keys), rows))
    assert set(whole) == {"count", "drawn_weight", "drawn_latent"} | ({"latent"} if "ema" in name else set())
    assert whole["count"].sum() == z.shape[0] * z.shape[1] * quantizer.depth
    for other in (halves, spread):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, other)


def test_a_restarted_code_is_nearly_one_latent():
    vq = make("vq", codes=2, restart=0.5)
    z, keys = latents(vq, 4, 500), jax.random.split(jax.random.key(3), 4)
    params, state = params_of(vq), vq.init_state(params_of(vq))
    sums = dict(jax.jit(lambda z: vq(z, keys).sums)(z), count=jnp.array([2000.0, 0.0]))
    updated, state = vq.update_state(params, state, sums)
    nearest = np.linalg.norm(np.asarray(vq.bound(z)) - np.asarray(updated["codebook"][1]), axis=-1).min()
    mean = np.linalg.norm(np.asarray(vq.bound(z)).mean((0, 1)) - np.asarray(updated["codebook"][1]))
    assert nearest < 0.35 < 0.8 < mean
    np.testing.assert_array_equal(updated["codebook"][0], params["codebook"][0])
    # The used code has a hundredth of its 2000 uses. The restarted code gets the mean over codes, of 20 and 0.
    np.testing.assert_allclose(state["count"], [20.0, 10.0], rtol=1e-5)


def test_settle_is_the_moving_average_of_the_latents_of_a_code():
    vq = make("vq-ema", codes=8, restart=0.0, entropy=0.0)
    params, noise = params_of(vq), np.random.default_rng(0)
    statistics, count, total = vq.init_state(params), np.zeros(8), np.zeros((8, vq.dim))
    expected = np.array(params["codebook"])
    graph, state = nnx.split(vq)

    @jax.jit
    def run(params, z):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(z, jax.random.split(jax.random.key(0), 2))

    for _ in range(4):
        z = noise.normal(size=(2, 6, vq.dim)).astype(np.float32)
        found = run(params, z)
        codes, unit = (
            np.asarray(found.codes).ravel(),
            z.reshape(12, -1) / np.linalg.norm(z.reshape(12, -1), axis=1)[:, None],
        )
        count = 0.99 * count + 0.01 * np.bincount(codes, minlength=8)
        total = 0.99 * total
        np.add.at(total, codes, 0.01 * unit)
        expected = np.where(count[:, None] > 0, total / np.maximum(count, 1e-9)[:, None], expected)
        params, statistics = vq.update_state(params, statistics, found.sums)
        np.testing.assert_allclose(params["codebook"], expected, rtol=1e-4, atol=1e-6)
    assert (count > 0).sum() > 2


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.split("-")[0] not in ("vq", "rq")])
def test_the_others_keep_nothing(name):
    quantizer = make(name)
    params = params_of(quantizer)
    keys = jax.random.split(jax.random.key(0), 2)
    sums = jax.eval_shape(lambda z: quantizer(z, keys).sums, latents(quantizer, 2, 3))
    assert sums == {} and quantizer.init_state(params) == {}
    assert quantizer.update_state(params, {}, {}) == (params, {})


# ---- codes in use -----------------------------------------------------------------------------------------------


def usage(quantizer, batch, *, steps: int, learning_rate: float = 1e-2, features: int = 16) -> float:
    """The share of codes that 16384 rows use after fitting a linear encoder and decoder to batches of rows."""

    class Fit(nnx.Module):
        def __init__(self, rngs):
            self.quantizer = quantizer
            self.encoder = nnx.Linear(features, quantizer.dim, rngs=rngs)
            self.decoder = nnx.Linear(quantizer.dim, features, rngs=rngs)

        def latents(self, x):
            return self.encoder(x).astype(jnp.bfloat16)

    graph, state = nnx.split(Fit(nnx.Rngs(1)))
    optimizer = optax.adam(learning_rate)

    def bound(params):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def loss(params, x, keys):
        module = bound(params)
        found = module.quantizer(module.latents(x), keys)
        return jnp.mean(jnp.square(module.decoder(found.vectors) - x)) + found.loss, found.sums

    def step(carry, key):
        params, moments, statistics = carry
        x = batch(key, 256).reshape(16, 16, features)
        gradient, sums = jax.grad(loss, has_aux=True)(params, x, jax.random.split(key, 16))
        updates, moments = optimizer.update(gradient, moments)
        params = optax.apply_updates(params, updates)
        own, statistics = quantizer.update_state(params.get("quantizer", {}), statistics, sums)
        return (params | ({"quantizer": own} if own else {}), moments, statistics), None

    @jax.jit
    def codes(params):
        carry = (params, optimizer.init(params), quantizer.init_state(params.get("quantizer", {})))
        params = jax.lax.scan(step, carry, jax.random.split(jax.random.key(2), steps))[0][0]
        module = bound(params)
        return module.quantizer.encode(module.latents(batch(jax.random.key(3), 16384)))

    return len(np.unique(codes(nnx.to_pure_dict(state)))) / quantizer.codebook_size


def blend(key: jax.Array, rows: int) -> jax.Array:
    """Rows of 16 features that depend on 8 hidden numbers."""
    return jax.random.normal(key, (rows, 8)) @ jax.random.normal(jax.random.key(9), (8, 16)) / 3


@pytest.mark.slow
@EVERY
def test_a_short_fit_uses_the_codes(name):
    """The latents are bfloat16."""
    assert usage(make(name), blend, steps=150) > 0.9


@pytest.mark.parametrize("name", ["vq", "vq-ema"])
def test_restart_revives_codes_that_nothing_chooses(name):
    """There are twice as many codes as latents in a batch, and all latents are in one corner of the sphere."""

    def share(restart: float) -> float:
        vq = make(name, codes=256, restart=restart, entropy=0.0)
        corner = lambda key, rows: 1 + 0.2 * jax.random.normal(key, (rows, 8, vq.dim))  # noqa: E731
        graph, state = nnx.split(vq)
        optimizer = optax.adam(1e-2)

        def bound(params):
            nnx.replace_by_pure_dict(state, params)
            return nnx.merge(graph, state)

        def loss(params, z, keys):
            found = bound(params)(z, keys)
            return found.loss, found.sums

        def step(carry, key):
            params, moments, statistics = carry
            gradient, sums = jax.grad(loss, has_aux=True)(params, corner(key, 16), jax.random.split(key, 16))
            updates, moments = optimizer.update(gradient, moments)
            params, statistics = vq.update_state(optax.apply_updates(params, updates), statistics, sums)
            return (params, moments, statistics), None

        @jax.jit
        def codes(params):
            carry = (params, optimizer.init(params), vq.init_state(params))
            params = jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), 100))[0][0]
            return bound(params).encode(corner(jax.random.key(2), 2048))

        return len(np.unique(codes(params_of(vq)))) / 256

    assert share(0.0) < 0.1 and share(0.1) > 0.9


# ---- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(quantizer="vqq"), "one of fsq, vq, simvq, lfq, .*, got 'vqq'"),
        (dict(quantizer="fsq", levels=(8, 2)), "at least 3"),
        (dict(quantizer="fsq", levels=(1000,) * 4), "more than int32"),
        (dict(quantizer="fsq", activation="relu"), "tanh, ifsq, got 'relu'"),
        (dict(quantizer="vq", codes=1), "at least 2 codes"),
        (dict(quantizer="vq", gradient="gumbel"), "straight_through, rotation, got 'gumbel'"),
        (dict(quantizer="vq", codebook_update="sgd"), "gradient, ema, got 'sgd'"),
        (dict(quantizer="vq", space="torus"), "sphere, euclidean, got 'torus'"),
        (dict(quantizer="rq", space="euclidean"), "='euclidean' is only for vq; for quantizer rq it must be 'sphere'"),
        (dict(quantizer="vq", restart=1.0), r"restart must be in \[0, 1\), .* got 1.0"),
        (dict(quantizer="lfq", codes=1000), "a power of two and at least 4; got 1000"),
        (dict(quantizer="rq", depth=0), "depth of at least 1, got 0"),
        (dict(quantizer="simvq", codebook_update="ema"), "for vq or rq; for quantizer simvq it must be 'gradient'"),
        (dict(quantizer="lfq", code_dim=9), "=9 is only for vq or simvq or ibq or rq; for quantizer lfq it must be 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: quantizers.make(**changes, rngs=nnx.Rngs(0)))


@EVERY
def test_a_code_alone_is_what_a_position_gets_of_it(name):
    quantizer = make(name)
    codes = jax.random.randint(jax.random.key(1), (7, quantizer.depth), 0, quantizer.codebook_size)
    alone = quantizer.alone()
    assert alone.shape == (quantizer.codebook_size, quantizer.dim)
    found = quantizer.vectors(codes if quantizer.depth > 1 else codes[:, 0])
    np.testing.assert_allclose(found, alone[codes].sum(axis=1), atol=1e-5)
