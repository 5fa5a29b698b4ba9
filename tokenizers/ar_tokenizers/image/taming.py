"""The vqgan backbone's weights under their published names: taming-transformers and its descendants.

taming        taming-transformers (model.py): Chameleon's vqgan.ckpt by Meta, and model.ckpt of Emu3.5's IBQ.
chameleon_hf  transformers' ChameleonVQVAE: taming's names, without a decoder.
janus_hf      transformers' JanusVQVAE: taming's names, but the decoder's levels are counted from the coarsest.
llamagen      LlamaGen's VQ-8 and VQ-16: levels are conv_blocks (the decoder's are counted from the coarsest), and the
              middle is a list.
janus         deepseek-ai/Janus, gen_vision_model of its file: the names of LlamaGen's VQ-16.
showo         showlab/magvitv2: taming's names, but the convolutions around the codes are inside encoder and decoder,
              and the first digit of a code is the highest (here it is the lowest).
lwm           LWM's VQGAN, a flax tree with names joined by "/". Kernels are [3, 3, F, F'], like ours.

Import and export use the same tables of names. The descendants of MoVQ are in movq_weights.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from ar_tokenizers.image.autoencoder import NO_DECODER, Params, shapes
from ar_tokenizers.image.config import AutoencoderConfig

_TAMING = {
    r"encoder\.to_code": "quant_conv",
    r"decoder\.from_code": "post_quant_conv",
    r"\.stem": ".conv_in",
    r"coder\.norm": "coder.norm_out",
    r"\.head": ".conv_out",
    r"\.middle\.block(\d)": r".mid.block_\1",
    r"\.middle\.attention": ".mid.attn_1",
    r"encoder\.level(\d)": r"encoder.down.\1",
    r"decoder\.level(\d)": r"decoder.up.\1",
    r"\.block(\d)": r".block.\1",
    r"\.attention(\d)": r".attn.\1",
    r"\.up(\d)": r".up.\1.upsample.conv",
    r"\.shortcut": ".nin_shortcut",
    r"\.query\.": ".q.",
    r"\.key\.": ".k.",
    r"\.value\.": ".v.",
    r"\.out\.": ".proj_out.",
    r"\.(kernel|scale)$": ".weight",
    r"quantizer\.codebook": "quantize.embedding.weight",
}
_LLAMAGEN = {  # applied to taming's names
    r"coder\.(down|up)\.": "coder.conv_blocks.",
    r"(conv_blocks\.\d+)\.block\.": r"\1.res.",
    r"\.mid\.block_1": ".mid.0",
    r"\.mid\.attn_1": ".mid.1",
    r"\.mid\.block_2": ".mid.2",
}
# applied to taming's names
_SHOWO = {"^quant_conv": "encoder.quant_conv", "^post_quant_conv": "decoder.post_quant_conv"}
_LWM = {  # applied to our names
    r"encoder\.to_code": "quant_conv",
    r"decoder\.from_code": "post_quant_conv",
    r"quantizer\.codebook": "quantize.embeddings",
    r"\.stem": ".Conv_0",
    r"coder\.norm": "coder.GroupNorm_0",
    r"\.head": ".Conv_1",
    r"\.middle\.block1": ".MidBlock_0.ResnetBlock_0",
    r"\.middle\.block2": ".MidBlock_0.ResnetBlock_1",
    r"\.norm1": ".GroupNorm_0",
    r"\.conv1": ".Conv_0",
    r"\.norm2": ".GroupNorm_1",
    r"\.conv2": ".Conv_1",
    r"\.shortcut": ".Conv_2",
    r"encoder\.level(\d)": r"encoder.DownsamplingBlock_\1",
    r"decoder\.level(\d)": r"decoder.UpsamplingBlock_\1",
    r"\.block(\d)": r".ResnetBlock_\1",
    r"\.down(\d)": r".DownsamplingBlock_\1.Downsample_0.Conv_0",
    r"\.up(\d)": r".UpsamplingBlock_\1.Upsample_0.Conv_0",
    r"\.": "/",
}
_SPHERE: dict[str, object] = dict(quantizer="vq", space="sphere")
_EUCLIDEAN: dict[str, object] = dict(quantizer="vq", space="euclidean")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one of these systems names a tokenizer's weights.

    Attributes:
        name: its key in DIALECTS.
        names: patterns, applied in turn to taming's names (to our names if `flax`).
        demands: the config settings that a network with these names must have.
        prefix: precedes every name if the file also has a language model.
        coarse_first: whether the decoder's levels are counted from the coarsest.
        highest_first: whether the first number of a latent is the highest digit of its code.
        decoder: whether the file has a decoder.
        flax: whether kernels have our layout, and names are joined by "/".
        not_read: prefixes of the names of arrays that do not belong to the network, such as losses and moving averages.
    """

    name: str
    names: Mapping[str, str]
    demands: Mapping[str, object]
    prefix: str = ""
    coarse_first: bool = False
    highest_first: bool = False
    decoder: bool = True
    flax: bool = False
    not_read: tuple[str, ...] = ()


