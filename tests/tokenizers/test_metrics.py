"""Distances of images equal other libraries' numbers; and the statistics of a histogram of codes."""

from __future__ import annotations

import numpy as np
import pytest
from ar_tokenizers.image import metrics


def photograph(height: int, width: int, count: int = 2) -> np.ndarray:
    """Smooth shades, edges and grain, the same on every machine: uint8 [count, H, W, 3]."""
    y, x, c, n = np.ogrid[:height, :width, :3, :count]
    y, x = y / height, x / width
    shades = 0.5 + 0.3 * np.sin(7 * x * (n + 1) + 3 * y + c) + 0.15 * ((11 * x + 5 * y * (n + 1)) % 1 > 0.5)
    grain = np.random.default_rng(0).normal(0, 0.02, shades.shape)
    return np.moveaxis(np.clip(255 * (shades + grain), 0, 255).astype(np.uint8), -1, 0)


def worse(images: np.ndarray) -> np.ndarray:
    """The second image is degraded more than the first: blurred along x, paler, noisy."""
    x = images.astype(np.float64)
    for _ in range(3):
        x = (np.roll(x, 1, 2) + x + np.roll(x, -1, 2)) / 3
    noise = np.random.default_rng(1).normal(0, 1, x.shape) * np.array([4.0, 25.0])[:, None, None, None]
    return np.clip(0.95 * x + 6 + noise, 0, 255).astype(np.uint8)


# ---- distances --------------------------------------------------------------------------------------------------


def test_ssim_psnr_and_l1_are_those_of_scikit_image_and_dm_pix():
    """scikit-image 0.26.0, of each image as float64:

        structural_similarity(a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                              use_sample_covariance=False, data_range=255)
        peak_signal_noise_ratio(a, b, data_range=255)

    dm_pix 0.4.5 with jax_enable_x64: ssim(a / 255, b / 255), psnr and mae likewise, which agree to 1e-12.
    """
    a = photograph(181, 204)
    b = worse(a)
    np.testing.assert_allclose(metrics.ssim(a, b), [0.7272005730339502, 0.330305240943427], rtol=1e-10)
    np.testing.assert_allclose(metrics.psnr(a, b), [28.0079949663793, 19.65597194552091], rtol=1e-10)
    np.testing.assert_allclose(metrics.l1(a, b), [0.03135438770893472, 0.08282343595004896], rtol=1e-10)


def test_ms_ssim_is_that_of_pytorch_msssim():
    """pytorch_msssim 1.0.0, float64 tensors, on sides that it need not pad (it pads odd ones with zeros):

    window = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2); win = window / window.sum() as [3, 1, 1, 11]
    ms_ssim(a, b, data_range=255, size_average=False, win=win)
    """
    a = photograph(192, 176)
    np.testing.assert_allclose(metrics.ms_ssim(a, worse(a)), [0.9603965264025355, 0.8803030535555928], rtol=1e-10)
    a = photograph(176, 176)  # the same call with weights=SCALE_WEIGHTS[:3] scaled to the sum of all five
    np.testing.assert_allclose(metrics.ms_ssim(a, worse(a), 3), [0.9407763709262312, 0.8235397851220538], rtol=1e-10)


def test_small_and_odd_images():
    a = photograph(41, 45)
    assert metrics.ms_ssim_side(3) == 41 and metrics.ms_ssim_side() == 161
    assert np.all(metrics.ms_ssim(a, worse(a), 3) < 1)
    np.testing.assert_array_equal(metrics.ms_ssim(a, a, 3), 1)
    # Not exactly equal, because the weights add up to 1.0001.
    np.testing.assert_allclose(metrics.ms_ssim(a, worse(a), 1), metrics.ssim(a, worse(a)), atol=1e-3)
    with pytest.raises(ValueError, match="at least 81 pixels"):
        metrics.ms_ssim(a, a, 4)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        metrics.ssim(a[:, :10], a[:, :10])
    with pytest.raises(ValueError, match="1 to 5 scales"):
        metrics.ms_ssim_side(6)


def test_opposite_images_have_no_ms_ssim_and_it_is_a_number():
    a = photograph(48, 48)
    assert np.all(metrics.ssim(a, 255 - a) < 0)
    np.testing.assert_array_equal(metrics.ms_ssim(a, 255 - a, 3), 0)


@pytest.mark.parametrize("distance", [metrics.psnr, metrics.l1, metrics.ssim, metrics.ms_ssim])
def test_a_batch_is_its_images_and_wrong_ones_are_refused(distance):
    a = photograph(168, 161)
    b = worse(a)
    np.testing.assert_allclose(distance(a, b), [distance(x, y) for x, y in zip(a, b, strict=True)], rtol=1e-12)
    for wrong in (b[:1], b.astype(np.float32), b[..., :1]):
        with pytest.raises(ValueError, match="of one shape"):
            distance(a, wrong)


def test_psnr_is_per_image_and_finite():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1] = 255
    b[1, :2] = 0  # half the pixels off by the whole range
    np.testing.assert_allclose(metrics.psnr(a, b), [100, 10 * np.log10(2)])
    assert metrics.decibels(metrics.mse(a, b).mean()) < metrics.psnr(a, b).mean()


# ---- codes ------------------------------------------------------------------------------------------------------


def test_usage_of_a_codebook():
    assert metrics.usage(np.array([5, 5, 5, 5, 0, 0, 0, 0])) == {
        "usage": 0.5,
        "dead": 4,
        "perplexity": 4.0,
        "entropy_bits": 2.0,
        "normalised_entropy": pytest.approx(2 / 3),
        "top_percent": 0.25,
        "counted": 20,
    }
    assert metrics.usage(np.array([0, 9]))["perplexity"] == 1
    even, skewed = np.full(300, 7), np.r_[400, 300, 200, np.full(297, 1)]
    assert metrics.usage(even)["normalised_entropy"] == pytest.approx(1)
    assert metrics.usage(even)["top_percent"] == pytest.approx(0.01)
    assert metrics.usage(skewed)["top_percent"] == pytest.approx(900 / 1197)
    assert metrics.usage(np.r_[40, 30, np.zeros(147), 30])["top_percent"] == 0.7  # 1 % of 150 codes: two
    with pytest.raises(ValueError, match="expected at least one counted code"):
        metrics.usage(np.zeros(4, np.int32))
