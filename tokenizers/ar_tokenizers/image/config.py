"""The shape of an image tokenizer: one frozen dataclass, and the backbones by name."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

from flax import nnx

from ar_tokenizers.image import quantizers
from ar_tokenizers.image.layers import fresh


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The settings of an image tokenizer. Raises ValueError if the numbers do not fit together."""

    # space_to_depth: small, cheap on a CPU; vqgan: the usual one; movq: vqgan with norms in the decoder that read the
    # codes
    backbone: Literal["space_to_depth", "vqgan", "movq"] = "space_to_depth"
    factor: int = 16  # pixels along the side of one code
    patch: int = 4  # the part of `factor` that comes from the initial space-to-depth; 1 in published vqgans
    width: int = 64  # features at the finest level
    # the features of each level divided by `width`, fine to coarse, for log2(factor / patch) + 1 levels
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: tuple[int, ...] = (
        0,
        1,
        2,
    )  # residual blocks per level of the encoder; vqgan's decoder has one more per level
    # vqgan, movq: multipliers of the decoder, fine to coarse; (): the same as in the encoder
    decoder_multipliers: tuple[int, ...] = ()
    # vqgan, movq: residual blocks per level of the decoder; (): one more per level than in the encoder
    decoder_blocks: tuple[int, ...] = ()
    # middle: only in the middle blocks, next to the codes; lowest: in every block at the lowest resolution
    attention: Literal["none", "middle", "lowest"] = "none"  # vqgan, movq; the cost grows as (HW / factor^2)^2
    z_channels: int = 256  # vqgan, movq: features between the last 3 x 3 convolution and the quantizer
    temporal_blocks: int = 0  # movq: residual blocks on each side of the codes, in place of Emu3's layers over time
    quantizer: str = "fsq"  # one of quantizers.NAMES; the fields from here to `restart` are settings of quantizers.make
    levels: tuple[int, ...] = (8, 5, 5, 5)  # fsq: the codebook size is their product
    activation: str = "tanh"  # fsq: "tanh" or "ifsq"
    codes: int = 1024  # all quantizers but fsq: the codebook size
    space: str = "sphere"  # vq: "sphere" or "euclidean"
    code_dim: int = 0  # dimensions of a code vector; 0: the quantizer's usual number
    depth: int = 4  # rq: codes per position
    codebook_update: str = "gradient"  # vq, rq: what updates the codes, "gradient" or "ema"
    gradient: str = "straight_through"  # vq, simvq, rq: "straight_through" or "rotation"
    beta: float = 0.25  # weight of the commitment loss
    entropy: float = -1.0  # weight of the entropy penalty; negative: the quantizer's usual weight
    restart: float = 0.1  # vq, rq: a code with less than this share of the mean use is restarted; 0: never
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the networks' activations; parameters and codes are float32

    def __post_init__(self) -> None:
        for name in (*PER_LEVEL, "levels"):  # JSON and ml_collections give lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        depth = (self.factor // max(self.patch, 1)).bit_length()
        if self.patch < 1 or depth < 1 or self.factor != self.patch << (depth - 1):
            raise ValueError(
                f"factor must be patch times a power of two, got factor {self.factor} and patch {self.patch}"
            )
        for name in PER_LEVEL:
            if len(getattr(self, name)) != depth and (getattr(self, name) or not name.startswith("decoder_")):
                raise ValueError(
                    f"factor {self.factor} and patch {self.patch} make {depth} levels, fine to coarse, "
                    f"but {name} has {len(getattr(self, name))} numbers: {getattr(self, name)}"
                )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if min(self.width, self.z_channels, *self.multipliers, *self.decoder_multipliers, *self.decoder_blocks) < 1:
            raise ValueError(
                f"width, z_channels and all numbers in multipliers, decoder_multipliers and decoder_blocks must be at "
                f"least 1, got {self}"
            )
        if min(self.blocks) < (fewest := int(self.backbone != "space_to_depth")):
            raise ValueError(
                f"blocks: expected at least {fewest} for each level of backbone {self.backbone!r}, got {self.blocks}"
            )
        if self.backbone == "space_to_depth" and self.attention != "none":
            raise ValueError(
                f"backbone 'space_to_depth' has no attention, got attention {self.attention!r}: "
                "choose backbone 'vqgan' or attention 'none'"
            )
        if self.backbone == "space_to_depth" and (self.decoder_multipliers or self.decoder_blocks):
            raise ValueError(
                "decoder_multipliers and decoder_blocks are only for the backbones 'vqgan' and 'movq', "
                "and must be () for 'space_to_depth'"
            )
        if self.temporal_blocks < 0 or (self.temporal_blocks and self.backbone != "movq"):
            raise ValueError(
                f"temporal_blocks: expected 0 or more for backbone 'movq', and 0 for all others; "
                f"got {self.temporal_blocks} for {self.backbone!r}"
            )
        dim = self.abstract_quantizer.dim  # the quantizer checks its own settings
        if self.temporal_blocks and dim != self.z_channels:
            raise ValueError(
                f"with temporal_blocks, code vectors and latents go through the same layers, so code_dim must equal "
                f"z_channels: found code_dim {dim} and z_channels {self.z_channels}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AutoencoderConfig:
        """Makes a config of JSON values. Raises ValueError if a key is not a field; the message names such keys."""
        values = {_NAMED_BEFORE.get(name, name): _renamed(value, _NAMED_BEFORE) for name, value in values.items()}
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"AutoencoderConfig: unknown fields {unknown}; the fields are {known}")
        return cls(**values)

    def identity(self) -> str:
        """The settings as one line of JSON, under their oldest names. A setting is left out if it has its value in
        `_ADDED`. A tokenizer's hash includes this line."""
        first = {now: before for before, now in _NAMED_BEFORE.items()}
        settings = dataclasses.asdict(self)
        named = {
            first.get(name, name): _renamed(value, first)
            for name, value in settings.items()
            if (name, value) not in _ADDED.items()
        }
        return json.dumps(named, sort_keys=True)

    def make_quantizer(self, rngs: nnx.Rngs) -> quantizers.Quantizer:
        """A new quantizer with these settings. Raises ValueError if they do not fit together."""
        return quantizers.make(**{name: getattr(self, name) for name in quantizers.SETTINGS}, rngs=rngs)

    @functools.cached_property
    def abstract_quantizer(self) -> quantizers.Quantizer:
        """The quantizer without its arrays."""
        return nnx.eval_shape(lambda: self.make_quantizer(fresh()))

    @property
    def codebook_size(self) -> int:
        """The number of codes."""
        return self.abstract_quantizer.codebook_size

    @property
    def codes_per_position(self) -> int:
        """The number of codes for one position; only `rq` has more than 1."""
        return self.abstract_quantizer.depth

    @property
    def widths(self) -> tuple[int, ...]:
        """Features per level, fine to coarse."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def decoder_levels(self) -> tuple[tuple[int, int], ...]:
        """(features, residual blocks) per level of the vqgan and movq decoders, fine to coarse."""
        blocks = self.decoder_blocks or tuple(blocks + 1 for blocks in self.blocks)
        multipliers = self.decoder_multipliers or self.multipliers
        return tuple((self.width * multiplier, count) for multiplier, count in zip(multipliers, blocks, strict=True))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Pixels -> the grid of codes (h, w). Raises ValueError unless both sides are multiples of the factor."""
        if height <= 0 or width <= 0 or height % self.factor or width % self.factor:
            raise ValueError(
                f"an image of {height} x {width} pixels does not divide into codes of {self.factor} x {self.factor} "
                f"pixels: resize, crop or pad both sides to multiples of {self.factor}"
            )
        return height // self.factor, width // self.factor * self.codes_per_position


