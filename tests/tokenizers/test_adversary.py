"""The adversary: one forward pass gives both sides the same gradients as two passes, and every formula is the
paper's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ar_tokenizers.image import adversary
from ar_tokenizers.image.adversary import AdversaryConfig
from ar_tokenizers.image.discriminators import average_into, blur_and_halve

PATCH = AdversaryConfig(kind="patch", width=4, layers=2, r1=10.0)
STYLE = AdversaryConfig(kind="style", width=4, layers=2, r1=10.0)
KINDS = pytest.mark.parametrize("config", [PATCH, STYLE], ids=["patch", "style"])


def random_images(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (*shape, 3), minval=-1, maxval=1)


def weights(config: AdversaryConfig) -> adversary.Params:
    """Parameters that are nowhere zero, without compiling an initialiser: kernels around 0, scales around 1."""
    noise = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: adversary.init(config, key), jax.random.key(0))
    one = lambda x: noise.normal(1, 0.1, x.shape) if x.ndim == 1 else noise.normal(0, x.size**-0.25, x.shape)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(one(x), jnp.float32), shapes)


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * float(jnp.abs(y).max() + 1e-12), rtol=0)


# ---- one forward pass -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
@KINDS
def test_two_pull_backs_of_one_pass_are_the_two_textbook_gradients(config, loss):
    config = dataclasses.replace(config, loss=loss, layers=1)
    real = random_images(2, 8, 8)
    judge = weights(config)
    painter = {"kernel": 0.5 * jax.random.normal(jax.random.key(2), (3, 3)), "bias": jnp.array([0.1, -0.2, 0.3])}

    def paint(params):
        return jnp.tanh(real @ params["kernel"] + params["bias"])

    def both(judge, painter):
        fake = paint(painter)
        real_logits, fake_logits = (adversary.logits(config, judge, pixels)[0] for pixels in (real, fake))
        d = adversary.discriminator_loss(config, real_logits, fake_logits)
        if config.kind == "patch" and loss == "hinge":  # one case is enough, because the penalty takes long to compile
            d += adversary.r1_penalty(config, judge, real)
        g = jnp.square(fake - real).mean((1, 2, 3)) + adversary.generator_loss(config, fake_logits)
        return d.sum(), g.sum()

    def one_pass(judge, painter):
        _, pull_back = jax.vjp(both, judge, painter)
        return pull_back((1.0, 0.0))[0], pull_back((0.0, 1.0))[1]

    def two_passes(judge, painter):
        d = jax.grad(lambda judge: both(judge, jax.lax.stop_gradient(painter))[0])(judge)
        return d, jax.grad(lambda painter: both(jax.lax.stop_gradient(judge), painter)[1])(painter)

    found, expected = jax.jit(lambda *params: (one_pass(*params), two_passes(*params)))(judge, painter)
    close(found, expected)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found) if leaf.ndim > 1)


# ---- discriminators ---------------------------------------------------------------------------------------------


@KINDS
def test_a_image_is_judged_by_itself_at_any_size(config):
    params = weights(config)
    judge = jax.jit(lambda pixels: adversary.logits(config, params, pixels))
    least = {"patch": 12, "style": 4}[config.kind]
    batch = random_images(3, least, 2 * least + 1)
    together, features = judge(batch)
    assert together.dtype == jnp.float32 and np.isfinite(together).all() and len(features) >= config.layers
    close(together[1:2], judge(batch[1:2])[0])  # rows are independent, so batch 1, microbatches and meshes are safe
    with pytest.raises(ValueError, match=f"at least {least} pixels a side, got {least - 1} x 32"):
        judge(random_images(1, least - 1, 32))


def test_sizes_are_those_of_the_papers():
    patch, style = AdversaryConfig(kind="patch"), AdversaryConfig(kind="style", layers=6)

    def look(config, side):
        pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        params = jax.eval_shape(lambda key: adversary.init(config, key), jax.random.key(0))
        return params, *jax.eval_shape(lambda p, x: adversary.logits(config, p, x), params, pixels)

    params, logits, _ = look(patch, 256)
    assert logits.shape == (1, 30, 30)  # as in pix2pix
    batch_norms = 2 * (128 + 256 + 512)  # our group norms have as many scales and biases
    expected = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1 + batch_norms
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected == 2_765_633
    assert look(patch, 32)[1].shape == (1, 2, 2)
    _, logits, features = look(style, 256)
    assert logits.shape == (1,) and features[-1].shape == (1, 4, 4, 512)


@KINDS
def test_bfloat16_is_for_arithmetic_only(config):
    half = dataclasses.replace(config, dtype="bfloat16")
    params = weights(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, features = jax.eval_shape(lambda x: adversary.logits(half, params, x), random_images(1, 16, 16))
    assert logits.dtype == jnp.float32 and {feature.dtype for feature in features} == {jnp.dtype("bfloat16")}


def test_blur_passes_the_constant_and_stops_the_checkerboard():
    flat = jnp.full((1, 6, 5, 1), 0.7)
    blurred = jax.jit(blur_and_halve)
    np.testing.assert_allclose(blurred(flat), jnp.full((1, 3, 2, 1), 0.7), rtol=1e-6)
    checkered = (-1.0) ** jnp.add.outer(jnp.arange(8), jnp.arange(8))[None, ..., None]
    np.testing.assert_allclose(blurred(checkered)[:, 1:-1, 1:-1], 0, atol=1e-6)  # plain subsampling would give +1


def test_averages_cover_the_image():
    x = jnp.arange(6.0)[None, :, None, None] * jnp.ones((1, 6, 2, 1))
    average = jax.jit(average_into, static_argnums=1)
    np.testing.assert_allclose(average(x, 3)[0, :, 0, 0], [0.5, 2.5, 4.5], rtol=1e-6)
    np.testing.assert_allclose(average(x[:, :2], 4)[0, :, 0, 0], [0, 0, 1, 1], atol=1e-6)  # smaller than the grid
    np.testing.assert_allclose(average(x[:, :5], 4)[0, :, 0, 0], [0.5, 1.5, 2.5, 3.5], rtol=1e-6)  # overlapping


# ---- losses -----------------------------------------------------------------------------------------------------


def test_losses_are_cross_entropy_of_the_logit_and_not_of_the_label():
    """LlamaGen swaps label and logit, so its loss is linear in the logit."""
    config = AdversaryConfig(kind="patch", loss="non_saturating")
    real, fake = jnp.array([[2.0, -1.0], [0.5, 0.0]]), jnp.array([[-3.0, 1.0], [9.0, -9.0]])
    p = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))  # noqa: E731
    expected = -np.log(p(real)).mean(1) - np.log(1 - p(fake)).mean(1)
    np.testing.assert_allclose(adversary.discriminator_loss(config, real, fake), expected, rtol=1e-5)
    np.testing.assert_allclose(adversary.generator_loss(config, fake), -np.log(p(fake)).mean(1), rtol=1e-5)
    slope = jax.vmap(jax.grad(lambda x: adversary.generator_loss(config, x[None])[0]))(jnp.array([-20.0, 20.0]))
    np.testing.assert_allclose(slope, [-1, 0], atol=1e-6)  # largest if the generator loses, and zero if it wins


def test_hinge_asks_for_a_margin():
    config = AdversaryConfig(kind="style", loss="hinge")
    real, fake = jnp.array([3.0, 0.0, -1.0]), jnp.array([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(adversary.discriminator_loss(config, real, fake), [0.0, 1.0, 2.5])
    np.testing.assert_allclose(adversary.generator_loss(config, fake), -fake)


def test_r1_of_a_linear_discriminator_and_against_finite_differences(monkeypatch):
    w = random_images(5, 4, seed=3)
    config = AdversaryConfig(kind="style", r1=3.0)
    with monkeypatch.context() as patched:
        patched.setattr(adversary, "logits", lambda c, params, x: (jnp.einsum("bhwc,hwc->b", x, params["w"]), []))
        penalty = adversary.r1_penalty(config, {"w": w}, random_images(2, 5, 4))
        gradient = jax.grad(lambda p: adversary.r1_penalty(config, p, random_images(2, 5, 4)).sum())({"w": w})["w"]
    np.testing.assert_allclose(penalty, 1.5 * np.square(w).sum() * np.ones(2), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * 3.0 * w, rtol=1e-5)  # two images, each gamma x w

    config = dataclasses.replace(PATCH, r1=2.0, layers=1)
    params, x = weights(config), random_images(2, 16, 16)
    mean = jax.jit(lambda x: adversary.logits(config, params, x)[0].mean((1, 2)))
    slope = jax.jit(jax.grad(lambda x: mean(x).sum()))(x)
    along = slope / jnp.sqrt(jnp.square(slope).sum((1, 2, 3), keepdims=True))
    length = (
        mean(x + 1e-2 * along) - mean(x - 1e-2 * along)
    ) / 2e-2  # the gradient's length, if `slope` is the gradient
    penalty = jax.jit(lambda x: adversary.r1_penalty(config, params, x))(x)
    np.testing.assert_allclose(penalty, np.square(length), rtol=2e-2)


def test_lecam_is_the_papers_and_its_averages_follow_sums():
    config = AdversaryConfig(kind="patch", lecam=0.5)
    averages = {"real": jnp.float32(1.0), "fake": jnp.float32(-2.0)}
    real, fake = jnp.array([[1.0, 2.0], [-5.0, -3.0]]), jnp.array([[0.5, -0.5], [3.0, 5.0]])  # means 1.5, -4; 0, 4
    penalty = adversary.lecam_penalty(config, averages, real, fake)
    np.testing.assert_allclose(penalty, [0.5 * (3.5**2 + 1.0**2), 0.0], rtol=1e-6)
    once = adversary.lecam_update(adversary.lecam_init(), jnp.float32(6.0), jnp.float32(-3.0), 3)
    np.testing.assert_allclose([once["real"], once["fake"]], [2e-3, -1e-3], rtol=1e-5)


# ---- weights ----------------------------------------------------------------------------------------------------


def test_the_discriminator_learns_before_the_generator_feels_it():
    config = AdversaryConfig(kind="patch", weight=0.8, start=10, warmup=4, ramp=2)
    weight, on = jax.vmap(lambda step: adversary.gates(config, step))(jnp.arange(14))
    np.testing.assert_array_equal(on, [0] * 6 + [1] * 8)
    np.testing.assert_allclose(weight, [0] * 10 + [0.4, 0.8, 0.8, 0.8])
    at_once = AdversaryConfig(kind="patch", weight=0.8, start=0, ramp=0)
    np.testing.assert_allclose(adversary.gates(at_once, 0), (0.8, 1.0))
    np.testing.assert_array_equal(adversary.gates(AdversaryConfig(), jnp.int32(10**6)), (0.0, 0.0))


def test_lazy_r1_counts_for_the_steps_between():
    config = AdversaryConfig(kind="style", r1=1.0, r1_every=4)
    weights = jax.vmap(lambda step: adversary.r1_weight(config, step))(jnp.arange(8))
    np.testing.assert_array_equal(weights, [4, 0, 0, 0, 4, 0, 0, 0])
    assert adversary.r1_weight(dataclasses.replace(config, r1=0.0), 0) == 0


def test_adaptive_weight_is_that_of_two_whole_gradients():
    real, features = random_images(2, 12, 12), jax.random.normal(jax.random.key(5), (2, 12, 12, 6))
    last = {"kernel": 0.3 * jax.random.normal(jax.random.key(6), (6, 3)), "bias": jnp.zeros(3)}
    config = dataclasses.replace(PATCH, layers=1)
    judge = weights(config)
    layer = lambda params: features @ params["kernel"] + params["bias"]  # noqa: E731
    of_pixels = {
        "reconstruction": lambda x: jnp.abs(x - real).mean(),
        "adversarial": lambda x: adversary.generator_loss(config, adversary.logits(config, judge, x)[0]).mean(),
    }

    @jax.jit
    def both_ways(last):
        cotangents = {name: jax.grad(loss)(layer(last)) for name, loss in of_pixels.items()}
        whole = tuple(jax.grad(lambda p, loss=loss: loss(layer(p)))(last) for loss in of_pixels.values())
        return adversary.last_layer_gradients(layer, last, **cotangents), whole

    pair, direct = both_ways(last)
    close(pair, direct)
    size = [np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree))) for tree in direct]
    np.testing.assert_allclose(adversary.adaptive_weight(*pair), size[0] / (size[1] + 1e-4), rtol=1e-4)
    nothing = jax.tree.map(jnp.zeros_like, last)
    assert float(adversary.adaptive_weight(direct[0], nothing, limit=5.0)) == 5.0
    slope = jax.grad(lambda scale: adversary.adaptive_weight(jax.tree.map(lambda g: scale * g, pair[0]), pair[1]))(1.0)
    assert float(slope) == 0  # a constant, which is not minimised


# ---- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kind": "patchgan"}, r"kind must be one of \('none', 'patch', 'style'\), got 'patchgan'"),
        ({"loss": "wgan"}, "loss must be one of"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"weight": float("nan")}, "weight must be 0 or more, got nan"),
    ],
)
def test_impossible_adversaries_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AdversaryConfig(**values)


def test_there_is_no_discriminator_where_there_is_no_adversary():
    assert adversary.init(AdversaryConfig(), jax.random.key(0)) == {}
    with pytest.raises(ValueError, match='kind "none"'):
        adversary.logits(AdversaryConfig(), {}, random_images(1, 32, 32))
