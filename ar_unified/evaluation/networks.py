"""LPIPS and Inception for the tokenizer's evaluation, from weight files that the user names; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ar_tokenizers.image import inception
from ar_tokenizers.image.autoencoder import to_float
from ar_tokenizers.image.perceptual import Perceptual
from ar_tokenizers.image.weights import read_weights

from ar_unified.manifests import Json


def load_networks(files: Mapping[str, str]) -> dict[str, Json]:
    """Loads the networks. Returns the arguments `distances`, `extractors` and `weights` of `evaluate_tokenizer`.

    Args:
        files: the path of the weights for each name, "LPIPS" and "inception"; "" for none.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it does not have this network's weights.
    """
    found: dict[str, Any] = {"distances": {}, "extractors": {}, "weights": {}}
    if path := files.get("LPIPS"):
        lpips = Perceptual.load("lpips", path)
        found["weights"]["LPIPS"] = lpips.hash
        distance = jax.jit(lambda lpips, a, b: lpips.distance(to_float(a), to_float(b)))
        found["distances"]["LPIPS"] = lambda a, b: np.asarray(distance(lpips, a, b), np.float64)
    if path := files.get("inception"):
        arrays, found["weights"]["inception"] = read_weights(path, inception.SHAPES)
        params = inception.arrange(arrays)
        pool3 = jax.jit(inception.pool3)
        found["extractors"]["inception"] = lambda pixels: np.asarray(pool3(params, pixels))
    return found
