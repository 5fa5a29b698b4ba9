"""The image tokenizer: codes mean the same in training, in the sampler and after loading."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ar_tokenizers.image import metrics
from ar_tokenizers.image.autoencoder import Autoencoder, init, to_float
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.layers import depth_to_space, space_to_depth
from ar_tokenizers.image.objective import Objective, ObjectiveConfig
from ar_tokenizers.image.tokenizer import ImageTokenizer

SMALL = AutoencoderConfig(factor=8, patch=4, width=8, multipliers=(1, 2), blocks=(0, 1), levels=(5, 4, 3))
SMALL_VQ = AutoencoderConfig(factor=8, patch=4, width=8, multipliers=(1, 2), blocks=(0, 1), quantizer="vq", codes=32)
SMALL_VQGAN = AutoencoderConfig(
    backbone="vqgan", patch=4, factor=8, width=8, multipliers=(1, 2), blocks=(1, 1), attention="middle", z_channels=6,
    levels=(5, 4, 3),
)  # fmt: skip
SMALL_RQ = dataclasses.replace(SMALL_VQ, quantizer="rq", depth=3)


def random_images(count: int, height: int = 16, width: int = 24, seed: int = 0) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (count, height // 4, width // 4, 3), np.uint8)
    return blocks.repeat(4, axis=1).repeat(4, axis=2)


def trained(config: AutoencoderConfig, seed: int = 0) -> dict:
    """Weights that are nowhere zero, as after training: kernels around 0, norms and biases around 1."""
    noise = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    return jax.tree.map(lambda x: np.float32(noise.normal(x.ndim == 1, 0.2, x.shape)), shapes)


# ---- the autoencoder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, SMALL_VQ, SMALL_RQ, SMALL_VQGAN], ids=["fsq", "vq", "rq", "vqgan"])
def test_what_is_trained_is_what_codes_decode_to(config):
    """The training pass equals decode(encode(x)) to the last bit."""

    @jax.jit
    def both(params, pixels):
        module = Autoencoder.bind(config, params)
        return module(pixels), module.encode(pixels), module.decode(module.encode(pixels))

    trained_on, codes, decoded = both(trained(config), to_float(jnp.asarray(random_images(3))))
    assert trained_on.pixels.shape == (3, 16, 24, 3) and codes.shape == (3, *config.grid(16, 24))
    np.testing.assert_array_equal(trained_on.codes, codes)
    np.testing.assert_array_equal(trained_on.pixels, decoded)
    assert len(np.unique(codes)) > 2


@pytest.mark.parametrize(
    "smallest",
    [
        dict(quantizer="fsq", levels=(3,)),
        dict(quantizer="vq", codes=2, code_dim=2),
        dict(quantizer="vq", codes=2, code_dim=2, space="euclidean"),
        dict(quantizer="simvq", codes=2, code_dim=2),
        dict(quantizer="lfq", codes=4),
        dict(quantizer="bsq", codes=4),
        dict(quantizer="ibq", codes=2, code_dim=2),
        dict(quantizer="rq", codes=2, code_dim=2, depth=1),
    ],
    ids=lambda smallest: "-".join(str(value) for value in smallest.values()),
)
def test_every_quantizer_decodes_at_its_smallest(smallest):
    config = dataclasses.replace(SMALL, **smallest)

    @jax.jit
    def both(params, pixels):
        module = Autoencoder.bind(config, params)
        return module(pixels), module.encode(pixels), module.decode(module.encode(pixels))

    made, codes, decoded = both(trained(config), to_float(jnp.asarray(random_images(2))))
    assert codes.shape == (2, 2, 3) and 0 <= codes.min() and codes.max() < config.codebook_size
    np.testing.assert_array_equal(made.codes, codes)
    np.testing.assert_array_equal(made.pixels, decoded)


@pytest.mark.parametrize(
    "config",
    [SMALL, SMALL_VQ, pytest.param(SMALL_VQGAN, marks=pytest.mark.slow)],
    ids=["fsq", "vq", "vqgan"],
)
def test_a_few_steps_learn_and_reach_every_parameter(config):
    flat = np.random.default_rng(0).integers(0, 256, (8, 1, 1, 3), np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    params = jax.jit(lambda key: init(config, key))(jax.random.key(0))
    objective, keys = Objective(config), jax.random.split(jax.random.key(1), len(flat))
    model_state = objective.init_state({"autoencoder": params})
    optimizer = optax.adam(1e-2)
    state, start = jax.jit(optimizer.init)(params), params

    @jax.jit
    def step(params, state):
        def total(params):
            losses, found, _ = objective.losses({"autoencoder": params}, model_state, flat, keys)
            return losses["autoencoder"], found

        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, found

    psnr = []
    for _ in range(40):
        params, state, found = step(params, state)
        psnr.append(float(found["psnr"][0] / found["psnr"][1]))
    assert psnr[-1] > psnr[0] + 6
    assert int(found["code_counts"].sum()) == 8 * 4 and found["code_counts"].shape == (config.codebook_size,)
    unmoved = jax.tree.map(np.array_equal, start, params)
    assert not any(jax.tree.leaves(unmoved)), unmoved


def test_loss_metrics_are_those_of_the_images():
    images, params = random_images(4), trained(SMALL)
    tokenizer = ImageTokenizer(SMALL, params, batch_size=4)
    objective = Objective(SMALL)
    losses, found, _ = jax.jit(
        lambda p, images: objective.losses({"autoencoder": p}, objective.init_state({"autoencoder": p}), images, None)
    )(params, images)
    np.testing.assert_allclose(
        found["psnr"][0] / 4, metrics.psnr(images, tokenizer.decode(tokenizer.encode(images))).mean(), atol=0.02
    )
    np.testing.assert_allclose(losses["autoencoder"], found["mse"][0], rtol=1e-6)
    np.testing.assert_array_equal(
        found["code_counts"], np.bincount(tokenizer.encode(images).ravel(), minlength=SMALL.codebook_size)
    )


def test_errors_within_the_tolerance_cost_nothing_and_are_still_reported():
    images, params = random_images(4), trained(SMALL)
    target = np.asarray(to_float(jnp.asarray(images)))
    error = np.abs(np.asarray(Autoencoder.bind(SMALL, params)(target).pixels) - target)
    excess = np.maximum(error - 0.3, 0)
    objective = Objective(SMALL, ObjectiveConfig(tolerance=0.3, l1_weight=0.5))
    params = {"autoencoder": params}
    losses, found, _ = objective.losses(params, objective.init_state(params), images, None)
    per_image = 0.5 * excess.mean() + np.square(excess).mean()
    np.testing.assert_allclose(losses["autoencoder"] / 4, per_image, rtol=1e-5)
    assert isinstance(found["l1"], tuple)
    np.testing.assert_allclose(found["l1"][0] / 4, error.mean(), rtol=1e-5)
    assert per_image < 0.5 * error.mean() + np.square(error).mean()


@pytest.mark.parametrize("config", [SMALL, SMALL_VQGAN], ids=["space_to_depth", "vqgan"])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_codes(config):
    config = dataclasses.replace(config, dtype="bfloat16")
    params = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    pixels = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    run = lambda params, x: Autoencoder.bind(config, params)(x)  # noqa: E731
    program = str(jax.make_jaxpr(run)(params, pixels))
    convolutions = [line for line in program.splitlines() if "= conv_general_dilated" in line]
    assert convolutions and all("bf16[" in line for line in convolutions)
    out = jax.eval_shape(run, params, pixels)
    assert (out.pixels.dtype, out.codes.dtype) == (jnp.float32, jnp.int32)


def test_space_to_depth_keeps_neighbours_together_and_inverts():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = space_to_depth(x, 2)
    assert y.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(y[0, 1, 2], x[0, 2:4, 4:6].ravel())
    np.testing.assert_array_equal(depth_to_space(y, 2), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 12}, "power of two"),
        ({"factor": 4, "patch": 8}, "power of two"),
        ({"multipliers": [1, 2]}, "make 3 levels, .* multipliers has 2"),
        ({"blocks": [1]}, "make 3 levels, .* blocks has 1"),
        ({"quantizer": "fqs"}, "one of"),
        ({"backbone": "resnet"}, "one of"),
        ({"attention": "middle"}, "'space_to_depth' has no attention"),
        ({"backbone": "vqgan"}, "blocks: expected at least 1"),
        ({"witdh": 3}, "unknown fields \\['witdh'\\]"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig.from_dict(changes)


# ---- the artefact -----------------------------------------------------------------------------------------------


def test_codes_do_not_depend_on_the_batch_they_came_in():
    tokenizer = ImageTokenizer(SMALL, trained(SMALL), batch_size=4)
    images = random_images(7)
    codes = tokenizer.encode(images)
    assert (codes.dtype, codes.shape) == (np.dtype(np.int32), (7, 2, 3))
    np.testing.assert_array_equal(np.concatenate([tokenizer.encode(images[i : i + 1]) for i in range(7)]), codes)
    back = tokenizer.decode(codes)
    assert (back.dtype, back.shape) == (np.dtype(np.uint8), images.shape)
    np.testing.assert_array_equal(tokenizer.decode(codes[5:]), back[5:])
    assert tokenizer.encode(images[:0]).shape == (0, 2, 3) and tokenizer.decode(codes[:0]).shape == (0, 16, 24, 3)


def test_a_single_image_is_not_padded_to_a_batch(monkeypatch):
    tokenizer, seen = ImageTokenizer(SMALL, trained(SMALL), batch_size=4), []
    for name in ("_encode", "_decode"):
        program = getattr(tokenizer.single, name)

        def counted(params, rows, program=program):
            seen.append(len(rows))
            return program(params, rows)

        monkeypatch.setattr(tokenizer.single, name, counted)
    image = random_images(1)
    codes = tokenizer.single.encode(image)
    np.testing.assert_array_equal(codes, tokenizer.encode(image))
    np.testing.assert_array_equal(tokenizer.single.decode(codes), tokenizer.decode(codes))
    assert seen == [1, 1] and tokenizer.single.hash == tokenizer.hash


def test_a_replica_computes_the_same_on_its_device():
    tokenizer = ImageTokenizer(SMALL, trained(SMALL), batch_size=2)
    device = jax.devices()[3]
    replica = tokenizer.on(device)
    assert {leaf.device for leaf in jax.tree.leaves(replica.params)} == {device} and replica.hash == tokenizer.hash
    images = random_images(3)
    np.testing.assert_array_equal(replica.encode(images), tokenizer.encode(images))


def test_tokenizers_of_one_config_share_their_programs(monkeypatch):
    traced = []

    def counted(method):
        return lambda *args: traced.append(method.__name__) or method(*args)

    for method in (Autoencoder.encode, Autoencoder.decode):
        monkeypatch.setattr(Autoencoder, method.__name__, counted(method))
    config = dataclasses.replace(SMALL, levels=(3, 5, 4))  # sizes that no other test has compiled
    other = jax.tree.map(lambda leaf: leaf + 0.1, trained(config))
    images = random_images(2)
    decoded = [
        tokenizer.decode(tokenizer.encode(images))
        for tokenizer in (ImageTokenizer(config, params, batch_size=2) for params in (trained(config), other))
    ]
    assert traced == ["encode", "decode"]
    assert not np.array_equal(*decoded)  # each decodes with its own weights


def test_wrong_input_is_named():
    tokenizer = ImageTokenizer(SMALL, trained(SMALL), batch_size=2)
    with pytest.raises(ValueError, match="20 x 24 pixels .* multiples of 8"):
        tokenizer.encode(random_images(1, 20, 24))
    with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\], got float32"):
        tokenizer.encode(random_images(1).astype(np.float32))
    with pytest.raises(ValueError, match=r"in \[0, 60\), found 0 to 60"):
        tokenizer.decode(np.array([[[0, 60]]]))
    params = trained(SMALL)
    del params["encoder"]["stem"]["kernel"]
    with pytest.raises(
        ValueError, match=r"encoder.stem.kernel: the config asks for \(3, 3, 48, 8\), found no such weight"
    ):
        ImageTokenizer(SMALL, params)


def test_save_and_load(tmp_path):
    tokenizer = ImageTokenizer(SMALL, trained(SMALL), batch_size=2)
    other = ImageTokenizer(SMALL, trained(SMALL, seed=7), batch_size=2)
    tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path, batch_size=2)
    assert loaded.hash == tokenizer.hash != other.hash and loaded.config == SMALL
    np.testing.assert_array_equal(loaded.encode(random_images(2)), tokenizer.encode(random_images(2)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "weights.safetensors"]

    mixed = (tmp_path / "config.json").read_bytes()
    record = json.loads(mixed)
    record["config"]["update"] = record["config"].pop("codebook_update")  # the key's former name
    record["config"]["backbone"] = "folded"  # the value's former name
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert ImageTokenizer.load(tmp_path).config == SMALL
    other.save(tmp_path)  # over an existing one
    assert ImageTokenizer.load(tmp_path).hash == other.hash
    (tmp_path / "config.json").write_bytes(mixed)
    with pytest.raises(ValueError, match=f"{tokenizer.hash[:12]}, but those in the folder have hash {other.hash[:12]}"):
        ImageTokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ValueError, match='"format": expected 2, found 9'):
        ImageTokenizer.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="the last file, config.json, is missing"):
        ImageTokenizer.load(tmp_path)