DIALECTS = {
    each.name: each
    for each in (
        Dialect("taming", {}, {}, not_read=("loss.", "model_ema.")),
        Dialect("chameleon_hf", {}, _EUCLIDEAN, "model.vqmodel.", decoder=False),
        Dialect("janus_hf", {}, _SPHERE | dict(attention="lowest"), "model.vqmodel.", coarse_first=True),
        Dialect("llamagen", _LLAMAGEN, _SPHERE | dict(attention="lowest"), coarse_first=True),
        Dialect("janus", _LLAMAGEN, _SPHERE | dict(attention="lowest"), "gen_vision_model.", coarse_first=True),
        Dialect("showo", _SHOWO, dict(quantizer="lfq", attention="middle"), highest_first=True),
        Dialect("lwm", _LWM, _EUCLIDEAN | dict(attention="none"), coarse_first=True, flax=True),
    )
}


# ---- weights ----------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """The contents of a file with taming-transformers' names."""

    params: Params  # float32, in the form of `init`; without "decoder" if the file has none
    kept: dict[str, np.ndarray]  # arrays of the file that only an export needs; float32 or int64


def from_taming(config: AutoencoderConfig, state: Mapping[str, object], dialect: str = "taming") -> Read:
    """Converts arrays with published names (without a prefix) to parameters.

    Args:
      state: all arrays of a file that holds the tokenizer alone, of any float dtype.
      dialect: a key of DIALECTS, see `dialect_of`.

    Raises:
      ValueError: weights are missing, left over, or have another shape than the config asks for (the message names
        them); the dialect's networks never have such a config; or the buffers show another order of digits.
    """
    spoken, places = DIALECTS[known(dialect)], _places(config, dialect)
    state = {name: leaf for name, leaf in state.items() if not name.startswith(spoken.not_read or ("\0",))}
    extra = buffers(config, dialect)
    check_names(dialect, {place.name: place.shape for place in places.values()}, state, extra)
    kept = {}
    for name in extra.keys() & state.keys():
        kept[name] = _plain(state[name])
        if kept[name].shape != extra[name].shape:
            raise ValueError(f"{name}: expected {list(extra[name].shape)}, found {list(kept[name].shape)}")
        if extra[name].any() and not np.array_equal(kept[name], extra[name]):
            raise ValueError(
                f"{name}: expected the values that the codes' digits give, the highest digit first; found other values"
            )
    ours = {}
    for name, place in places.items():
        if name.startswith("decoder.") and not spoken.decoder:
            kept[place.name] = _plain(state[place.name])  # from_code, which is of no use without a decoder
        else:
            ours[name] = _to_ours(spoken, name, place, np.asarray(state[place.name], np.float32))
    return Read(traverse_util.unflatten_dict(ours, sep="."), kept)


