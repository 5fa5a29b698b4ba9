"""Published image tokenizers: their results, and their files, imported and exported.

Chameleon's and LlamaGen's are compared with results of the originals on small random weights (the shared vectors).
Show-o's, Emu3.5's IBQ, Janus' and LWM's cannot be installed here, and are compared with transcriptions
(vqgan_transcription.py).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ar_tokenizers.image import published, taming
from ar_tokenizers.image.autoencoder import Autoencoder, init
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.published import config_of, from_published, settings_of, to_published
from ar_tokenizers.image.tokenizer import ImageTokenizer
from safetensors.numpy import load_file

from tests.tokenizers import vqgan_transcription as original

SHARED = Path(__file__).parents[3] / "shared"
LATENTS, PIXELS = (
    2e-5,
    5e-5,
)  # absolute, for float32; at least four times the differences of the originals from themselves
SURE = 1e-4  # codes may differ if the distances of the two nearest differ by less than this, relative
PICTURES = np.random.default_rng(1).uniform(-1, 1, (2, 3, 16, 24)).astype(np.float32)

_SMALL = AutoencoderConfig(backbone="vqgan", factor=4, patch=1, width=32, multipliers=(1, 2, 2), blocks=(1, 1, 1),
                           attention="middle", z_channels=16, quantizer="vq", codes=64, code_dim=16,
                           space="euclidean")  # fmt: skip
CHAMELEON_HF = dataclasses.replace(_SMALL, factor=2, multipliers=(1, 2), blocks=(1, 1))
LLAMAGEN = dataclasses.replace(_SMALL, attention="lowest", space="sphere", codes=256, code_dim=8)
SHOWO = dataclasses.replace(_SMALL, quantizer="lfq", space="sphere", code_dim=0, z_channels=6, blocks=(2, 1, 1),
                            decoder_multipliers=(1, 1, 2), decoder_blocks=(1, 2, 1))  # fmt: skip
IBQ = dataclasses.replace(_SMALL, attention="lowest", quantizer="ibq", space="sphere", code_dim=8, blocks=(1, 2, 1))
JANUS = dataclasses.replace(LLAMAGEN, codes=64)
LWM = dataclasses.replace(_SMALL, attention="none", multipliers=(1, 1, 2), code_dim=12)


class Reference(NamedTuple):
    """A small tokenizer in a published file, and the results of its own code for pictures [B, 3, H, W]."""

    config: AutoencoderConfig
    dialect: str
    tensors: dict[str, np.ndarray]
    pictures: np.ndarray
    latents: np.ndarray  # [B, h, w, C]
    codes: np.ndarray  # [B, h, w]
    back: np.ndarray | None  # [B, H, W, 3] of those codes
    sure: np.ndarray  # bool [B, h, w]


def _vectors(config: AutoencoderConfig, dialect: str, name: str, rule: str) -> Reference:
    file = SHARED / "vectors" / f"{name}.safetensors"
    if not file.exists():
        pytest.skip("what the reference implementations computed is not beside this repository")
    tensors, found = load_file(file), np.load(file.with_suffix(".npz"))
    latents = found["z"].transpose(0, 2, 3, 1)
    _, margin = original.nearest(tensors["quantize.embedding.weight"], latents, rule)
    back = found["rec"].transpose(0, 2, 3, 1) if "rec" in found else None
    codes = found["codes"].reshape(latents.shape[:3])
    return Reference(config, dialect, tensors, found["px"], latents, codes, back, margin > SURE)


def _codebook(weights: dict, name: str, latents: np.ndarray, codes: int, seed: int = 3) -> np.ndarray:
    """Codes near the latents, because otherwise almost none would be used."""
    where = latents.reshape(-1, latents.shape[-1])
    drawn = np.random.default_rng(seed).normal(where.mean(0), where.std(0), (codes, where.shape[1]))
    weights[name] = drawn.astype(np.float32)
    return weights[name]  # the stored float32 array


def _showo() -> Reference:
    weights, shape = original.Weights(0), dict(ch=32, bits=6)
    z = original.showo_latents(weights, PICTURES, ch_mult=(1, 2, 2), blocks=(2, 1, 1), **shape)
    codes, sure = original.showo_codes(z), (np.abs(z) > SURE).all(1)
    back = original.showo_pixels(weights, codes, ch_mult=(1, 1, 2), blocks=(1, 2, 1), **shape)
    latents = z.transpose(0, 2, 3, 1)[..., ::-1]  # the lowest digit first, like ours
    return Reference(SHOWO, "showo", weights, PICTURES, latents, codes, back.transpose(0, 2, 3, 1), sure)


def _ibq() -> Reference:
    weights, shape = original.Weights(0), dict(ch=32, ch_mult=(1, 2, 2), blocks=(1, 2, 1), attended=[2], z=16)
    latents = original.ibq_latents(weights, PICTURES, dim=8, **shape).transpose(0, 2, 3, 1)
    table = _codebook(weights, "quantize.embedding.weight", latents, IBQ.codes)
    mean = latents.mean((0, 1, 2))
    table -= np.float32(
        np.outer(table @ mean, mean) / (mean @ mean)
    )  # otherwise all latents choose the code nearest to the mean
    codes, margin = original.nearest(table, latents, "dot")
    back = original.ibq_pixels(weights, codes, **shape).transpose(0, 2, 3, 1)
    return Reference(IBQ, "taming", weights, PICTURES, latents, codes, back, margin > SURE)


def _janus() -> Reference:
    weights, shape = original.Weights(0), dict(ch=32, ch_mult=(1, 2, 2), blocks=1, z=16)
    latents = original.janus_latents(weights, PICTURES, dim=8, **shape).transpose(0, 2, 3, 1)
    table = _codebook(weights, "quantize.embedding.weight", latents, JANUS.codes)
    codes, margin = original.nearest(table, latents, "cosine")
    back = original.janus_pixels(weights, codes, **shape).transpose(0, 2, 3, 1)
    return Reference(JANUS, "janus", weights, PICTURES, latents, codes, back, margin > SURE)


def _lwm() -> Reference:
    weights, shape = original.FlaxWeights(0), dict(ch=32, ch_mult=(1, 1, 2), blocks=1, z=16)
    latents = original.lwm_latents(weights, PICTURES.transpose(0, 2, 3, 1), dim=12, **shape)
    table = _codebook(weights, "quantize/embeddings", latents, LWM.codes)
    codes, margin = original.nearest(table, latents, "euclidean")
    return Reference(LWM, "lwm", weights, PICTURES, latents, codes, original.lwm_pixels(weights, codes, **shape),
                     margin > SURE)  # fmt: skip


REFERENCES = {
    "chameleon_hf": lambda: _vectors(CHAMELEON_HF, "chameleon_hf", "ref_chamvq", "euclidean"),
    "chameleon": lambda: _vectors(_SMALL, "taming", "o_meta", "euclidean"),
    "llamagen": lambda: _vectors(LLAMAGEN, "llamagen", "o_llamagen", "cosine"),
    "showo": _showo,
    "ibq": _ibq,
    "janus": _janus,
    "lwm": _lwm,
}
EVERY = pytest.mark.parametrize("name", REFERENCES)


@functools.cache
def reference(name: str) -> Reference:
    return REFERENCES[name]()


@functools.cache
def imported(name: str) -> ImageTokenizer:
    here = reference(name)
    return from_published(here.config, here.tensors, here.dialect, batch_size=2)


def run(tokenizer: ImageTokenizer, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, 3, H, W] -> latents in the form that is compared with codes, and codes."""
    latents, codes = _encode(tokenizer.config, tokenizer.params, pictures.transpose(0, 2, 3, 1))
    return np.asarray(latents), np.asarray(codes)


