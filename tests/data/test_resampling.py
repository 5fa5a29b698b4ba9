"""Filters with vector instructions equal Pillow's. Tests that need the package cykooz-resizer are marked interop."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ar_unified.data import resampling
from ar_unified.data.images import Resize, decode, to_png
from ar_unified.data.items import resized
from ar_unified.data.resampling import Resample, scaled
from ar_unified.data.sources import open_source, read
from ar_unified.errors import UserError

SIMD: list[Any] = [name for name in get_args(Resample) if name.endswith("_simd")]


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3] with soft and with sharp edges, as photographs have both."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (30, 40, 3), np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[: height // 3, : width // 4] = 255
    pixels[height // 2 :, width // 2 : width // 2 + 3] = 0
    return pixels


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error stops the reading; images do not count as broken."""
    known = importlib.util.find_spec
    missing = (
        "'lanczos_simd' needs the package cykooz-resizer, which is not installed: pip install 'ar_unified\\[simd\\]'"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cykooz_resizer" else known(name))
    resize = Resize("crop", 8, 8, resample="lanczos_simd")
    with pytest.raises(UserError, match=missing):
        resize(smooth(20, 30))
    with pytest.raises(UserError, match=missing):
        decode(to_png(smooth(20, 30)), resize=resize)
    (tmp_path / "a.png").write_bytes(to_png(smooth(20, 30)))
    with pytest.raises(UserError, match=missing):
        list(read(resized(open_source({"kind": "images", "path": str(tmp_path)}), resize), [0]))


@pytest.mark.interop
def test_the_same_filter_with_vector_instructions() -> None:
    """The PSNR between both results is at least 50 dB. Other filters, or a window that is off by half a pixel, give
    less."""
    whole = smooth(480, 640)
    for sides, box in [((256, 256), (80.0, 0.0, 560.0, 480.0)), ((64, 96), (0.0, 20.5, 640.0, 447.1))]:
        image = Image.fromarray(whole)
        for name in SIMD:
            ours = scaled(image, *sides, box, name, 3.0)
            assert ours.shape == (*sides, 3) and ours.dtype == np.uint8
            theirs = {each: scaled(image, *sides, box, each, 3.0) for each in ("lanczos", "bicubic", "bilinear")}
            errors = {each: np.mean((ours.astype(float) - pixels) ** 2) for each, pixels in theirs.items()}
            assert min(errors, key=errors.__getitem__) == name.removesuffix("_simd")
            assert min(errors.values()) < 255**2 / 10**5.0
            half = (box[0] + 0.5, box[1], box[2], box[3])
            moved = scaled(image, *sides, half, name.removesuffix("_simd"), 3.0)
            assert np.mean((ours.astype(float) - moved) ** 2) > 8 * min(errors.values())


@pytest.mark.interop
def test_a_large_image_is_first_shrunk_as_pillow_does_it() -> None:
    """A side is over six times the result's. Windows are at all borders, and the factor does not divide the sides."""
    image = Image.fromarray(smooth(901, 1307))
    for box in [(0.0, 0.0, 901.0, 901.0), (406.0, 0.0, 1307.0, 901.0), (203.0, 0.0, 1104.0, 901.0)]:
        for name in SIMD:
            ours, theirs = (
                scaled(image, 64, 64, box, each, 3.0).astype(float) for each in (name, name.removesuffix("_simd"))
            )
            assert np.mean((ours - theirs) ** 2) < 255**2 / 10**5.3
    shrunk, box = resampling._shrunk(image, 64, 64, (203.0, 0.0, 1104.0, 901.0), 2.5, 3.0)
    assert shrunk.height == -(-901 // 4) and box[3] == 901 / 4


sides = st.integers(1, 90)
shares = st.floats(0, 1)


@pytest.mark.interop
def test_a_first_result_on_the_centre_of_a_pixel() -> None:
    """Weights of 0 next to that pixel are dropped. With a bicubic filter, this window used to end the process."""
    for name in SIMD:
        for _ in range(50):
            image = Image.fromarray(smooth(14, 211))
            found, theirs = (
                scaled(image, 56, 17, (103.375, 0.0, 107.625, 14.0), each, 2.0).astype(float)
                for each in (name, name.removesuffix("_simd"))
            )
            assert np.mean((found - theirs) ** 2) < 255**2 / 10**4


@pytest.mark.interop
@settings(deadline=None)
@given(sides, sides, sides, sides, shares, shares, shares, shares, st.sampled_from(SIMD), st.sampled_from((2.0, 3.0)))
@example(1, 1, 1, 1, 0.0, 0.0, 1.0, 1.0, "lanczos_simd", 3.0)
@example(90, 90, 1, 1, 0.1, 0.3, 1.0, 1.0, "lanczos_simd", 2.0)
@example(14, 50, 56, 17, 0.0, 0.5, 1.0, 0.1, "lanczos_simd", 3.0)
def test_every_window_of_every_size(
    h: int, w: int, height: int, width: int, top: float, left: float, down: float, across: float, name: Any, gap: float
) -> None:
    """White stays white. Greys far from black and white differ from Pillow's only by rounding."""
    begin_x, begin_y = left * w * 0.9, top * h * 0.9
    length_x, length_y = (w - begin_x) * (0.05 + 0.95 * across), (h - begin_y) * (0.05 + 0.95 * down)
    box = (begin_x, begin_y, min(begin_x + length_x, w), min(begin_y + length_y, h))
    white = scaled(Image.new("RGB", (w, h), "white"), height, width, box, name, gap)
    assert white.shape == (height, width, 3) and (white == 255).all()
    pixels = np.random.default_rng(h * 91 + w).integers(100, 141, (h, w, 3), np.uint8)
    found = scaled(Image.fromarray(pixels), height, width, box, name, gap)
    theirs = scaled(Image.fromarray(pixels), height, width, box, name.removesuffix("_simd"), gap)
    assert np.abs(found.astype(int) - theirs).max() <= 2
    if name == "bilinear_simd":
        assert pixels.min() <= found.min() and found.max() <= pixels.max()


@pytest.mark.interop
def test_the_pixels_depend_on_no_processor_and_no_thread() -> None:
    """Two hosts give a picture the same codes, whatever instructions each of them has."""
    from cykooz_resizer import CpuExtensions, Resizer

    image = Image.fromarray(smooth(301, 407))
    box = (53.0, 0.0, 354.0, 301.0)
    expected = {name: scaled(image, 96, 96, box, name, 3.0) for name in SIMD}
    set_by = Resizer.__init__
    here = Resizer().cpu_extensions
    for extensions in {CpuExtensions.none, here}:

        def limited(self: Resizer, extensions: CpuExtensions = extensions) -> None:
            set_by(self)
            self.cpu_extensions = extensions

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Resizer, "__init__", limited)
            for name in SIMD:
                assert np.array_equal(scaled(image, 96, 96, box, name, 3.0), expected[name]), extensions

    found: list[bool] = []

    def draw() -> None:
        found.extend(np.array_equal(scaled(image, 96, 96, box, n, 3.0), expected[n]) for n in SIMD * 20)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * 20 * len(SIMD) and all(found)


@pytest.mark.interop
def test_an_image_is_resized_as_it_is_decoded() -> None:
    pixels = smooth(300, 400)
    for name in SIMD:
        for kind in ("crop", "aspect"):
            resize = Resize(kind, 64, 64, 8, resample=name)  # type: ignore[arg-type]  # one of two
            assert np.array_equal(decode(to_png(pixels), resize=resize), resize(pixels))
    same = Resize("crop", 300, 400, resample="lanczos_simd")
    assert np.array_equal(same(pixels), pixels)