def to_taming(
    config: AutoencoderConfig,
    params: Params,
    kept: Mapping[str, np.ndarray] | None = None,
    dialect: str = "taming",
) -> dict[str, np.ndarray]:
    """The inverse of `from_taming`: every array of a published file. Weights are float32, convolutions [F', F, 3, 3]
    or [F', F, 1, 1].

    Args:
      kept: the arrays that `from_taming` returned besides the parameters (ImageTokenizer.published).

    Raises:
      ValueError: the tokenizer has no decoder but a file of that dialect has one, or the dialect's networks never have
        such a config.
    """
    spoken, kept, theirs = DIALECTS[known(dialect)], kept or {}, {}
    if spoken.decoder and "decoder" not in params:
        raise ValueError(f"weights named as in {dialect}: {NO_DECODER}")
    ours = traverse_util.flatten_dict(params, sep=".")
    for name, place in _places(config, dialect).items():
        if name in ours:
            theirs[place.name] = _to_theirs(spoken, name, np.asarray(ours[name], np.float32))
        elif place.name in kept:
            theirs[place.name] = kept[place.name]
        else:
            raise ValueError(
                f"weights named as in {dialect}: expected {place.name} among the arrays that the tokenizer keeps from "
                "its file, found none"
            )
    return theirs | {name: kept.get(name, leaf) for name, leaf in buffers(config, dialect).items()}


def dialect_of(names: Iterable[str]) -> str:
    """The dialect, a key of DIALECTS, that has these names. Raises ValueError if there is none.

    LlamaGen and Janus have the same names, so for both the result is "llamagen". For all files with the names of
    taming-transformers, such as Chameleon's vqgan.ckpt and IBQ's, the result is "taming".
    """
    names = set(names)
    starts = lambda prefix: any(name.startswith(prefix) for name in names)  # noqa: E731
    if "encoder/Conv_0/kernel" in names:
        return "lwm"
    if starts("encoder.conv_blocks."):
        return "llamagen"
    if "encoder.quant_conv.weight" in names:
        return "showo"
    if starts("encoder.down.") and not starts("decoder."):
        return "chameleon_hf"
    if starts("encoder.down."):  # only the finest level of a decoder has no upsampling
        return "janus_hf" if starts("decoder.up.0.upsample.") else "taming"
    raise ValueError(
        "weights of an image tokenizer of taming's family: expected names like encoder.down.0.block.0.conv1.weight, "
        f"encoder.conv_blocks.0.res.0.conv1.weight or encoder/Conv_0/kernel, found {some(names)}"
    )


def buffers(config: AutoencoderConfig, dialect: str) -> dict[str, np.ndarray]:
    """The buffers that the dialect's class saves besides weights: a log of used codes, or a table computed from the
    digits of the codes.
    """
    if dialect in ("llamagen", "janus"):
        return {"quantize.codebook_used": np.zeros(65536, np.float32)}
    if dialect == "showo":
        digits = np.arange(config.codes.bit_length() - 1)[::-1]
        table = (np.arange(config.codes)[:, None] >> digits & 1) * 2 - 1
        return {
            "quantize.embedding": table.astype(np.float32),
            "quantize.power_vals": np.int64(1) << digits.astype(np.int64),
        }
    return {}


# ---- names ------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """The place of one of our parameters in a published file."""

    name: str  # in the published file
    shape: tuple[int, ...]  # in the published file
    axes: int  # number of axes of our parameter


def known(dialect: str) -> str:
    """The dialect with that name. Raises ValueError if DIALECTS has none."""
    if dialect not in DIALECTS:
        raise ValueError(f"names of weights: expected one of {', '.join(DIALECTS)}; found {dialect!r}")
    return dialect


@functools.cache
def _places(config: AutoencoderConfig, dialect: str) -> dict[str, Place]:
    """The place of each parameter in a published file. The keys are our names."""
    spoken = DIALECTS[dialect]
    for name, value in {**spoken.demands, "backbone": "vqgan", "patch": 1}.items():
        if (found := getattr(config, name)) != value:
            raise ValueError(f"weights named as in {dialect}: expected {name} {value!r}, found {found!r}")
    parameters = shapes(config)
    places = {}
    for name, leaf in traverse_util.flatten_dict(parameters, sep=".").items():
        if name.startswith("quantizer.") and name != "quantizer.codebook":
            raise ValueError(
                f"weights named as in {dialect}: there is no name for {name} of quantizer {config.quantizer!r}"
            )
        if not spoken.decoder and name.startswith("decoder.") and not name.startswith("decoder.from_code."):
            continue
        shape = _to_theirs(spoken, name, np.broadcast_to(np.float32(), leaf.shape)).shape
        places[name] = Place(_theirs(spoken, name, len(config.multipliers)), shape, leaf.ndim)
    return places


