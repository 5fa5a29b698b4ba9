"""What an image tokenizer is worth, without any pretrained network."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture, in dB: uint8 [..., H, W, 3] twice -> float64 [...].

    Its mean over pictures is what tokenizer papers report; the PSNR of the mean error over a data set is lower.
    Identical pictures have 100 dB, so that a mean over pictures stays finite.

    Raises:
      ValueError: the pictures differ in shape, or are not uint8.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"psnr compares uint8 pictures of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    mse = np.mean(np.square(a.astype(np.float64) - b), axis=(-3, -2, -1))
    return 10 * np.log10(255.0**2 / np.maximum(mse, 255.0**2 * 1e-10))


def usage(counts: np.ndarray) -> dict[str, float]:
    """How a codebook is used, from how often each of its K codes was.

    Perplexity depends on how much was counted: count a whole evaluation set, not a batch.

    Returns:
      usage: the share of codes used at all; entropy_bits of the empirical distribution, at most log2(K);
      perplexity: 2 ** entropy_bits, the number of equally used codes with that entropy.
    """
    counts = np.asarray(counts, np.float64)
    if not counts.size or counts.sum() <= 0:
        raise ValueError(f"no code was counted, in a histogram of shape {counts.shape}")
    p = counts[counts > 0] / counts.sum()
    entropy = float(-(p * np.log2(p)).sum()) + 0.0
    return {"usage": float((counts > 0).mean()), "perplexity": 2.0**entropy, "entropy_bits": entropy}


def collapse(found: Mapping[str, float], codebook_size: int) -> str:
    """A warning where a codebook is hardly used, with the numbers that show it; "" where all is well.

    Args:
      found: what `usage` said of at least some thousand codes.
    """
    if not found:
        return ""
    used, perplexity = round(found["usage"] * codebook_size), found["perplexity"]
    if perplexity >= 2 and (used >= 0.05 * codebook_size or used >= 256):
        return ""
    return (
        f"the codebook has collapsed: {used} of {codebook_size} codes are used, with a perplexity of {perplexity:.1f}. "
        "Are all pictures of one colour? Else try quantizer=fsq, a smaller codebook, a smaller code_dim, restart, or "
        "a lower learning rate"
    )
