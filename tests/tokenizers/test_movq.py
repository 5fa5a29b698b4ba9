"""MoVQGAN's network and Emu3's vision tokenizer: their results, and their weights, imported and exported."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ar_tokenizers.image import layers, movq, movq_weights
from ar_tokenizers.image.autoencoder import Autoencoder
from ar_tokenizers.image.config import PRESETS, AutoencoderConfig, config_from
from ar_tokenizers.image.tokenizer import ImageTokenizer
from flax import nnx

from tests.tokenizers import movq_transcription as original

CODES = 64
EMU3 = AutoencoderConfig(backbone="movq", factor=2, patch=1, width=32, multipliers=(1, 2), blocks=(1, 1),
                         attention="lowest", z_channels=4, temporal_blocks=1, quantizer="vq", codes=CODES, code_dim=4,
                         space="euclidean")  # fmt: skip
MOVQGAN = AutoencoderConfig(backbone="movq", factor=2, patch=1, width=32, multipliers=(1, 2), blocks=(1, 1),
                            attention="lowest", z_channels=5, quantizer="vq", codes=CODES, code_dim=4,
                            space="euclidean")  # fmt: skip
PICTURES = np.random.default_rng(1).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)


def published(config: AutoencoderConfig, seed: int = 0) -> tuple[original.Weights, dict]:
    """A tokenizer's file, with codes near its latents; and the shape arguments for the transcription."""
    lowest = len(config.multipliers) - 1
    shape = dict(ch=config.width, ch_mult=config.multipliers, blocks=config.blocks[0], z=config.z_channels,
                 attended=[lowest] * (config.attention == "lowest"), in_time=config.temporal_blocks > 0)  # fmt: skip
    weights = original.Weights(seed)
    found = original.latents(weights, PICTURES.transpose(0, 3, 1, 2), dim=config.code_dim, **shape)
    where = found.reshape(-1, config.code_dim)
    drawn = weights.draw.normal(where.mean(0), where.std(0), (CODES, config.code_dim)).astype(np.float32)
    weights["quantize.embedding.weight"] = drawn
    original.pixels(weights, drawn, np.zeros((1, 2, 2), int), **shape)  # draws the other arrays
    return weights, shape


