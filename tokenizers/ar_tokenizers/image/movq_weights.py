"""The movq backbone under its published names: MoVQGAN, Emu3, and Emu3 in transformers.

movqgan  ai-forever/MoVQGAN, movqgan_270M.ckpt: taming's names. The plain weights are read, but not their moving
         averages (ema_*) or losses.
emu3     BAAI/Emu3-VisionTokenizer (modeling_emu3visionvq.py): taming's names, and layers over time (temporal.py).
emu3_hf  transformers' Emu3VQVAE: the norm before attention is not in the attention layer, which has linear projections.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from ar_tokenizers.image import temporal
from ar_tokenizers.image.autoencoder import Params, shapes
from ar_tokenizers.image.config import PRESETS, AutoencoderConfig
from ar_tokenizers.image.taming import check_names, in_first, out_first, published_name, some

DIALECTS = ("movqgan", "emu3", "emu3_hf")
# Settings of Emu3's vision tokenizer: our name -> (original name, transformers' name, the default of both).
_SETTINGS: dict[str, tuple[str, str, Any]] = {
    "codes": ("codebook_size", "codebook_size", 32768),
    "code_dim": ("embed_dim", "embed_dim", 4),
    "z_channels": ("z_channels", "latent_channels", 4),
    "width": ("ch", "base_channels", 256),
    "multipliers": ("ch_mult", "channel_multiplier", (1, 2, 2, 4)),
    "blocks": ("num_res_blocks", "num_res_blocks", 2),
    "attention": ("attn_resolutions", "attn_resolutions", (3,)),
}
# Settings with the same value in all published files: (original name or "" if it has none, transformers' name,
# value).
_FIXED: tuple[tuple[str, str, Any], ...] = (
    ("in_channels", "in_channels", 3),
    ("out_channels", "out_channels", 3),
    ("double_z", "double_latent", False),
    ("temporal_downsample_factor", "temporal_downsample_factor", temporal.FACTOR),
    ("", "num_attention_heads", 1),
)
NOT_READ = ("ema_", "loss.")
_CODEBOOK = "quantize.embedding.weight"
_SPATIAL_NORM = {r"\.group\.": ".norm_layer.", r"\.gain\.": ".conv_y.", r"\.shift\.": ".conv_b."}
_TRANSFORMERS = {
    r"encoder\.down\.": "encoder.down_block.down.",
    r"decoder\.up\.": "decoder.up_block.up.",
    r"\.mid\.attn_1\.norm\.": ".middle_block.attn_norm.",
    r"\.mid\.": ".middle_block.",
    r"\.attn\.(\d+)\.norm\.": r".attn_norms.\1.",
    r"\.([qkv])\.": r".\1_proj.",
    r"\.proj_out\.": ".out_proj.",
}


# ---- settings ---------------------------------------------------------------------------------------------------


def movqgan_270m() -> AutoencoderConfig:
    """The settings of movqgan_270M.ckpt, from configs/movqgan_270M.yaml in its repository. The checkpoint has no
    file of settings."""
    return AutoencoderConfig.from_dict(PRESETS["movqgan_f8"] | _quantizer(16384, 4))


def config_from_emu3(values: Mapping[str, Any]) -> AutoencoderConfig:
    """The config of Emu3's vision tokenizer, from its config.json or from `vq_config` of transformers' Emu3Config.

    Raises:
      ValueError: a setting has a value that no published tokenizer has; the message names it.
    """
    for *names, only in _FIXED:
        for name in names:
            if values.get(name, only) != only:
                raise ValueError(f"Emu3's vision tokenizer: expected {name} {only}, found {values[name]!r}")
    said = {
        ours: next((values[name] for name in names if name in values), usual)
        for ours, (*names, usual) in _SETTINGS.items()
    }
    multipliers, levels = tuple(said["multipliers"]), list(said["attention"] or ())
    lowest, blocks = len(multipliers) - 1, said["blocks"]
    if levels not in ([], [lowest]):
        raise ValueError(
            f"Emu3's vision tokenizer: expected attn_resolutions [{lowest}], the lowest of {lowest + 1} levels, or "
            f"[], found {levels}"
        )
    if (hidden := values.get("hidden_size", widest := said["width"] * multipliers[-1])) != widest:
        raise ValueError(
            f"Emu3's vision tokenizer: expected hidden_size {widest}, the width of its lowest level, found {hidden}"
        )
    return AutoencoderConfig(
        backbone="movq",
        factor=1 << lowest,
        patch=1,
        width=said["width"],
        multipliers=multipliers,
        blocks=(blocks,) * len(multipliers),
        attention="lowest" if levels else "middle",
        z_channels=said["z_channels"],
        temporal_blocks=blocks,
        **_quantizer(said["codes"], said["code_dim"]),
    )


def emu3_settings(config: AutoencoderConfig, dialect: str) -> dict[str, Any]:
    """The settings that `config_from_emu3` reads, under the names that the dialect ("emu3" or "emu3_hf") uses."""
    port = dialect == "emu3_hf"
    values = {ours: getattr(config, ours) for ours in _SETTINGS}
    values["multipliers"], values["blocks"] = list(config.multipliers), config.temporal_blocks
    values["attention"] = [len(config.multipliers) - 1] if config.attention == "lowest" else []
    settings = {names[port]: values[ours] for ours, names in _SETTINGS.items()}
    settings |= {names[port]: only for *names, only in _FIXED if names[port]}
    return settings | ({"hidden_size": config.widths[-1]} if port else {})


def _quantizer(codes: int, dim: int) -> dict[str, Any]:
    return dict(quantizer="vq", codes=codes, code_dim=dim, space="euclidean")


# ---- weights ----------------------------------------------------------------------------------------------------


def dialect_of(names: Iterable[str]) -> str:
    """The dialect in DIALECTS that has these names. Raises ValueError if there is none."""
    names = set(names)
    starts = lambda prefix: any(name.startswith(prefix) for name in names)  # noqa: E731
    if starts("encoder.down_block."):
        return "emu3_hf"
    if starts("encoder.down."):
        return "emu3" if starts("encoder.time_conv.") else "movqgan"
    raise ValueError(
        "weights of MoVQGAN or of Emu3's vision tokenizer: expected names like encoder.down.0.block.0.conv1.weight or "
        f"encoder.down_block.down.0.block.0.conv1.weight, found {some(names)}"
    )


def from_published(
    config: AutoencoderConfig, state: Mapping[str, Any], dialect: str
) -> tuple[Params, dict[str, np.ndarray]]:
    """Converts arrays with published names to parameters. Also returns the arrays that have no place in the network.

    Args:
      state: all arrays of a file that holds the tokenizer alone, of any float dtype.
      dialect: one of DIALECTS, see `dialect_of`.

    Returns:
      The parameters in the form of `init`, float32; and the original layers over time by name, float32 and int64, which
      ImageTokenizer keeps for `to_published` ("movqgan" has none).

    Raises:
      ValueError: arrays are missing, left over, or have another shape than the config asks for; the message names them.
    """
    network, kept = _expected(config, dialect)
    state = {name: leaf for name, leaf in state.items() if not name.startswith(NOT_READ)}
    wanted = {place.name: place.shape for place in network.values()} | kept
    check_names(dialect, wanted, state)
    ours = {name: _to_ours(place, np.asarray(state[place.name], np.float32)) for name, place in network.items()}
    published = {
        name: np.array(state[name], np.float32 if shape else np.int64, order="C") for name, shape in kept.items()
    }
    if kept:
        ours |= _flat(temporal.fold(published, config.temporal_blocks))
    return traverse_util.unflatten_dict(ours, sep="."), published


def to_published(
    config: AutoencoderConfig, params: Params, published: Mapping[str, np.ndarray], dialect: str
) -> dict[str, np.ndarray]:
    """The inverse of `from_published`: every array of a published file, float32 (counts of batches: int64).

    Args:
      published: the arrays that `from_published` returned besides the parameters (ImageTokenizer.published).

    Raises:
      ValueError: the layers over time are missing, or do not match the network any more.
    """
    network, kept = _expected(config, dialect)
    ours = _flat(params)
    if differ := kept.keys() ^ published.keys():
        raise ValueError(
            f"temporal layers: expected all published arrays, but these are missing or unknown: {some(differ)}. "
            "The network keeps only what these layers do to a single image, so only an imported tokenizer can be "
            f"exported as {dialect}"
        )
    if kept:
        folded = _flat(temporal.fold(published, config.temporal_blocks))
        if moved := {name for name, leaf in folded.items() if not np.array_equal(np.asarray(ours[name]), leaf)}:
            raise ValueError(
                f"temporal layers: the network's weights {some(moved)} differ from those of the published layers: the "
                "network was trained after the import, so its layers for a video are unknown. Export the tokenizer as "
                "it was imported"
            )
    found = {
        place.name: np.ascontiguousarray(_to_theirs(place.name, np.asarray(ours[name], np.float32)))
        for name, place in network.items()
    }
    return found | {name: published[name] for name in kept}


class _Place(NamedTuple):
    name: str  # in the published file
    shape: tuple[int, ...]  # in the published file
    axes: int  # number of axes of our parameter


@functools.cache
def _expected(config: AutoencoderConfig, dialect: str) -> tuple[dict[str, _Place], dict[str, tuple[int, ...]]]:
    """Returns the place of each parameter in a file, by our name, and the shape of each array of the layers over time,
    by published name."""
    if dialect not in DIALECTS:
        raise ValueError(f"names of weights: expected one of {', '.join(DIALECTS)}; found {dialect!r}")
    blocks = config.temporal_blocks
    if config.backbone != "movq" or bool(blocks) != (dialect != "movqgan"):
        raise ValueError(
            f"weights named as in {dialect}: expected backbone 'movq' {'without' if dialect == 'movqgan' else 'with'} "
            f"temporal_blocks, found {config.backbone!r} with temporal_blocks={blocks}"
        )
    folded = (".temporal.", ".to_code.", ".from_code.") if blocks else ()
    network = {}
    for name, leaf in _flat(shapes(config)).items():
        if not any(part in name for part in folded):
            theirs = _theirs(name, dialect)
            shape = _to_theirs(theirs, np.broadcast_to(np.float32(), leaf.shape)).shape
            network[name] = _Place(theirs, shape, leaf.ndim)
    return network, temporal.published_shapes(config.z_channels, blocks) if blocks else {}


def _theirs(name: str, dialect: str) -> str:
    if name == "quantizer.codebook":
        return _CODEBOOK
    name = published_name(name)
    for pattern, new in (_SPATIAL_NORM | (_TRANSFORMERS if dialect == "emu3_hf" else {})).items():
        name = re.sub(pattern, new, name)
    return name


def _to_theirs(name: str, leaf: np.ndarray) -> np.ndarray:
    if name == _CODEBOOK:
        return leaf
    return leaf.T if name.endswith("_proj.weight") else out_first(leaf)


def _to_ours(place: _Place, leaf: np.ndarray) -> np.ndarray:
    if place.name == _CODEBOOK:
        return leaf
    return leaf.T if place.name.endswith("_proj.weight") else in_first(leaf, place.axes)


def _flat(tree: Params) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep=".")
