"""Settings of published image tokenizers are read from their records and written back; and published sizes."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import pytest
from ar_tokenizers.image import taming
from ar_tokenizers.image.autoencoder import init
from ar_tokenizers.image.config import PRESETS, AutoencoderConfig, config_from
from ar_tokenizers.image.published import config_of, settings_of

from tests.tokenizers.test_published_image import CHAMELEON_HF, IBQ, JANUS, LWM, SHOWO

META: dict[str, Any] = {  # vqgan.yaml
    "model": {
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "ddconfig": {
                "attn_resolutions": [], "ch": 128, "ch_mult": [1, 1, 2, 2, 4], "double_z": False, "dropout": 0.0,
                "in_channels": 3, "num_res_blocks": 2, "out_ch": 3, "resolution": 512, "z_channels": 256,
            },
            "embed_dim": 256, "n_embed": 8192, "lossconfig": {"target": "nothing"},
        },
    }
}  # fmt: skip
HF = {"vq_config": {"embed_dim": 256, "num_embeddings": 8192, "resolution": 512, "attn_resolutions": None}}
IBQ_YAML = {
    "ddconfig": dict(META["model"]["params"]["ddconfig"], ch=256, num_res_blocks=4, resolution=256,
                     attn_resolutions=[16]),
    "embed_dim": 256, "n_embed": 131072, "cosine_similarity": False,
}  # fmt: skip
CHAMELEON = PRESETS["chameleon_f16"] | dict(quantizer="vq", codes=8192, code_dim=256, space="euclidean")
VQ16 = PRESETS["taming_f16"] | dict(quantizer="vq", codes=16384, code_dim=8)
NAMES8 = [f"encoder.conv_blocks.{level}.res.0.conv1.bias" for level in range(4)]


@pytest.mark.parametrize(
    ("system", "record", "names", "expected"),
    [
        ("chameleon_vq", META, (), CHAMELEON),
        ("chameleon_vq", HF, (), CHAMELEON),
        ("chameleon_vq", HF["vq_config"] | {"attn_type": "none"}, (), CHAMELEON | {"attention": "none"}),
        ("llamagen_vq", {}, (), VQ16),
        ("llamagen_vq", {}, NAMES8, PRESETS["taming_f8"] | dict(quantizer="vq", codes=16384, code_dim=8)),
        ("llamagen_vq", {"codebook_size": 4096, "codebook_embed_dim": 32}, (), VQ16 | dict(codes=4096, code_dim=32)),
        ("janus_vq", {"gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}}},
         (), VQ16),
        ("janus_vq", {"vq_config": {"embed_dim": 8, "num_embeddings": 16384, "num_patches": 24}}, (), VQ16),
        ("showo_vq", {}, (), PRESETS["showo_f16"] | dict(quantizer="lfq", codes=8192)),
        ("lwm_vq", {}, (), PRESETS["lwm_f16"] | dict(quantizer="vq", codes=8192, code_dim=64, space="euclidean")),
        ("ibq", IBQ_YAML, (), PRESETS["ibq_f16"] | dict(width=256, quantizer="ibq", codes=131072, code_dim=256)),
    ],
)  # fmt: skip
def test_settings_are_read_as_they_were_published(system, record, names, expected):
    assert config_of(system, record, names) == AutoencoderConfig.from_dict(expected)


@pytest.mark.parametrize(
    ("system", "dialect", "config"),
    [
        ("chameleon_vq", "taming", AutoencoderConfig.from_dict(CHAMELEON)),
        ("chameleon_vq", "chameleon_hf", dataclasses.replace(CHAMELEON_HF, attention="none")),
        ("chameleon_vq", "chameleon_hf", dataclasses.replace(CHAMELEON_HF, attention="lowest")),
        ("ibq", "taming", dataclasses.replace(IBQ, blocks=(1, 1, 1))),
        ("janus_vq", "janus_hf", JANUS),
        ("llamagen_vq", "llamagen", AutoencoderConfig.from_dict(VQ16 | dict(codes=4096))),
    ],
)
def test_settings_are_written_as_they_are_read(system, dialect, config):
    record = settings_of(config, dialect)
    assert config_of(system, json.loads(json.dumps(record))) == config
    assert settings_of(SHOWO, "showo") == settings_of(LWM, "lwm") == {}


def _dd(**changes) -> dict:
    params = META["model"]["params"]
    return {"params": params | {"ddconfig": params["ddconfig"] | changes}}


@pytest.mark.parametrize(
    ("system", "record", "message"),
    [
        ("chameleon_vq", _dd(double_z=True), "chameleon_vq: expected double_z False, found True"),
        ("chameleon_vq", _dd(attn_resolutions=[64, 32]), r"attn_resolutions \[32\], the lowest of .*found \[64, 32\]"),
        ("chameleon_vq", {"ddconfig": {"ch": 128}}, "settings: expected ch_mult, num_res_blocks, z_channels, n_embed"),
        ("chameleon_vq", HF["vq_config"] | {"in_channels": 4}, "expected in_channels 3, found 4"),
        ("ibq", IBQ_YAML | {"cosine_similarity": True}, "ibq: expected cosine_similarity False, found True"),
        ("ibq", {}, "ibq: expected its config.yaml, with ddconfig"),
        ("llamagen_vq", {"codebook_l2_norm": False}, "expected codebook_l2_norm True, found False"),
        ("llamagen_vq", {"encoder_ch_mult": [1, 2]}, r"expected 5 levels \(VQ-16\) or 4 \(VQ-8\), found 2"),
        ("llamagen_vq", {"decoder_ch_mult": [1, 2, 2, 2, 4]}, r"expected decoder_ch_mult \[1, 1, 2, 2, 4\], found"),
        ("janus_vq", {"gen_vision_config": {"cls": "VQ-8"}}, "expected gen_vision_config.cls 'VQ-16', found 'VQ-8'"),
        ("vq", {}, "expected one of chameleon_vq, .*found 'vq'"),
    ],
)
def test_settings_that_no_published_tokenizer_has_are_refused(system, record, message):
    with pytest.raises(ValueError, match=message):
        config_of(system, record)


def test_lwms_file_has_the_published_size():
    """585 MB of float32, according to the model's page."""
    shapes = jax.eval_shape(functools.partial(init, config_of("lwm_vq", {})), jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) * 4 / 1e6) == 585


def test_real_sizes_are_those_of_the_reference():
    """Published shapes of codebooks and of the convolutions before them."""
    wanted = {
        ("chameleon_vq", "taming"): ("quantize.embedding.weight", (8192, 256)),
        ("llamagen_vq", "llamagen"): ("quant_conv.weight", (8, 256, 1, 1)),
        ("janus_vq", "janus"): ("quantize.embedding.weight", (16384, 8)),
        ("showo_vq", "showo"): ("encoder.quant_conv.weight", (13, 13, 1, 1)),
        ("lwm_vq", "lwm"): ("quantize/embeddings", (8192, 64)),
    }
    for (system, dialect), (name, shape) in wanted.items():
        places = taming._places(config_of(system, {}), dialect)
        assert {place.name: place.shape for place in places.values()}[name] == shape
    assert config_from("showo_f16", quantizer="lfq", codes=8192).decoder_levels == (
        (128, 4), (128, 4), (256, 3), (256, 4), (512, 3),
    )  # fmt: skip
