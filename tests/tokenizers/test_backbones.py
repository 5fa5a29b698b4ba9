"""The backbones: their sizes, results and dtypes, and `vqgan` compared with the original."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ar_tokenizers.image import convolution, layers, taming
from ar_tokenizers.image.autoencoder import Autoencoder, init
from ar_tokenizers.image.config import PRESETS, AutoencoderConfig, config_from
from flax import nnx

SMALL = AutoencoderConfig(backbone="vqgan", factor=4, patch=1, width=32, multipliers=(1, 1, 2), blocks=(1, 2, 1),
                          attention="lowest", z_channels=12)  # fmt: skip
PARAMETERS = {  # as published: VQGAN f16 and LlamaGen VQ-16 72M, SBER-MoVQGAN 270M
    "space_to_depth_f8": 1_452_340,
    "space_to_depth_f16": 2_026_932,
    "vqgan_f8_1m": 1_062_759,
    "vqgan_f16_1m": 1_137_127,
    "vqgan_f8_16m": 15_900_871,
    "vqgan_f16_16m": 16_345_287,
    "taming_f16": 71_750_279,
    "taming_f8": 69_976_711,
    "maskgit_f16": 64_388_743,
    "chameleon_f16": 66_492_039,
    "open_magvit2_f16": 92_894_523,
    "ibq_f16": 106_658_439,
    "lwm_f16": 145_712_647,
    "showo_f16": 95_386_761,
    "emu3_f8": 270_373_167,
    "movqgan_f8": 270_603_567,
    "emu3_vision_f8": 270_605_699,
}


def random_params(config: AutoencoderConfig, seed: int = 0) -> dict:
    """Weights that are nowhere zero and keep activations of their size, as after training."""
    noise = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = 0.2 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return noise.normal(leaf.ndim == 1, scale, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (*shape, 3)).astype(np.float32)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_sizes_and_any_shape_of_image(name):
    config = config_from(name, dtype="bfloat16")

    def made_and_used(
        key: jax.Array, pixels: jax.Array
    ) -> tuple:  # one trace for both; `init` and `bind` would need three
        module = Autoencoder(config, rngs=layers.fresh(key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param)), module(pixels)

    pixels = jax.ShapeDtypeStruct((2, 3 * config.factor, 5 * config.factor, 3), jnp.float32)
    params, out = jax.eval_shape(made_and_used, jax.random.key(0), pixels)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert (out.pixels.shape, out.codes.shape) == (pixels.shape, (2, 3, 5))


def test_a_decoder_may_have_widths_and_blocks_of_its_own():
    config = dataclasses.replace(SMALL, decoder_multipliers=(1, 2, 2), decoder_blocks=(1, 3, 2))
    assert config.decoder_levels == ((32, 1), (64, 3), (64, 2)) and SMALL.decoder_levels == ((32, 2), (32, 3), (64, 2))
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))["decoder"]
    assert [sum(name.startswith("block") for name in shapes[f"level{index}"]) for index in range(3)] == [1, 3, 2]
    assert shapes["level1"]["block0"]["conv1"]["kernel"].shape == (3, 3, 64, 64)
    assert shapes["head"]["kernel"].shape == (3, 3, 32, 3)
    out = jax.eval_shape(lambda params, codes: Autoencoder.bind(config, params).decode(codes),
                         jax.eval_shape(functools.partial(init, config), jax.random.key(0)),
                         jax.ShapeDtypeStruct((1, 2, 3), jnp.int32))  # fmt: skip
    assert out.shape == (1, 8, 12, 3)


def test_settings_that_came_later_do_not_move_the_hash_of_tokenizers_from_before():
    later = {"decoder_multipliers", "decoder_blocks", "space"}
    assert not later & json.loads(SMALL.identity()).keys()
    for name, value in dict(decoder_multipliers=(1, 1, 4), decoder_blocks=(2, 3, 2)).items():
        changed = dataclasses.replace(SMALL, **{name: value})
        assert json.loads(changed.identity())[name] == list(value)
        assert AutoencoderConfig.from_dict(dataclasses.asdict(changed)) == changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(decoder_blocks=(1, 2)), "3 levels, fine to coarse, but decoder_blocks has 2"),
        (dict(decoder_multipliers=(1, 0, 2)), "must be at least 1"),
        (
            dict(backbone="space_to_depth", attention="none", decoder_blocks=(1, 2, 1)),
            "must be \\(\\) for 'space_to_depth'",
        ),
    ],
)
def test_decoders_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="space_to_depth_f8, .*found 'vqgan'"):
        config_from("vqgan")


def test_vqgan_starts_without_its_residual_branches():
    config = AutoencoderConfig(backbone="vqgan", factor=1, patch=1, width=8, multipliers=(1,), blocks=(1,),
                               attention="middle")  # fmt: skip
    params = init(config, jax.random.key(0))
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    zero = {name for name, leaf in flat.items() if leaf.ndim > 1 and not leaf.any()}
    assert zero == {name for name in flat if "conv2']['kernel" in name or "out']['kernel" in name}


def test_fresh_keys_are_those_of_flax():
    """Other keys would change the parameters that a seed gives."""
    theirs, ours = nnx.Rngs(params=jax.random.key(7)), layers.fresh(jax.random.key(7))
    drawn = [[jax.random.key_data(rngs.params()) for _ in range(3)] for rngs in (theirs, ours)]
    np.testing.assert_array_equal(*drawn)


def test_group_norm_is_that_of_its_paper_in_float32():
    """With a large mean, statistics in 16-bit floats or by E[x^2] - E[x]^2 are wrong."""
    x = 100 + np.random.default_rng(0).normal(0, 1, (2, 6, 4, 64)).astype(np.float32)
    norm = layers.GroupNorm(64, dtype=jnp.dtype("float32"))
    norm.scale, norm.bias = nnx.Param(jnp.arange(64.0)), nnx.Param(jnp.arange(64.0) - 9)
    groups = x.astype(np.float64).reshape(2, 24, 32, 2)
    deviation = groups - groups.mean((1, 3), keepdims=True)
    expected = (deviation / np.sqrt(np.square(deviation).mean((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)
    np.testing.assert_allclose(norm(x), expected * np.arange(64) + np.arange(64) - 9, atol=5e-3)


@pytest.mark.parametrize("attention", ["none", "middle", "lowest"])
def test_weights_travel_by_taming_names(attention):
    config = dataclasses.replace(SMALL, attention=attention)
    params = random_params(config)
    state = taming.to_taming(config, params)
    assert "encoder.down.0.downsample.conv.weight" in state and "decoder.up.2.upsample.conv.weight" in state
    assert any("attn" in name for name in state) == (attention != "none")
    back, kept = taming.from_taming(config, state)
    assert back.keys() == {"encoder", "decoder"} and not kept  # fsq, by default, has no arrays
    jax.tree.map(np.testing.assert_array_equal, back, {name: params[name] for name in back})
    del state["quant_conv.bias"]
    with pytest.raises(ValueError, match="missing arrays .1.: quant_conv.bias"):
        taming.from_taming(config, state)


@pytest.mark.interop
@pytest.mark.parametrize(("factor", "attention"), [(8, "middle"), (16, "lowest")])
def test_encoder_equals_that_of_chameleon_in_transformers(factor, attention):
    torch = pytest.importorskip("torch", reason="parity with Hugging Face needs torch (the [interop] extra)")
    chameleon = pytest.importorskip(
        "transformers.models.chameleon", reason="parity with Hugging Face needs transformers"
    )
    multipliers = (1, 2, 2, 4) if factor == 8 else (1, 1, 2, 2, 4)
    config = AutoencoderConfig(backbone="vqgan", factor=factor, patch=1, width=32, multipliers=multipliers,
                               blocks=(2,) * len(multipliers), attention=attention, z_channels=16)  # fmt: skip
    params = random_params(config)
    pixels = random_images(2, 32, 32)
    peer = chameleon.modeling_chameleon.ChameleonVQVAE(
        chameleon.ChameleonVQVAEConfig(
            embed_dim=4, num_embeddings=16, latent_channels=16, base_channels=32, channel_multiplier=list(multipliers),
            num_res_blocks=2, resolution=32, attn_resolutions=[32 // factor] if attention == "lowest" else None,
        )
    )  # fmt: skip
    state = {name: torch.from_numpy(leaf.copy()) for name, leaf in taming.to_taming(config, params).items()}
    missing, unknown = peer.load_state_dict(state, strict=False)
    assert missing == ["quantize.embedding.weight"] and all(name.startswith("decoder.") for name in unknown)
    with torch.inference_mode():
        expected = peer.quant_conv(peer.encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    found = jax.jit(lambda params, x: Autoencoder.bind(config, params).encoder(x))(params, pixels)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-4)


def plain(x, kernel):
    """The sum over nine shifted images."""
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


@pytest.mark.parametrize(
    ("function", "definition", "shape"),
    [
        (convolution.winograd, plain, (2, 8, 5, 6)),
        (convolution.conv3x3, plain, (1, 4, 3, 128)),
        (convolution.conv3x3, plain, (1, 3, 4, 2)),
        (convolution.doubling_conv3x3, lambda x, k: plain(x.repeat(2, axis=1).repeat(2, axis=2), k), (2, 3, 5, 4)),
        # halving_conv3x3's windows begin at pixel 2i; those of the definition are centred on pixel i.
        (convolution.halving_conv3x3, lambda x, k: plain(x, k)[:, 1::2, 1::2], (2, 4, 6, 4)),
    ],
    ids=["winograd", "wide", "narrow", "doubling", "halving"],
)
def test_convolutions_and_their_gradients_equal_the_definition(function, definition, shape):
    draw = np.random.default_rng(0)
    x = draw.normal(size=shape).astype(np.float32)
    kernel = draw.normal(size=(3, 3, shape[-1], 6)).astype(np.float32) / np.sqrt(9 * shape[-1]).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, x, kernel):
        out, back = jax.vjp(function, x, kernel)
        return out, *back(jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    for found, expected in zip(run(function, x, kernel), run(definition, x, kernel), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.interop
def test_decoder_equals_that_of_taming_transformers_written_in_torch():
    torch = pytest.importorskip("torch", reason="parity with torch needs torch (the [interop] extra)")
    pytest.importorskip("transformers", reason="the decoder in torch is made of blocks that transformers has")
    from experiments.benchmarks.image_tokenizer import DIM, make_decoder

    config = AutoencoderConfig(backbone="vqgan", factor=2, patch=1, width=64, multipliers=(1, 2), blocks=(2, 2),
                               attention="middle", z_channels=DIM)  # fmt: skip
    params = random_params(config)
    names = {
        name.partition("decoder.")[2]: leaf
        for name, leaf in taming.to_taming(config, params).items()
        if "decoder" in name
    }
    peer = make_decoder(config.multipliers)
    peer.load_state_dict({name: torch.from_numpy(leaf.copy()) for name, leaf in names.items()})
    vectors = np.random.default_rng(2).normal(size=(2, 4, 6, 4)).astype(np.float32)
    first = params["decoder"]["from_code"]
    with torch.inference_mode():
        expected = peer(torch.from_numpy(vectors @ first["kernel"] + first["bias"]).permute(0, 3, 1, 2))
    found = jax.jit(lambda params, x: Autoencoder.bind(config, params).decoder(x))(params, vectors)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-4)