# Names in tokenizers that were saved earlier -> today's names. Hashes use the old names, so a tokenizer's hash stays
# the same.
_NAMED_BEFORE = {"update": "codebook_update", "folded": "space_to_depth"}


# Settings that older tokenizers were saved without -> the value that these tokenizers used. A setting with this value
# is left out of the hash.
_ADDED = {"temporal_blocks": 0, "space": "sphere", "decoder_multipliers": (), "decoder_blocks": ()}


def _renamed(value: object, names: Mapping[str, str]) -> Any:
    return names.get(value, value) if isinstance(value, str) else value


PER_LEVEL = ("multipliers", "blocks", "decoder_multipliers", "decoder_blocks")  # settings with one number per level

CHOICES = {
    "backbone": ("space_to_depth", "vqgan", "movq"),
    "attention": ("none", "middle", "lowest"),
    "dtype": ("float32", "bfloat16"),
}


def _space_to_depth(width: int, multipliers: tuple[int, ...], blocks: tuple[int, ...]) -> dict[str, object]:
    factor = 4 << (len(multipliers) - 1)
    return dict(backbone="space_to_depth", factor=factor, patch=4, width=width, multipliers=multipliers, blocks=blocks)


def _vqgan(width: int, multipliers: tuple[int, ...], blocks: int, **more: Any) -> dict[str, Any]:
    patch = more.get("patch", 1)
    shape = dict(factor=patch << (len(multipliers) - 1), patch=patch, width=width, multipliers=multipliers)
    return dict(backbone="vqgan", **shape, blocks=(blocks,) * len(multipliers)) | more


