"""Perceptual distances. They measure how different a reconstruction looks from its image, and are losses in addition to
the pixel loss.

Axes: B batch, H W pixels, h w positions, F features.

`ms_ssim` and `match` need no pretrained weights. `lpips` and `features` need a weight file, which the user names.
Report its sha256 with every number that was computed with it. All distances are float32 [B], one for each image, and
zero for equal images.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ar_tokenizers.image import lpips, resnet
from ar_tokenizers.image.weights import Params, check_file, read_weights

Kind = Literal["none", "lpips", "features", "ms_ssim", "match"]
Features = Sequence[jax.Array]
NETWORKS = {"lpips": lpips, "features": resnet}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["kind", "hash", "dtype"])
@dataclasses.dataclass(frozen=True, eq=False)
class Perceptual:
    """One perceptual distance, made by `load`. It is a pytree: pass it to a jitted function as an argument, so that the
    compiled program does not contain its weights as constants."""

    kind: Kind
    params: Params
    hash: str  # sha256 of the weight file; empty if there is none
    dtype: str  # dtype of the network's arithmetic; the distance is float32

    @classmethod
    def load(
        cls, kind: str, path: str | os.PathLike[str] = "", dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> Perceptual:
        """Makes a distance, and reads its weights if the kind has any.

        Args:
          path: the weight file of `lpips` or `features` (described in weights.py); empty for other kinds.
          dtype: "float32" for a number to report, "bfloat16" for a fast loss.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: there is no such kind, or the file does not have the weights of that kind.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"perceptual distance: expected one of {get_args(Kind)}, got {kind!r}")
        require_fitting(kind, path)
        if kind not in NETWORKS:
            return cls(kind, {}, "", dtype)  # type: ignore[arg-type]
        arrays, digest = read_weights(path, NETWORKS[kind].SHAPES)
        return cls(kind, NETWORKS[kind].arrange(arrays), digest, dtype)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The name of the distance, to print next to its value. It includes the first digits of the weights' sha256."""
        names = {"lpips": "LPIPS-VGG16", "features": "ResNet-50 logits", "ms_ssim": "1 - MS-SSIM"}
        return names.get(self.kind, self.kind) + (f" ({self.hash[:12]})" if self.hash else "")

    def distance(self, a: jax.Array, b: jax.Array, a_features: Features = (), b_features: Features = ()) -> jax.Array:
        """float32 [B, H, W, 3] in [-1, 1] twice -> float32 [B].

        `match` compares the discriminator's activations, which adversary.logits returns; other kinds do not use them.
        Raises ValueError if images are too small, or if `match` gets no activations.
        """
        dtype = jnp.dtype(self.dtype)
        match self.kind:
            case "lpips":
                return lpips.distance(self.params, a, b, dtype)
            case "features":
                logits = resnet.logits(self.params, jnp.concatenate([a, b]), dtype)
                return jnp.mean(jnp.square(logits[: len(a)] - logits[len(a) :]), axis=-1)
            case "ms_ssim":
                return 1 - ms_ssim(a, b)
            case "match":
                return feature_matching(a_features, b_features)
        return jnp.zeros(len(a), jnp.float32)


def require_fitting(kind: str, path: str | os.PathLike[str] = "", side: int = 1 << 30) -> None:
    """Raises ValueError if a needed weight file is not given, an unused one is given, or images of `side` pixels are
    too small."""
    if bool(path) != (kind in NETWORKS):
        wants = "needs a weight file: name one" if kind in NETWORKS else f"has no weights, so it cannot use {path}"
        raise ValueError(f"the perceptual distance {kind!r} {wants}")
    if kind == "ms_ssim" and side < len(_WINDOW):
        raise ValueError(f"MS-SSIM needs images of at least 11 x 11 pixels, got a side of {side}")
    if path:
        check_file(path, NETWORKS[kind].SHAPES)


# ---- without weights --------------------------------------------------------------------------------------------

_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = np.exp(-0.5 * np.square(np.arange(-5, 6) / 1.5))


def ms_ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multi-scale structural similarity: float32 [B, H, W, 3] in [-1, 1] twice -> float32 [B], 1 for equal images.

    Wang, Simoncelli and Bovik 2003; as a loss Zhao et al. 2015, arXiv:1511.08861. The Gaussian window has 11 x 11
    pixels and sigma 1.5, without padding; the result is the mean over the colours. Images with sides of 176 pixels or
    more have five scales. Smaller images have as many scales as fit, with the same relative weights.

    Raises:
      ValueError: a side is shorter than the window.
    """
    side = min(a.shape[1:3])
    if side < len(_WINDOW):
        raise ValueError(f"MS-SSIM needs images of at least 11 x 11 pixels, got {a.shape[1]} x {a.shape[2]}")
    count = min(len(_SCALES), (side // len(_WINDOW)).bit_length())
    weights = np.array(_SCALES[:count]) / sum(_SCALES[:count])
    x, y = (pixels.astype(jnp.float32) * 0.5 + 0.5 for pixels in (a, b))  # SSIM compares values in [0, 1]
    total = jnp.ones((len(x), 3), jnp.float32)
    for scale, weight in enumerate(weights):
        luminance, contrast = _similarity(x, y)
        similarity = luminance * contrast if scale == count - 1 else contrast
        # The lower bound is needed because a power of a negative value (opposite structure) is not real. The value of
        # any flat reconstruction is above the bound, so training starts with a gradient.
        total *= jnp.maximum(similarity.mean((1, 2)), 1e-4) ** weight
        x, y = _halve(x), _halve(y)
    return total.mean(-1)


def feature_matching(a: Features, b: Features) -> jax.Array:
    """Mean |difference| of two lists of activations [B, h, w, F], with equal weight for each layer -> float32 [B].

    Wang et al. 2017 (pix2pixHD), arXiv:1711.11585. Raises ValueError if there are no activations.
    """
    if not a or len(a) != len(b):
        raise ValueError(
            "feature matching needs the discriminator's activations for both images (the second result of "
            f"adversary.logits), with the same number of layers; got {len(a)} and {len(b)} layers"
        )
    layers = [jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).mean((1, 2, 3)) for x, y in zip(a, b, strict=True)]
    return sum(layers[1:], layers[0]) / len(layers)


def _similarity(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SSIM's luminance and contrast-structure maps, [B, H - 10, W - 10, 3], of images in [0, 1]."""

    def band(size: int) -> np.ndarray:  # as a matrix: two products are faster than a convolution
        rows = [np.pad(_WINDOW / _WINDOW.sum(), (i, size - len(_WINDOW) - i)) for i in range(size - len(_WINDOW) + 1)]
        return np.array(rows, np.float32)

    moments = jnp.stack([x, y, x * x, y * y, x * y])
    rows, columns = band(x.shape[1]), band(x.shape[2])
    moments = jnp.einsum("ih,nbhwc->nbiwc", rows, moments, precision="highest")
    mx, my, xx, yy, xy = jnp.einsum("jw,nbiwc->nbijc", columns, moments, precision="highest")
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    return luminance, (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)


def _halve(x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