def decoded(tokenizer: ImageTokenizer, codes: np.ndarray) -> np.ndarray:
    """Codes [B, h, w] -> pixels [B, H, W, 3], neither clipped nor rounded."""
    return np.asarray(_decode(tokenizer.config, tokenizer.params, codes.astype(np.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, params, pixels):
    module = Autoencoder.bind(config, params)
    return module.encoder(pixels), module.encode(pixels)


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, params, codes):
    return Autoencoder.bind(config, params).decode(codes)


def bits(arrays: dict) -> dict:
    return {name: (leaf.dtype, leaf.shape, leaf.tobytes()) for name, leaf in arrays.items()}


# ---- what they compute ------------------------------------------------------------------------------------------


@EVERY
def test_codes_and_pixels_are_those_of_the_original(name):
    here, tokenizer = reference(name), imported(name)
    latents, codes = run(tokenizer, here.pictures)
    np.testing.assert_allclose(latents, here.latents, atol=LATENTS)
    np.testing.assert_array_equal(codes[here.sure], here.codes[here.sure])
    assert here.sure.mean() > 0.95 and len(np.unique(here.codes)) > 20, "too little is compared"
    if here.back is None:
        return
    pixels = decoded(tokenizer, here.codes)
    assert here.back.std() > 0.1
    np.testing.assert_allclose(pixels, here.back, atol=PIXELS)


@EVERY
def test_a_file_comes_back_bit_by_bit(name):
    here, tokenizer = reference(name), imported(name)
    assert bits(to_published(tokenizer, here.dialect)) == bits(here.tensors)
    spoken = {"janus": "llamagen", "ibq": "taming", "chameleon": "taming"}.get(name, name)
    assert taming.dialect_of(here.tensors) == spoken


@pytest.mark.parametrize("name", ["chameleon", "chameleon_hf"])
def test_cosine_for_euclidean_changes_codes(name):
    here = reference(name)
    config = dataclasses.replace(here.config, space="sphere")
    if here.dialect == "chameleon_hf":
        with pytest.raises(ValueError, match="expected space 'euclidean', found 'sphere'"):
            from_published(config, here.tensors, here.dialect)
    params, _ = taming.from_taming(here.config, here.tensors, here.dialect)
    _, codes = run(ImageTokenizer(config, params), here.pictures)
    assert (codes != here.codes).mean() > 0.1


def test_euclidean_for_cosine_as_transformers_janus_has_it_changes_codes():
    here = reference("janus")
    params, _ = taming.from_taming(here.config, here.tensors, "janus")
    _, codes = run(ImageTokenizer(dataclasses.replace(here.config, space="euclidean"), params), here.pictures)
    assert (codes != here.codes).mean() > 0.1


def test_the_lowest_digit_first_changes_codes():
    here = reference("showo")
    other = dict(here.tensors)
    for name in ("encoder.quant_conv.weight", "encoder.quant_conv.bias"):
        other[name] = other[name][::-1]
    _, codes = run(from_published(here.config, other, "showo"), here.pictures)
    assert (codes != here.codes).mean() > 0.5
    other["quantize.power_vals"] = other["quantize.power_vals"][::-1]
    with pytest.raises(ValueError, match="quantize.power_vals: expected the values that the codes' digits give"):
        from_published(here.config, other, "showo")


def test_levels_counted_from_the_other_end_change_pixels_where_their_shapes_do_not_tell():
    """transformers' Janus numbers a decoder's levels from the coarsest. With equal widths, shapes fit in both
    orders."""
    config = dataclasses.replace(JANUS, multipliers=(1, 1, 1))
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(draw.normal(leaf.ndim == 1, 0.06, leaf.shape)), shapes)
    tokenizer = ImageTokenizer(config, params)
    tensors = to_published(tokenizer, "janus_hf")
    assert taming.dialect_of(tensors) == "janus_hf"
    assert "decoder.up.0.attn.0.q.weight" in tensors and "decoder.up.2.upsample.conv.weight" not in tensors
    with pytest.raises(ValueError, match=r"missing arrays .*: decoder.up.2.attn.0"):
        from_published(config, tensors, "taming")  # attention and upsampling show the order

    def turned(name: str) -> str:
        return re.sub(r"^decoder\.up\.(\d)\.block", lambda m: f"decoder.up.{2 - int(m[1])}.block", name)

    unreversed = from_published(config, {turned(name): leaf for name, leaf in tensors.items()}, "janus_hf")
    codes = draw.integers(0, 64, (1, 3, 4))
    right, wrong = decoded(tokenizer, codes), decoded(unreversed, codes)
    assert from_published(config, tensors, "janus_hf").hash == tokenizer.hash
    assert np.abs(right - wrong).max() > 100 * PIXELS


