"""Imports image tokenizers from published files, and exports them as the same files.

    config = config_of("llamagen_vq", {}, names=tensors)
    tokenizer = from_published(config, tensors, "llamagen")
    tensors = to_published(tokenizer, "llamagen")

A system (a key of SYSTEMS) defines the names of the settings in published files, and the values of settings that the
files leave out. A dialect (taming.DIALECTS, movq_weights.DIALECTS) defines the names of the weights. Import and export
are exact: every array keeps its name and its bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from ar_tokenizers.image import movq_weights, taming
from ar_tokenizers.image.config import PRESETS, AutoencoderConfig
from ar_tokenizers.image.tokenizer import ImageTokenizer

SYSTEMS = {  # system -> the dialects of its files
    "chameleon_vq": ("taming", "chameleon_hf"),
    "ibq": ("taming",),
    "llamagen_vq": ("llamagen",),
    "janus_vq": ("janus", "janus_hf"),
    "showo_vq": ("showo",),
    "lwm_vq": ("lwm",),
    "emu3_vq": ("emu3", "emu3_hf"),
    "movqgan": ("movqgan",),
}
_PREFIXES = ("gen_vision_model.", "model.vqmodel.", "vqmodel.")

# ---- weights ----------------------------------------------------------------------------------------------------


def prefix_of(names: Iterable[str], dialect: str) -> str:
    """The prefix of the tokenizer's tensor names in a file that also holds a language model; "" in a separate file."""
    prefix = taming.DIALECTS[dialect].prefix if dialect in taming.DIALECTS else ""
    return prefix if prefix and any(name.startswith(prefix) for name in names) else ""


