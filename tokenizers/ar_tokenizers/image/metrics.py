"""Scores of an image tokenizer that need no pretrained network: distances of images, and the usage of codes.

Everything is float64 numpy, per image, so a mean over a data set does not depend on how images were batched.

Axes: H W pixels, K codebook size. Images are uint8 RGB, [..., H, W, 3].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# MS-SSIM: the exponent of each scale, fine to coarse, calibrated with people by Wang, Simoncelli and Bovik 2003.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5  # width and sigma of SSIM's Gaussian, in pixels
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # SSIM's constants for 8-bit images


def mse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared error of each image, of values in [0, 1]: uint8 [..., H, W, 3] twice -> float64 [...].

    Raises ValueError, like all distances here, if the images differ in shape or are not uint8.
    """
    a, b = _pair("mse", a, b)
    return np.mean(np.square(a - b), axis=(-3, -2, -1)) / 255.0**2


def l1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean absolute error of each image, of values in [0, 1]: uint8 [..., H, W, 3] twice -> float64 [...]."""
    a, b = _pair("l1", a, b)
    return np.mean(np.abs(a - b), axis=(-3, -2, -1)) / 255.0


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image, in dB: uint8 [..., H, W, 3] twice -> float64 [...].

    Tokenizer papers report the mean of this number over images. The PSNR of a data set's mean squared error
    (`decibels`) is lower. Identical images have 100 dB, so a mean over images stays finite.
    """
    return decibels(mse(a, b))