def test_original_and_transformers_janus_are_one_tokenizer():
    tokenizer = imported("janus")
    port = to_published(tokenizer, "janus_hf")
    again = from_published(JANUS, port, "janus_hf")
    assert again.hash == tokenizer.hash and not again.published
    back = to_published(again, "janus")
    assert back.keys() == reference("janus").tensors.keys() and not back["quantize.codebook_used"].any()


# ---- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "config", "dialect"),
    [("janus_vq", LLAMAGEN, "janus_hf"), ("chameleon_pre", CHAMELEON_HF, "chameleon_hf")],
)
def test_names_and_shapes_are_those_of_the_reference_models_list(listed, config, dialect):
    file = SHARED / "reference" / "published_keys" / f"{listed}.keys.json"
    if not file.exists():
        pytest.skip("the list of published names is not beside this repository")
    names = json.loads(file.read_text())
    prefix = published.prefix_of(names, dialect)
    expected = {name: tuple(shape) for name, (shape, _) in names.items() if name.startswith(prefix)}
    assert bool(prefix) == (listed == "chameleon_pre")
    zeros = {name: np.zeros(shape, np.float32) for name, (shape, _) in names.items()}  # including a language model's
    found = to_published(from_published(config, zeros, dialect), dialect, prefix=prefix)
    assert {name: leaf.shape for name, leaf in found.items()} == expected