# Presets set only the backbone; an experiment chooses the quantizer and the losses. In an experiment file:
# config.image_tokenizer.update(PRESETS["taming_f16"])
PRESETS: dict[str, dict[str, object]] = {
    # Our own backbones, the smallest with 1M parameters. The benchmark against transformers uses vqgan_*_16m.
    "space_to_depth_f8": _space_to_depth(64, (1, 2), (1, 2)),
    "space_to_depth_f16": _space_to_depth(64, (1, 2, 2), (0, 1, 2)),
    "vqgan_f8_1m": _vqgan(32, (1, 1, 2, 2), 1, z_channels=64),
    "vqgan_f16_1m": _vqgan(32, (1, 1, 1, 2, 2), 1, z_channels=64),
    "vqgan_f8_16m": _vqgan(64, (1, 2, 2, 4), 2, attention="middle", z_channels=64),
    "vqgan_f16_16m": _vqgan(64, (1, 1, 2, 2, 4), 2, attention="middle", z_channels=64),
    # taming-transformers' f16 (configs/imagenet_vqgan.yaml) is LlamaGen's VQ-16, and its f8 is LlamaGen's VQ-8.
    "taming_f16": _vqgan(128, (1, 1, 2, 2, 4), 2, attention="lowest"),
    "taming_f8": _vqgan(128, (1, 2, 2, 4), 2, attention="lowest"),
    # google-research/maskgit (vqgan_config.py), and MAGVIT's 2-D tokenizers. They downsample by averages, but our
    # network does it by convolutions.
    "maskgit_f16": _vqgan(128, (1, 1, 2, 2, 4), 2),
    # transformers' configuration_chameleon.py (arXiv:2405.09818).
    "chameleon_f16": _vqgan(128, (1, 1, 2, 2, 4), 2, attention="middle"),
    # LargeWorldModel/LWM (lwm/vqgan.py), and showlab/magvitv2 (Show-o, models/modeling_magvitv2.py), in which the
    # decoder does not mirror the encoder.
    "lwm_f16": _vqgan(128, (1, 2, 2, 4, 6), 2, z_channels=64),
    "showo_f16": _vqgan(128, (1, 2, 2, 4, 4), 4, attention="middle", z_channels=13)
    | dict(blocks=(4, 3, 4, 3, 4), decoder_multipliers=(1, 1, 2, 2, 4), decoder_blocks=(4, 4, 3, 4, 3)),
    # TencentARC/SEED-Voken: Open-MAGVIT2 (arXiv:2409.04410) and IBQ (arXiv:2412.02692), the base of Emu3.5's tokenizer.
    "open_magvit2_f16": _vqgan(128, (1, 1, 2, 2, 4), 4, z_channels=18),
    "ibq_f16": _vqgan(128, (1, 1, 2, 2, 4), 4, attention="lowest"),
    # ai-forever/MoVQGAN (configs/movqgan_270M.yaml), the tokenizer of Lumina-mGPT 2.0; and Emu3's, which is based on
    # it.
    "movqgan_f8": _vqgan(256, (1, 2, 2, 4), 2, backbone="movq", attention="lowest", z_channels=4),
    "emu3_vision_f8": _vqgan(
        256, (1, 2, 2, 4), 2, backbone="movq", attention="lowest", z_channels=4, temporal_blocks=2
    ),
    # SBER-MoVQGAN 270M, the base of Emu3's tokenizer, with GroupNorm instead of SpatialNorm in the decoder.
    "emu3_f8": _vqgan(256, (1, 2, 2, 4), 2, attention="lowest", z_channels=4),
}


def config_from(preset: str, **changes: object) -> AutoencoderConfig:
    """The config of a preset, with some fields changed. Raises ValueError for an unknown preset or field."""
    if preset not in PRESETS:
        raise ValueError(f"image tokenizer preset: expected one of {', '.join(PRESETS)}; found {preset!r}")
    return AutoencoderConfig.from_dict(PRESETS[preset] | changes)