def decibels(mse: np.ndarray | float) -> np.ndarray:
    """The PSNR of a mean squared error of values in [0, 1]; at most 100 dB."""
    return -10 * np.log10(np.maximum(mse, 1e-10))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of each image, at most 1: uint8 [..., H, W, 3] twice -> float64 [...].

    Wang et al. 2004: a Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, at all places where the
    window lies inside the image. It is computed for R, G and B and averaged, as in scikit-image and dm_pix. MAGVIT and
    others compute it on the grey image, which gives a different number. A side needs at least 11 pixels.
    """
    similarity, _ = _structure(*_pair("ssim", a, b, side=WINDOW))
    return similarity.mean(-1)


def ms_ssim(a: np.ndarray, b: np.ndarray, scales: int = len(SCALE_WEIGHTS)) -> np.ndarray:
    """Multi-scale SSIM of each image, in [0, 1]: uint8 [..., H, W, 3] twice -> float64 [...].

    Wang, Simoncelli and Bovik 2003: contrast and structure at every scale, luminance only at the coarsest. Each scale
    averages 2 x 2 pixels of the scale before. It is computed for R, G and B and averaged. A negative mean of a scale
    counts as 0, as in pytorch_msssim and TensorFlow.

    Args:
      scales: 5 gives MS-SSIM. Images below 161 pixels need fewer scales, which give a different number: the first
        weights are used, scaled to the sum of all five.

    Raises:
      ValueError: a side is below `ms_ssim_side(scales)`.
    """
    x, y = _pair("ms_ssim", a, b, side=ms_ssim_side(scales))
    weights = np.array(SCALE_WEIGHTS[:scales]) * sum(SCALE_WEIGHTS) / sum(SCALE_WEIGHTS[:scales])
    product = np.ones(1)
    for scale, weight in enumerate(weights):
        if scale:
            x, y = _halved(x), _halved(y)
        similarity, contrast = _structure(x, y)
        product = product * np.maximum(similarity if scale == scales - 1 else contrast, 0.0) ** weight
    return product.mean(-1)


def ms_ssim_side(scales: int = len(SCALE_WEIGHTS)) -> int:
    """The smallest side that `ms_ssim` takes, in pixels: the window must fit into the coarsest scale.

    Raises ValueError for scales outside 1..5.
    """
    if not 1 <= scales <= len(SCALE_WEIGHTS):
        raise ValueError(f"ms_ssim has 1 to {len(SCALE_WEIGHTS)} scales, got {scales}")
    return (WINDOW - 1) * 2 ** (scales - 1) + 1


def usage(counts: np.ndarray) -> dict[str, float]:
    """Statistics of a codebook's usage, from how often each of its K codes was used.

    All numbers depend on how many codes were counted, so count a whole evaluation set, not one batch.

    Returns:
      A dict with these numbers:
        usage: the share of codes that were used.
        dead: the number of codes that were not used.
        entropy_bits: the entropy of the empirical distribution, at most log2(K).
        normalised_entropy: entropy_bits / log2(K), in [0, 1].
        perplexity: 2 ** entropy_bits, the number of equally used codes with that entropy.
        top_percent: the share of the count that belongs to the most used 1 % of the K codes (rounded up). It is 0.01 if
          all codes are used equally, and 1 if only few are used.
        counted: how many codes were counted.
    """
    counts = np.asarray(counts, np.float64).ravel()
    if not counts.size or counts.sum() <= 0:
        raise ValueError(f"expected at least one counted code, found none in a histogram of shape {counts.shape}")
    p = counts[counts > 0] / counts.sum()
    entropy = float(-(p * np.log2(p)).sum()) + 0.0
    top = np.sort(counts)[::-1][: -(-counts.size // 100)]
    return {
        "usage": float((counts > 0).mean()),
        "dead": int((counts == 0).sum()),
        "perplexity": 2.0**entropy,
        "entropy_bits": entropy,
        "normalised_entropy": entropy / np.log2(counts.size) if counts.size > 1 else 1.0,
        "top_percent": float(top.sum() / counts.sum()),
        "counted": int(counts.sum()),
    }


def collapse(found: Mapping[str, float], codebook_size: int, quantizer: str = "") -> str:
    """A warning with numbers if only a small part of a codebook is used; "" if all is well.

    Args:
      found: the result of `usage`. If few codes were counted, counted / 10 different ones are enough to avoid the
        warning.
      quantizer: the quantizer's name. "fsq" has no codebook that could collapse, so the advice for it is different.
    """
    if not found:
        return ""
    used, perplexity = round(found["usage"] * codebook_size), found["perplexity"]
    if perplexity >= 2 and used >= min(0.05 * codebook_size, 256, found["counted"] / 10):
        return ""
    numbers = f"{used} of {codebook_size} codes are used, with a perplexity of {perplexity:.1f}"
    if quantizer == "fsq":  # FSQ has no vectors that could collapse; few codes mean that the network has learned little
        return f"few codes: {numbers}. Are all images of one colour? If not, train for longer, or choose fewer levels"
    return (
        f"the codebook has collapsed: {numbers}. Are all images of one colour? If not, try quantizer=fsq, a smaller "
        "codebook, a smaller code_dim, restart, or a lower learning rate"
    )


def _pair(name: str, a: np.ndarray, b: np.ndarray, side: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Both images as float64 in [0, 255]."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim < 3 or a.shape[-1] != 3:
        raise ValueError(
            f"{name} compares uint8 images [..., H, W, 3] of one shape, "
            f"got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
    if min(a.shape[-3:-1]) < side:
        raise ValueError(f"{name} needs sides of at least {side} pixels, got images {list(a.shape)}")
    return a.astype(np.float64), b.astype(np.float64)


def _structure(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means of SSIM and of its contrast-structure factor over an image, for each channel: float64 [..., 3]."""
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    contrast = (2 * covariance + _C2) / (var_x + var_y + _C2)
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return (luminance * contrast).mean((-3, -2)), contrast.mean((-3, -2))


def _smooth(x: np.ndarray) -> np.ndarray:
    """The mean under the Gaussian window at every place where it fits: [..., H, W, 3] -> [..., H - 10, W - 10, 3]."""
    taps = np.exp(-0.5 * np.square((np.arange(WINDOW) - WINDOW // 2) / SIGMA))
    taps /= taps.sum()
    H, W = x.shape[-3] - WINDOW + 1, x.shape[-2] - WINDOW + 1
    rows = sum(tap * x[..., i : i + H, :, :] for i, tap in enumerate(taps))
    return sum(tap * rows[..., i : i + W, :] for i, tap in enumerate(taps))


def _halved(x: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels. If a side is odd, its last row or column is repeated."""
    x = np.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, x.shape[-3] % 2), (0, x.shape[-2] % 2), (0, 0)], mode="edge")
    x = (x[..., ::2, :, :] + x[..., 1::2, :, :]) / 2
    return (x[..., ::2, :] + x[..., 1::2, :]) / 2
