"""The vqgan backbone under the names of taming-transformers, which `ChameleonVQVAE` of transformers has too.

Only the networks: a codebook and its 1 x 1 convolutions' width are the quantizer's matter, but the convolutions
(`quant_conv`, `post_quant_conv`) come along as `to_code` and `from_code`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from ar_tokenizers.image.autoencoder import Params, init
from ar_tokenizers.image.config import AutoencoderConfig

_RENAMED = {
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
}


def to_taming(params: Params) -> dict[str, np.ndarray]:
    """Parameters as `init` makes them -> arrays for `load_state_dict`, convolutions [F', F, 3, 3] or [F', F, 1, 1]."""
    ours = traverse_util.flatten_dict({name: params[name] for name in ("encoder", "decoder")}, sep=".")
    return {published_name(name): out_first(np.asarray(leaf)) for name, leaf in ours.items()}


def from_taming(config: AutoencoderConfig, state: Mapping[str, Any]) -> Params:
    """Arrays by taming's names -> {"encoder": ..., "decoder": ...} of float32 arrays. Names it does not need are left.

    Raises:
      ValueError: a weight is missing or has another shape than the config asks for.
    """
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    wanted = traverse_util.flatten_dict({name: shapes[name] for name in ("encoder", "decoder")}, sep=".")
    found = {}
    for name, want in wanted.items():
        theirs = published_name(name)
        if theirs not in state:
            raise ValueError(f"{theirs} is missing: the config has it as {name} {want.shape}")
        leaf = np.asarray(state[theirs], np.float32)
        found[name] = in_first(leaf, len(want.shape))
        if found[name].shape != want.shape:
            raise ValueError(f"{theirs} has shape {leaf.shape}, which makes {name} {found[name].shape}; "
                             f"the config asks for {want.shape}")  # fmt: skip
    return traverse_util.unflatten_dict(found, sep=".")


def published_name(name: str) -> str:
    """Ours, as "encoder.level0.block0.norm1.scale" -> theirs."""
    # Theirs counts a halving to the level before it, ours to the level after it.
    name = re.sub(r"\.down(\d)", lambda match: f".down.{int(match[1]) - 1}.downsample.conv", name)
    for pattern, new in _RENAMED.items():
        name = re.sub(pattern, new, name)
    return name


def out_first(leaf: np.ndarray) -> np.ndarray:
    """[3, 3, F, F'] or [F, F'] (a 1 x 1 convolution there) -> [F', F, 3, 3] or [F', F, 1, 1]."""
    return leaf if leaf.ndim == 1 else leaf.reshape((1, 1) * (leaf.ndim == 2) + leaf.shape).transpose(3, 2, 0, 1)


def in_first(leaf: np.ndarray, ndim: int) -> np.ndarray:
    """The inverse."""
    if leaf.ndim != 4:
        return leaf
    leaf = leaf.transpose(2, 3, 1, 0)
    return leaf[0, 0] if ndim == 2 else leaf
