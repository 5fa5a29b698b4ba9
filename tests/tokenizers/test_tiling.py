"""Windows with enough overlap change nothing, and with less overlap no seam is visible."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from ar_tokenizers.image import space_to_depth
from ar_tokenizers.image.autoencoder import init
from ar_tokenizers.image.config import AutoencoderConfig
from ar_tokenizers.image.tiling import map_windows
from ar_tokenizers.image.tokenizer import ImageTokenizer

SMALL = AutoencoderConfig(factor=4, patch=2, width=8, multipliers=(1, 1), blocks=(1, 1), levels=(5, 4, 3))
VQGAN = AutoencoderConfig(
    backbone="vqgan", factor=4, patch=2, width=32, multipliers=(1, 1), blocks=(1, 1), attention="middle", z_channels=8,
    levels=(5, 4, 3),
)  # fmt: skip


@functools.cache
def tokenizer(config: AutoencoderConfig) -> ImageTokenizer:
    noise = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    scale = lambda leaf: 0.2 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5  # noqa: E731
    params = jax.tree.map(lambda leaf: np.float32(noise.normal(leaf.ndim == 1, scale(leaf), leaf.shape)), shapes)
    return ImageTokenizer(config, params, batch_size=4)


def random_images(count: int, height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(1).integers(0, 256, (count, height // 4, width // 4, 3), np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def test_windows_change_nothing_where_they_overlap_as_far_as_the_network_reaches():
    """34 codes are three windows of 16 that overlap by exactly 7, and 42 are two of 28 that overlap by exactly 14."""
    codec, images = tokenizer(SMALL), random_images(2, 64, 34 * 4)
    assert space_to_depth.receptive_radius(SMALL) == 14
    np.testing.assert_array_equal(codec.encode(images, tile=64, overlap=28), codec.encode(images))
    codes = np.random.default_rng(2).integers(0, codec.codebook_size, (2, 16, 42))
    whole, tiled = codec.decode(codes), codec.decode(codes, tile=112, overlap=56)
    assert np.abs(whole.astype(int) - tiled).max() <= 1 and (whole == tiled).mean() > 0.999  # other order of sums


def test_windows_change_something_where_they_overlap_less():
    codec, images = tokenizer(SMALL), random_images(2, 64, 31 * 4)
    assert (codec.encode(images, tile=64, overlap=4) != codec.encode(images)).any()
    codes = np.random.default_rng(2).integers(0, codec.codebook_size, (2, 16, 54))
    assert np.abs(codec.decode(codes).astype(int) - codec.decode(codes, tile=112, overlap=8)).max() > 1


def test_blending_leaves_no_seam_where_norms_differ_between_windows():
    """A seam is a jump, from one column to the next, in the difference to the image decoded as a whole. The jump in the
    middle of an overlap of six codes is compared with the mean jump around it."""
    codec = tokenizer(VQGAN)
    codes = np.random.default_rng(2).integers(0, codec.codebook_size, (4, 8, 18))
    whole = codec.decode(codes).astype(int)

    def seam(blend: bool) -> float:
        windows = map_windows(codec.decode, codes, scales=(1, 4), tile=12, overlap=6, blend=blend)
        steps = np.abs(np.diff(windows - whole, axis=2)).mean(axis=(0, 1, 3))
        return float(steps[35] / steps[24:48].mean())

    assert seam(blend=False) > 1.5 and seam(blend=True) < 1.3  # 1.68 and 1.22 for these weights


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (8, 21), (16, 8)])
def test_any_size_is_covered(size):
    """A repeating pattern is encoded. Every code is right, wherever the windows are."""
    x = np.arange(2 * size[0] * size[1]).reshape(2, *size)
    out = map_windows(lambda part: part, x, scales=(1, 1), tile=8, overlap=3, blend=False)
    np.testing.assert_array_equal(out, x)
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    up = lambda part: part.repeat(2, axis=1).repeat(2, axis=2)  # noqa: E731
    np.testing.assert_array_equal(map_windows(up, x, scales=(1, 2), tile=8, overlap=3, blend=True), doubled)


def test_a_window_has_one_shape_and_a_bounded_batch(monkeypatch):
    codec = tokenizer(SMALL)
    seen = set()
    run = codec._encode
    monkeypatch.setattr(codec, "_encode", lambda params, rows: seen.add(rows.shape) or run(params, rows))
    codec.encode(random_images(3, 84, 148), tile=64, overlap=16)
    assert seen == {(4, 64, 64, 3)}


@pytest.mark.parametrize(
    ("window", "message"),
    [({"tile": 30}, "multiples of 4"), ({"tile": 32, "overlap": 6}, "multiples of 4"),
     ({"tile": 32, "overlap": 20}, "0 to 4 codes, got 5")],
)  # fmt: skip
def test_impossible_windows_are_refused(window, message):
    codec = tokenizer(SMALL)
    with pytest.raises(ValueError, match=message):
        codec.encode(random_images(1, 64, 64), **window)


def test_windows_do_not_hide_a_image_that_does_not_divide():
    codec = tokenizer(SMALL)
    with pytest.raises(ValueError, match="78 x 64 pixels"):
        codec.encode(np.zeros((1, 78, 64, 3), np.uint8), tile=32)