def dialect_in(system: str, names: Iterable[str]) -> tuple[str, str]:
    """The dialect of a system's file, and the prefix of the names of the tokenizer's tensors ("" in a separate file).

    Raises:
      ValueError: the names are those of another system.
    """
    names = set(names)
    prefix = next((each for each in _PREFIXES if any(name.startswith(each) for name in names)), "")
    dialects = SYSTEMS[system]
    family: Any = movq_weights if dialects[0] in movq_weights.DIALECTS else taming
    found = family.dialect_of(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    # Janus has the same names as LlamaGen.
    found = "janus" if (found, system) == ("llamagen", "janus_vq") else found
    if found not in dialects:
        raise ValueError(f"{system}: expected names of weights as in {' or '.join(dialects)}, found those of {found}")
    return found, prefix


def not_read(names: Iterable[str], dialect: str) -> list[str]:
    """The names in a file that do not belong to the network, such as losses. They are not imported or exported."""
    movq = dialect in movq_weights.DIALECTS
    begins = movq_weights.NOT_READ if movq else taming.DIALECTS[dialect].not_read
    return sorted(name for name in names if name.startswith(begins or ("\0",)))


def from_published(
    config: AutoencoderConfig, tensors: Mapping[str, object], dialect: str, *, batch_size: int = 64
) -> ImageTokenizer:
    """Makes a tokenizer from a file's tensors.

    Args:
      tensors: the tensors by name. If the file also has a language model, only names with the dialect's prefix are
        read.
      dialect: a name in taming.DIALECTS or movq_weights.DIALECTS. "chameleon_hf" makes a tokenizer without a decoder.

    Raises:
      ValueError: tensors are missing, left over, or have another shape than the config asks for; the message names
        them.
    """
    prefix = prefix_of(tensors, dialect)
    state = {name.removeprefix(prefix): leaf for name, leaf in tensors.items() if name.startswith(prefix)}
    read: Any = movq_weights.from_published if dialect in movq_weights.DIALECTS else taming.from_taming
    params, kept = read(config, state, dialect)
    return ImageTokenizer(config, params, batch_size=batch_size, published=kept)


def to_published(
    tokenizer: ImageTokenizer, dialect: str, *, prefix: str = "", dtype: DTypeLike = np.float32
) -> dict[str, np.ndarray]:
    """The inverse of `from_published`: every tensor of a published file.

    Args:
      prefix: is put before every name; for a file with a language model, use the result of `prefix_of`.
      dtype: the dtype of all tensors that are not integers.

    Raises:
      ValueError: the tokenizer's network, or the arrays kept from its file, do not fit the dialect.
    """
    write: Any = movq_weights.to_published if dialect in movq_weights.DIALECTS else taming.to_taming
    found = write(tokenizer.config, tokenizer.params, tokenizer.published, dialect)
    return {
        prefix + name: leaf if np.issubdtype(leaf.dtype, np.integer) else leaf.astype(dtype, copy=False)
        for name, leaf in found.items()
    }


# ---- settings ---------------------------------------------------------------------------------------------------

# Our name -> (the name in taming's ddconfig or next to ddconfig, the name in transformers' vq_config).
_SPELLINGS = {
    "width": ("ch", "base_channels"),
    "multipliers": ("ch_mult", "channel_multiplier"),
    "blocks": ("num_res_blocks", "num_res_blocks"),
    "z_channels": ("z_channels", "latent_channels"),
    "codes": ("n_embed", "num_embeddings"),
    "code_dim": ("embed_dim", "embed_dim"),
}
_CHAMELEON: dict[str, Any] = dict(
    width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=256, codes=8192, code_dim=256
)
_JANUS = _CHAMELEON | dict(codes=16384, code_dim=8)  # LlamaGen's VQ-16
_LEVELS: dict[int, dict[str, Any]] = {
    5: PRESETS["taming_f16"],
    4: PRESETS["taming_f8"],
}  # number of levels -> LlamaGen's tokenizer with so many
# Settings that have only one possible value here. If a record states them, they must have this value.
_ONLY: dict[str, object] = {
    **dict.fromkeys(("double_z", "double_latent", "tanh_out", "cosine_similarity", "use_linear_attn"), False),
    **dict.fromkeys(("in_channels", "out_channels", "out_ch", "in_ch"), 3),
    **dict.fromkeys(("resamp_with_conv", "codebook_l2_norm"), True),
    "remap": None,
}


def config_of(system: str, record: Mapping[str, Any], names: Iterable[str] = ()) -> AutoencoderConfig:
    """The config of a system's tokenizer, from the settings that were published with it.

    Args:
      system: a key of SYSTEMS.
      record: the published settings. chameleon_vq: vqgan.yaml, a config.json with vq_config, or that part of it; ibq:
        config.yaml; janus_vq: config.json; emu3_vq: config.json, or its vq_config; llamagen_vq: the arguments of its
        class, if any. showo_vq, lwm_vq and movqgan: not used, because there is only one tokenizer of each, published
        without settings.
      names: the names of the tensors. They tell LlamaGen's VQ-8 from VQ-16 if the record does not.

    Raises:
      ValueError: a setting is missing, or has a value that no published tokenizer has; the message names it.
    """
    if system not in SYSTEMS:
        raise ValueError(f"image tokenizer: expected one of {', '.join(SYSTEMS)}; found {system!r}")
    if system == "emu3_vq":
        return movq_weights.config_from_emu3(record)
    if system == "movqgan":
        return movq_weights.movqgan_270m()
    if system == "lwm_vq":
        return AutoencoderConfig.from_dict(PRESETS["lwm_f16"] | _vq(8192, 64, "euclidean"))
    if system == "showo_vq":
        return AutoencoderConfig.from_dict(PRESETS["showo_f16"] | dict(quantizer="lfq", codes=8192))
    if system == "llamagen_vq":
        return _llamagen(record, names)
    if system == "janus_vq":
        return _janus(record)
    record = _part(record, system)
    if "ddconfig" in record:
        said = _said(dict(record) | dict(record["ddconfig"]), 0, system)
        said["attention"] = _attention(record["ddconfig"], len(said["multipliers"]), 256, system)
    elif system == "ibq":
        raise ValueError("ibq: expected its config.yaml, with ddconfig; found none")
    else:
        said = _CHAMELEON | _said(record, 1, system, needed=False)
        said["attention"] = _attention(record, len(said["multipliers"]), 512, system)
    quantizer = dict(quantizer="ibq") if system == "ibq" else dict(quantizer="vq", space="euclidean")
    return _config(said | quantizer)


def settings_of(config: AutoencoderConfig, dialect: str, *, resolution: int = 512) -> dict[str, object]:
    """The settings that `config_of` reads, in the form that files of the dialect use; {} if these files have no
    settings.

    Args:
      resolution: the side of the training images, in pixels. The setting attn_resolutions depends on it: it lists the
        sides of the feature maps with attention.
    """
    if dialect in ("emu3", "emu3_hf"):
        return movq_weights.emu3_settings(config, dialect)
    spelt = 0 if dialect == "taming" else 1
    lowest = [resolution >> (len(config.multipliers) - 1)] if config.attention == "lowest" else []
    values = {ours: getattr(config, ours) for ours in _SPELLINGS}
    values |= {"multipliers": list(config.multipliers), "blocks": config.blocks[0], "code_dim": _dim(config)}
    found = {names[spelt]: values[ours] for ours, names in _SPELLINGS.items()}
    if dialect == "taming":
        outside = {name: found.pop(name) for name in ("n_embed", "embed_dim")}
        inside = found | dict(double_z=False, resolution=resolution, in_channels=3, out_ch=3, attn_resolutions=lowest)
        inside |= {"dropout": 0.0} | ({"attn_type": "none"} if config.attention == "none" else {})
        return outside | {"ddconfig": inside}
    if dialect == "chameleon_hf":
        kind = "none" if config.attention == "none" else "vanilla"
        return found | dict(double_latent=False, resolution=resolution, in_channels=3, attn_resolutions=lowest or None,
                            attn_type=kind)  # fmt: skip
    if dialect == "janus_hf":
        patches = resolution // config.factor
        return found | dict(double_latent=False, in_channels=3, out_channels=3, num_patches=patches)
    if dialect in ("llamagen", "janus"):
        arguments = dict(codebook_size=config.codes, codebook_embed_dim=_dim(config), codebook_l2_norm=True)
        multipliers = list(config.multipliers)
        return arguments | dict(encoder_ch_mult=multipliers, decoder_ch_mult=multipliers, z_channels=config.z_channels)
    return {}


def _dim(config: AutoencoderConfig) -> int:
    return config.abstract_quantizer.dim


def _llamagen(record: Mapping[str, Any], names: Iterable[str]) -> AutoencoderConfig:
    _check(record, "llamagen_vq")
    found = [int(match[1]) for name in names if (match := re.search(r"encoder\.conv_blocks\.(\d+)\.", name))]
    levels = len(record["encoder_ch_mult"]) if "encoder_ch_mult" in record else max(found, default=4) + 1
    if levels not in _LEVELS:
        raise ValueError(f"llamagen_vq: expected 5 levels (VQ-16) or 4 (VQ-8), found {levels}")
    preset = _LEVELS[levels]
    for name in ("encoder_ch_mult", "decoder_ch_mult"):
        if tuple(record.get(name, preset["multipliers"])) != preset["multipliers"]:
            raise ValueError(f"llamagen_vq: expected {name} {list(preset['multipliers'])}, found {record[name]}")
    quantizer = _vq(record.get("codebook_size", 16384), record.get("codebook_embed_dim", 8), "sphere")
    return AutoencoderConfig.from_dict(preset | quantizer | dict(z_channels=record.get("z_channels", 256)))


def _janus(record: Mapping[str, Any]) -> AutoencoderConfig:
    """Reads config.json of the original or of transformers. We differ from transformers in one point: transformers does
    not normalise when it finds the nearest code, but decodes with normalised codes. The original normalises in both
    cases, and so do we.
    """
    if "gen_vision_config" in record:
        part = record["gen_vision_config"]
        if (kind := part.get("cls", "VQ-16")) != "VQ-16":
            raise ValueError(f"janus_vq: expected gen_vision_config.cls 'VQ-16', found {kind!r}")
        names, given = {"codes": "image_token_size", "code_dim": "n_embed"}, part.get("params", {})
        said = _JANUS | {ours: given[name] for ours, name in names.items() if name in given}
    else:
        said = _JANUS | _said(_part(record, "janus_vq"), 1, "janus_vq", needed=False)
    return _config(said | dict(quantizer="vq", space="sphere", attention="lowest"))


def _config(said: Mapping[str, Any]) -> AutoencoderConfig:
    multipliers, blocks = tuple(said["multipliers"]), said["blocks"]
    shape = dict(factor=1 << (len(multipliers) - 1), patch=1, blocks=(blocks,) * len(multipliers))
    return AutoencoderConfig.from_dict(dict(said) | shape | {"backbone": "vqgan", "multipliers": multipliers})


def _vq(codes: int, dim: int, space: str) -> dict[str, Any]:
    return dict(quantizer="vq", codes=codes, code_dim=dim, space=space)


def _part(record: Mapping[str, object], system: str) -> Mapping[str, Any]:
    """The part of a file's settings for the tokenizer: model.params of taming's yaml, vq_config of a config.json."""
    for path in (("model", "params"), ("vq_config",), ("params",)):
        inner: Any = record
        for name in path:
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            return inner
    return record


def _said(values: Mapping[str, Any], spelt: int, system: str, *, needed: bool = True) -> dict[str, Any]:
    _check(values, system)
    names = {ours: both[spelt] for ours, both in _SPELLINGS.items()}
    if needed and (missing := [name for name in names.values() if name not in values]):
        lacks, found = ", ".join(missing), ", ".join(sorted(values)) or "none"
        raise ValueError(f"{system}: settings: expected {lacks}, which are missing; found {found}")
    return {ours: values[name] for ours, name in names.items() if name in values}


def _check(values: Mapping[str, Any], system: str) -> None:
    for name, only in _ONLY.items():
        if values.get(name, only) != only:
            raise ValueError(f"{system}: expected {name} {only}, found {values[name]!r}")


def _attention(values: Mapping[str, Any], levels: int, usual: int, system: str) -> str:
    """Where the network has attention: "none", "middle" or "lowest".

    The setting attn_resolutions lists the sides of the feature maps with attention. It assumes images with sides of
    `resolution` pixels.
    """
    if values.get("attn_type", "vanilla") in (None, "none"):
        return "none"
    resolution, asked = values.get("resolution", usual), list(values.get("attn_resolutions") or ())
    sides = [resolution >> level for level in range(levels)]
    having = [side for side in sides if side in asked]
    if having not in ([], [sides[-1]]):
        raise ValueError(
            f"{system}: expected attn_resolutions [{sides[-1]}], the lowest of {sides}, or none of them; found {asked}"
        )
    return "lowest" if having else "middle"
