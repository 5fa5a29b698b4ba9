from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ar_unified.data.images import ImageError, Limits, Resize, decode, resize, to_png, to_uint8


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_transparency_lies_on_white_in_every_mode() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    rgba = Image.fromarray(pixels)
    palette = rgba.quantize(4)
    for picture in (rgba, rgba.convert("LA"), palette):
        out = decode(encoded(picture))
        assert out.shape == (2, 2, 3) and (out[1, 1] == 255).all() and not (out[0, 0] == 255).all()


def test_grey_and_sixteen_bit_become_rgb() -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    eight, sixteen = Image.fromarray(ramp.astype(np.uint8)), Image.fromarray(ramp * 257)
    assert np.array_equal(decode(encoded(eight))[..., 1], ramp)
    assert np.array_equal(decode(encoded(sixteen))[..., 2], ramp)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees for display
    assert decode(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).shape == (8, 4, 3)


def test_bombs_are_refused_by_their_header() -> None:
    whole = encoded(Image.new("1", (4000, 4000)))
    with pytest.raises(ImageError, match="4000 x 4000") as bomb:
        decode(whole[:100], Limits(pixels=10**6))  # the pixels are not even there
    assert bomb.value.kind == "image_shape"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty_file"),
        (b"GIF, they said", "unreadable_image"),
        (encoded(Image.effect_noise((64, 64), 50))[:-200], "unreadable_image"),
        (encoded(Image.new("RGB", (20000, 1))), "image_shape"),
    ],
)
def test_what_is_wrong_has_a_kind(data: bytes, kind: str) -> None:
    with pytest.raises(ImageError) as error:
        decode(data)
    assert error.value.kind == kind


def test_crop_takes_the_middle_and_touches_nothing_that_fits() -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    assert (Resize("crop", 8, 8)(pixels) == 200).all()
    same = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert Resize("crop", 8, 8)(same) is same


@pytest.mark.parametrize("shape", [(100, 100), (60, 300), (5, 7), (1000, 1490), (300, 20)])
def test_aspect_keeps_area_and_stays_inside_the_layout(shape: tuple[int, int]) -> None:
    policy = Resize("aspect", 64, 64, factor=8, max_height=96, max_width=96)
    h, w = policy.target(*shape)
    assert h % 8 == w % 8 == 0 and 8 <= h <= 96 and 8 <= w <= 96
    if max(shape) <= 2 * min(shape):
        assert 0.75 < h * w / 64**2 < 1.3 and 0.8 < (h / w) / (shape[0] / shape[1]) < 1.25
    assert policy(np.zeros((*shape, 3), np.uint8)).shape == (h, w, 3)


def test_png_and_float_round_trips() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 9, 3), np.uint8)
    assert np.array_equal(decode(to_png(pixels)), pixels)
    assert np.array_equal(to_uint8(pixels / 127.5 - 1), pixels)
    assert resize(pixels, 3, 3).shape == (3, 3, 3)