def test_half_precision_goes_in_and_out():
    import ml_dtypes

    here = reference("janus")
    half = {f"gen_vision_model.{name}": leaf.astype(ml_dtypes.bfloat16) for name, leaf in here.tensors.items()}
    half["language_model.lm_head.weight"] = np.zeros((2, 2))
    tokenizer = from_published(here.config, half, "janus")
    del half["language_model.lm_head.weight"]
    assert bits(to_published(tokenizer, "janus", prefix="gen_vision_model.", dtype=ml_dtypes.bfloat16)) == bits(half)


LOSSES = {"loss.discriminator.main.0.weight": np.zeros(3), "model_ema.decay": np.zeros(())}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ibq", lambda t: t.pop("quantize.embedding.weight"), "missing arrays .1.: quantize.embedding.weight"),
        ("ibq", lambda t: t.update({"encoder.conv_im.bias": np.zeros(3)}), "no place for .1.: encoder.conv_im.bias"),
        (
            "ibq",
            lambda t: t.update({"quant_conv.bias": np.zeros(9)}),
            r"quant_conv.bias: the config asks for shape \[8\], f",
        ),
        ("ibq", lambda t: [t.pop(n) for n in list(t) if n.startswith("decoder.")], "missing arrays .*vqgan.ckpt"),
        ("janus", lambda t: t.update(LOSSES), "no place for .2.: loss.discriminator.main.0.weight, model_ema.decay"),
        ("janus", lambda t: t.update({"quantize.codebook_used": np.zeros(9)}), r"expected \[65536\], found \[9\]"),
        (
            "lwm",
            lambda t: t.pop("decoder/UpsamplingBlock_0/Upsample_0/Conv_0/bias"),
            "missing arrays .*: decoder/Upsampl",
        ),
        (
            "showo",
            lambda t: t.pop("decoder.post_quant_conv.bias"),
            "missing arrays .1.: decoder.post_quant_conv.bias",
        ),
    ],
)
def test_files_of_another_network_are_refused(name, change, message):
    here = reference(name)
    tensors = dict(here.tensors)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        from_published(here.config, tensors, here.dialect)


def test_losses_and_moving_averages_are_not_read():
    here = reference("ibq")
    assert from_published(here.config, here.tensors | LOSSES, "taming").hash == imported("ibq").hash


def test_networks_that_a_dialect_has_no_words_for_are_refused():
    for dialect, changes, message in (
        ("llamagen", dict(attention="middle"), "named as in llamagen: expected attention 'lowest', found 'middle'"),
        ("lwm", dict(space="euclidean"), "named as in lwm: expected attention 'none', found 'lowest'"),
        ("showo", {}, "named as in showo: expected quantizer 'lfq', found 'vq'"),
        ("taming", dict(patch=2, factor=8), "expected patch 1, found 2"),
        ("taming", dict(quantizer="simvq"), "no name for quantizer"),
        ("vqgan", {}, "expected one of taming, .*found 'vqgan'"),
    ):
        with pytest.raises(ValueError, match=message):
            taming.to_taming(dataclasses.replace(JANUS, **changes), {"decoder": {}}, dialect=dialect)
    with pytest.raises(ValueError, match="expected names like .*found vocab"):
        taming.dialect_of(["vocab"])


# ---- without a decoder ------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_decoder_reads_images_and_says_why_it_draws_none(tmp_path):
    here, whole = reference("ibq"), imported("ibq")
    params = {name: part for name, part in whole.params.items() if name != "decoder"}
    tokenizer = ImageTokenizer(here.config, params, batch_size=2)
    assert whole.no_decoder == "" and "vqgan.ckpt" in tokenizer.no_decoder
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
    codes = tokenizer.encode(images)
    np.testing.assert_array_equal(codes, whole.encode(images))
    with pytest.raises(ValueError, match=re.escape(tokenizer.no_decoder)):
        tokenizer.decode(codes)
    with pytest.raises(ValueError, match=re.escape(tokenizer.no_decoder)):
        Autoencoder.bind(here.config, tokenizer.params).decode(codes)
    with pytest.raises(ValueError, match=re.escape(tokenizer.no_decoder)):
        to_published(tokenizer, "taming")
    assert tokenizer.hash != whole.hash
    tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert loaded.hash == tokenizer.hash and loaded.no_decoder
    np.testing.assert_array_equal(loaded.vectors(), whole.vectors())
    del params["quantizer"]
    with pytest.raises(ValueError, match="quantizer.codebook: the config asks for .*, found no such weight"):
        ImageTokenizer(here.config, params)