def _theirs(spoken: Dialect, name: str, levels: int) -> str:
    if spoken.coarse_first:
        name = re.sub(r"^decoder\.(level|up)(\d)", lambda m: f"decoder.{m[1]}{levels - 1 - int(m[2])}", name)
    if spoken.flax:
        # In their names a downsampling belongs to the level before it, in ours to the level after it.
        name = re.sub(r"\.down(\d)", lambda match: f".down{int(match[1]) - 1}", name)
    else:
        name = published_name(name)
    return _renamed(name, spoken.names)


def published_name(name: str) -> str:
    """Converts our name, such as "encoder.level0.block0.norm1.scale", to taming's name."""
    name = re.sub(r"\.down(\d)", lambda match: f".down.{int(match[1]) - 1}.downsample.conv", name)
    return _renamed(name, _TAMING)


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name


def check_names(
    dialect: str,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Any],
    optional: Iterable[str] = (),
) -> None:
    """Raises ValueError if arrays are missing, left over, or have another shape. The message names them."""
    if missing := wanted.keys() - found.keys():
        encode_only = dialect == "taming" and not any(name.startswith("decoder.") for name in found)
        hint = f"; {NO_DECODER}" if encode_only and any(name.startswith("decoder.") for name in missing) else ""
        raise ValueError(f"weights named as in {dialect}: missing arrays ({len(missing)}): {some(missing)}{hint}")
    if extra := found.keys() - wanted.keys() - set(optional):
        raise ValueError(
            f"weights named as in {dialect}: arrays that the config has no place for ({len(extra)}): {some(extra)}"
        )
    for name, shape in wanted.items():
        if (size := np.shape(found[name])) != shape:
            raise ValueError(f"{name}: the config asks for shape {list(shape)}, found {list(size)}")


def some(names: Iterable[str], most: int = 4) -> str:
    """The names as text: the first few if there are many."""
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


# ---- layouts ----------------------------------------------------------------------------------------------------


def _to_theirs(spoken: Dialect, name: str, leaf: np.ndarray) -> np.ndarray:
    if name == "quantizer.codebook":
        return leaf
    leaf = _digits(spoken, name, leaf)
    if spoken.flax:
        return np.ascontiguousarray(leaf.reshape((1, 1) * (leaf.ndim == 2) + leaf.shape))
    return np.ascontiguousarray(out_first(leaf))


def _to_ours(spoken: Dialect, name: str, place: Place, leaf: np.ndarray) -> np.ndarray:
    if name == "quantizer.codebook":
        return leaf
    if spoken.flax:
        return leaf[0, 0] if place.axes == 2 else leaf
    return _digits(spoken, name, in_first(leaf, place.axes))


def _digits(spoken: Dialect, name: str, leaf: np.ndarray) -> np.ndarray:
    """Reverses the order of a code's digits in the layers that make or read them, if the dialect has the highest digit
    first."""
    axes = {"encoder.to_code.kernel": 1, "encoder.to_code.bias": 0, "decoder.from_code.kernel": 0}
    return np.flip(leaf, axes[name]) if spoken.highest_first and name in axes else leaf


def _plain(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return np.array(leaf, np.int64 if np.issubdtype(leaf.dtype, np.integer) else np.float32, order="C")


def out_first(leaf: np.ndarray) -> np.ndarray:
    """[3, 3, F, F'] or [F, F'] (in published files, a 1 x 1 convolution) -> [F', F, 3, 3] or [F', F, 1, 1]."""
    return leaf if leaf.ndim == 1 else leaf.reshape((1, 1) * (leaf.ndim == 2) + leaf.shape).transpose(3, 2, 0, 1)


def in_first(leaf: np.ndarray, ndim: int) -> np.ndarray:
    """The inverse of `out_first`."""
    if leaf.ndim != 4:
        return leaf
    leaf = leaf.transpose(2, 3, 1, 0)
    return leaf[0, 0] if ndim == 2 else leaf