def run(config: AutoencoderConfig, params: dict, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pixels -> latents, codes, and the pixels that they make."""

    @jax.jit
    def there_and_back(params, pixels):
        module = Autoencoder.bind(config, params)
        codes = module.encode(pixels)
        return module.encoder(pixels), codes, module.decode(codes)

    latents, codes, back = there_and_back(params, pixels)
    return np.asarray(latents), np.asarray(codes), np.asarray(back)


def bits(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple]:
    return {name: (leaf.dtype, leaf.shape, leaf.tobytes()) for name, leaf in arrays.items()}


@pytest.mark.parametrize(("config", "dialect"), [(MOVQGAN, "movqgan"), (EMU3, "emu3")], ids=["movqgan", "emu3"])
def test_a_picture_is_what_the_original_makes_of_it(config, dialect):
    """The original of Emu3 computes in three dimensions on four frames, ours in two dimensions."""
    weights, shape = published(config)
    assert movq_weights.dialect_of(weights) == dialect
    params, kept = movq_weights.from_published(config, weights, dialect)
    found, codes, pixels = run(config, params, PICTURES)
    table = weights["quantize.embedding.weight"]
    latents = original.latents(weights, PICTURES.transpose(0, 3, 1, 2), dim=config.code_dim, **shape)
    np.testing.assert_allclose(found, latents, atol=1e-5 * abs(latents).max())
    expected, margin = original.codes(table, latents)
    assert len(np.unique(expected)) > 9, "a codebook of which nearly nothing is used tells little"
    np.testing.assert_array_equal(codes[margin > 1e-4], expected[margin > 1e-4])
    assert (margin > 1e-4).mean() > 0.95
    there = original.pixels(weights, table, codes, **shape).transpose(0, 2, 3, 1)
    assert there.std() > 0.1
    np.testing.assert_allclose(pixels, there, atol=5e-5)

    back = movq_weights.to_published(config, params, kept, dialect)
    assert bits(back) == bits(weights)


def test_a_norm_that_reads_codes_starts_as_one_that_does_not():
    draw = np.random.default_rng(0)
    x, codes = draw.normal(2, 3, (2, 4, 6, 8)).astype(np.float32), draw.normal(size=(2, 2, 3, 5)).astype(np.float32)
    norm = movq.SpatialNorm(5, 8, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm(x, codes), layers.GroupNorm(8, dtype=jnp.dtype("float32"))(x))


# ---- names and settings -----------------------------------------------------------------------------------------


@functools.cache
def imported(dialect: str = "emu3") -> tuple[AutoencoderConfig, dict, dict, dict]:
    """config, the published file, parameters, and the arrays kept besides."""
    config = MOVQGAN if dialect == "movqgan" else EMU3
    weights, _ = published(config)
    return config, dict(weights), *movq_weights.from_published(config, weights, dialect)


def test_names_of_the_original_and_of_transformers_say_the_same():
    config, weights, params, kept = imported()
    port = movq_weights.to_published(config, params, kept, "emu3_hf")
    assert movq_weights.dialect_of(port) == "emu3_hf" and len(port) == len(weights)
    assert port["encoder.middle_block.attn_1.q_proj.weight"].shape == (64, 64)
    again, kept_again = movq_weights.from_published(config, port, "emu3_hf")
    jax.tree.map(np.testing.assert_array_equal, (again, kept_again), (params, kept))


def test_names_and_shapes_are_those_of_the_reference_models_list():
    listed = Path(__file__).parents[2].parent / "shared/reference/published_keys/emu3.keys.json"
    if not listed.exists():
        pytest.skip("the list of published names is not beside this repository")
    expected = {
        name.removeprefix("vqmodel."): tuple(shape)
        for name, (shape, _) in json.loads(listed.read_text()).items()
        if name.startswith("vqmodel.")
    }
    config = dataclasses.replace(EMU3, codes=512)
    zeros = {name: np.zeros(shape) for name, shape in expected.items()}
    params, kept = movq_weights.from_published(config, zeros, "emu3_hf")
    found = movq_weights.to_published(config, params, kept, "emu3_hf")
    assert {name: leaf.shape for name, leaf in found.items()} == expected


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"ch": 256, "ch_mult": [1, 2, 2, 4], "attn_resolutions": [3], "z_channels": 4, "double_z": False},
        {"base_channels": 256, "channel_multiplier": [1, 2, 2, 4], "hidden_size": 1024, "model_type": "emu3_vqgan"},
    ],
    ids=["nothing said", "original", "transformers"],
)
def test_settings_of_emu3_are_read_by_both_spellings(said):
    preset = PRESETS["emu3_vision_f8"] | dict(quantizer="vq", codes=32768, code_dim=4, space="euclidean")
    config = movq_weights.config_from_emu3(said)
    assert config == AutoencoderConfig.from_dict(preset)
    for dialect, spelt in (("emu3", "z_channels"), ("emu3_hf", "latent_channels")):
        settings = movq_weights.emu3_settings(config, dialect)
        assert settings[spelt] == 4 and said.items() <= ({"model_type": "emu3_vqgan"} | said | settings).items()
        assert movq_weights.config_from_emu3(json.loads(json.dumps(settings))) == config
    small = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [1], "codebook_size": CODES}
    assert movq_weights.config_from_emu3(small) == EMU3
    assert movq_weights.config_from_emu3(small | {"attn_resolutions": []}).attention == "middle"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"double_z": True}, "expected double_z False, found True"),
        ({"double_latent": True}, "expected double_latent False"),
        ({"temporal_downsample_factor": 2}, "expected temporal_downsample_factor 4, found 2"),
        ({"num_attention_heads": 8}, "expected num_attention_heads 1, found 8"),
        ({"attn_resolutions": [0, 3]}, r"expected attn_resolutions \[3\].*found \[0, 3\]"),
        ({"hidden_size": 512}, "expected hidden_size 1024, .*found 512"),
        ({"embed_dim": 8}, "code_dim must equal z_channels: found code_dim 8 and z_channels 4"),
    ],
)
def test_settings_that_nobody_published_are_refused(said, message):
    with pytest.raises(ValueError, match=message):
        movq_weights.config_from_emu3(said)


def test_movqgans_network_is_the_published_one_and_its_copies_are_not_read():
    config = movq_weights.movqgan_270m()
    assert (config.codes, config.code_dim, config.factor, config.temporal_blocks) == (16384, 4, 8, 0)
    small, weights, params, _ = imported("movqgan")
    more = {"ema_encoder.decay": np.float32(0.9), "ema_decoder.conv_inbias": np.zeros(9), "loss.logvar": np.zeros(())}
    again, kept = movq_weights.from_published(small, weights | more, "movqgan")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert kept == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.norm_out.conv_y.weight"), "missing arrays .1.: decoder.norm_out.conv_y.weight"),
        (lambda w: w.pop("encoder.time_conv.1.conv.conv.bias"), "missing arrays .1.: encoder.time_conv.1"),
        (lambda w: w.update(logit_scale=np.zeros(3)), "no place for .1.: logit_scale"),
        (lambda w: w.update({"quant_conv.conv.weight": np.zeros((4, 4, 1, 1))}), r"shape \[4, 4, 3, 1, 1\], found"),
    ],
    ids=["missing", "missing in time", "left over", "another shape"],
)
def test_files_of_another_network_are_refused(change, message):
    config, weights, *_ = imported()
    weights = dict(weights)
    change(weights)
    with pytest.raises(ValueError, match=message):
        movq_weights.from_published(config, weights, "emu3")


def test_wrong_dialects_are_refused():
    config, weights, params, kept = imported()
    with pytest.raises(ValueError, match="without temporal_blocks, found 'movq' with temporal_blocks=1"):
        movq_weights.from_published(config, weights, "movqgan")
    with pytest.raises(ValueError, match="'vqgan'"):
        movq_weights.from_published(config_from("taming_f8"), weights, "emu3")
    with pytest.raises(ValueError, match="one of movqgan, emu3, emu3_hf; found 'hf'"):
        movq_weights.to_published(config, params, kept, "hf")
    with pytest.raises(ValueError, match="found vocab"):
        movq_weights.dialect_of(["vocab"])
    with pytest.raises(ValueError, match="temporal_blocks: expected 0 or more for backbone 'movq'"):
        dataclasses.replace(config, backbone="vqgan")


# ---- as a folder ------------------------------------------------------------------------------------------------


def test_layers_in_time_are_kept_in_the_folder_and_come_back(tmp_path):
    config, weights, params, kept = imported()
    ImageTokenizer(config, params, published=kept).save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    back = movq_weights.to_published(loaded.config, loaded.params, loaded.published, "emu3")
    assert bits(back) == bits(weights)
    alone = ImageTokenizer(config, params)
    assert alone.hash == loaded.hash, "what the network does not compute with is no part of what it is"

    file = tmp_path / "published.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="published.safetensors: the file was changed"):
        ImageTokenizer.load(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="expected published.safetensors, which config.json names"):
        ImageTokenizer.load(tmp_path)
    loaded.save(tmp_path)
    assert file.exists()
    alone.save(tmp_path)
    assert not file.exists() and ImageTokenizer.load(tmp_path).published == {}


def test_what_was_trained_since_is_not_exported_as_published():
    config, _, params, kept = imported()
    with pytest.raises(ValueError, match="only an imported tokenizer"):
        movq_weights.to_published(config, params, {}, "emu3")
    moved = jax.tree.map(np.array, params)
    moved["decoder"]["temporal"]["double1"]["kernel"][1, 1, 0, 0] += 1e-3
    with pytest.raises(
        ValueError, match="weights decoder.temporal.double1.kernel differ .*: the network was trained after the import"
    ):
        movq_weights.to_published(config, moved, kept, "emu3")
    moved = jax.tree.map(np.array, params)
    moved["decoder"]["head"]["bias"] += 1  # not a layer over time
    assert "decoder.conv_out.bias" in movq_weights.to_published(config, moved, kept, "emu3")


def test_settings_that_came_later_leave_old_hashes_as_they_were():
    assert "temporal_blocks" not in AutoencoderConfig().identity()
    assert '"temporal_blocks": 1' in EMU3.identity() and '"backbone": "movq"' in EMU3.identity()


# ---- with transformers ----------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.slow
def test_emu3s_vision_tokenizer_equals_that_of_transformers():
    torch = pytest.importorskip("torch", reason="parity with Hugging Face needs torch (the [interop] extra)")
    emu3 = pytest.importorskip("transformers.models.emu3", reason="parity with Hugging Face needs transformers")
    torch.manual_seed(0)
    settings = emu3.Emu3VQVAEConfig(
        codebook_size=CODES, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=2, attn_resolutions=[1],
        hidden_size=64,
    )  # fmt: skip
    peer = emu3.modeling_emu3.Emu3VQVAE(settings).eval()
    draw = np.random.default_rng(0)
    pixels = draw.uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    theirs = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.inference_mode():
        for name, leaf in peer.state_dict().items():
            if name.endswith("running_var"):
                leaf.uniform_(0.02, 2)
            elif leaf.dtype == torch.int64:
                leaf.fill_(2**40 + 1)
            elif leaf.ndim == 1:
                leaf.normal_(float("norm" in name and name.endswith("weight")), 0.3)
        seen = []
        peer.quant_conv.register_forward_hook(lambda module, given, made: seen.append(made))
        sizes = torch.tensor([[8, 12]] * 2)
        peer.encode(theirs, image_sizes=sizes)
        latents = seen.pop()[:, :, 0].permute(0, 2, 3, 1).numpy()
        where = latents.reshape(-1, 4)
        table = draw.normal(where.mean(0), where.std(0), (CODES, 4)).astype(np.float32)
        peer.quantize.embedding.weight.copy_(torch.from_numpy(table))
        expected = torch.stack(peer.encode(theirs, image_sizes=sizes).image_tokens).numpy()
        # contiguous, because torch may store a kernel in another order of axes
        state = {name: leaf.numpy() for name, leaf in peer.state_dict().items()}

    config = movq_weights.config_from_emu3(settings.to_dict())
    assert movq_weights.dialect_of(state) == "emu3_hf"
    params, kept = movq_weights.from_published(config, state, "emu3_hf")
    ours, codes, found = run(config, params, pixels)
    np.testing.assert_allclose(ours, latents, atol=1e-5 * abs(latents).max())
    _, margin = original.codes(table, latents)
    assert len(np.unique(expected)) > 10 and (margin > 1e-4).mean() > 0.95
    np.testing.assert_array_equal(codes[margin > 1e-4], expected[margin > 1e-4])
    with torch.inference_mode():
        back = peer.decode(torch.from_numpy(codes.astype(np.int64))).permute(0, 2, 3, 1).numpy()
    assert back.std() > 0.1
    np.testing.assert_allclose(found, back, atol=5e-5)

    again = movq_weights.to_published(config, params, kept, "emu3_hf")
    assert bits(again) == bits(state)
    peer.load_state_dict({name: torch.from_numpy(leaf.copy()) for name, leaf in again.items()}, strict=True)