def test_transformers_chameleon_is_exported_from_what_it_was_and_from_the_original(tmp_path):
    """Its file has post_quant_conv although it has no decoder. This layer is kept, or taken from the decoder if there
    is one."""
    tokenizer = imported("chameleon_hf")
    assert tokenizer.no_decoder and set(tokenizer.published) == {"post_quant_conv.weight", "post_quant_conv.bias"}
    tokenizer.save(tmp_path)
    again = to_published(ImageTokenizer.load(tmp_path), "chameleon_hf")
    assert bits(again) == bits(reference("chameleon_hf").tensors)
    with pytest.raises(ValueError, match=r"expected post_quant_conv\.\w+ among the arrays that the tokenizer keeps"):
        to_published(ImageTokenizer(tokenizer.config, tokenizer.params), "chameleon_hf")

    whole = reference("chameleon")
    port = to_published(imported("chameleon"), "chameleon_hf")
    assert bits(port) == bits({n: leaf for n, leaf in whole.tensors.items() if not n.startswith("decoder.")})


# ---- with transformers ----------------------------------------------------------------------------------------


@pytest.mark.interop
def test_transformers_chameleon_finds_the_same_codes_and_takes_our_file():
    torch = pytest.importorskip("torch", reason="parity with Hugging Face needs torch (the [interop] extra)")
    chameleon = pytest.importorskip("transformers.models.chameleon", reason="parity needs transformers")
    tokenizer = from_published(_SMALL, taming_only(_SMALL), "taming")
    port = to_published(tokenizer, "chameleon_hf")
    settings = chameleon.ChameleonVQVAEConfig(**settings_of(_SMALL, "chameleon_hf", resolution=64))
    peer = chameleon.modeling_chameleon.ChameleonVQVAE(settings).eval()
    peer.load_state_dict({name: torch.from_numpy(leaf.copy()) for name, leaf in port.items()}, strict=True)
    assert config_of("chameleon_vq", settings.to_dict()) == _SMALL
    with torch.inference_mode():
        pictures = torch.from_numpy(PICTURES)
        latents = peer.quant_conv(peer.encoder(pictures)).permute(0, 2, 3, 1).numpy()
        expected = peer.encode(pictures).image_tokens.numpy().reshape(2, 4, 6)
    found, codes = run(tokenizer, PICTURES)
    np.testing.assert_allclose(found, latents, atol=LATENTS)
    _, margin = original.nearest(port["quantize.embedding.weight"], latents, "euclidean")
    np.testing.assert_array_equal(codes[margin > SURE], expected[margin > SURE])
    assert len(np.unique(expected)) > 10


@pytest.mark.interop
def test_transformers_janus_draws_the_same_and_takes_our_file():
    """The decoder normalises codes, as the original does; the encoder does not, so it finds other codes."""
    torch = pytest.importorskip("torch", reason="parity with Hugging Face needs torch (the [interop] extra)")
    janus = pytest.importorskip("transformers.models.janus", reason="parity needs transformers")
    tokenizer, square = imported("janus"), np.random.default_rng(0).integers(0, 64, (2, 4, 4))
    port = to_published(tokenizer, "janus_hf")
    settings = janus.JanusVQVAEConfig(**settings_of(JANUS, "janus_hf", resolution=16))
    peer = janus.modeling_janus.JanusVQVAE(settings).eval()
    peer.load_state_dict({name: torch.from_numpy(leaf.copy()) for name, leaf in port.items()}, strict=True)
    assert config_of("janus_vq", settings.to_dict()) == JANUS
    with torch.inference_mode():
        expected = peer.decode(torch.from_numpy(square.reshape(2, 16))).permute(0, 2, 3, 1).numpy()
        theirs = peer.encode(torch.from_numpy(PICTURES[..., :16])).image_tokens.numpy().reshape(2, 4, 4)
    np.testing.assert_allclose(decoded(tokenizer, square), expected, atol=PIXELS)
    _, codes = run(tokenizer, PICTURES[..., :16])
    assert (codes != theirs).mean() > 0.1, "transformers finds the original's codes now: say so in published.py"


def taming_only(config: AutoencoderConfig) -> dict[str, np.ndarray]:
    """A file of Meta's Chameleon VQGAN with these sizes, made by the transcription."""
    weights = original.Weights(0)
    shape = dict(ch=config.width, ch_mult=config.multipliers, blocks=config.blocks, attended=(), z=config.z_channels)
    latents = original.ibq_latents(weights, PICTURES, dim=config.code_dim, **shape).transpose(0, 2, 3, 1)
    _codebook(weights, "quantize.embedding.weight", latents, config.codes)
    original.ibq_pixels(weights, np.zeros((1, 2, 2), int), **shape)
    return dict(weights)
