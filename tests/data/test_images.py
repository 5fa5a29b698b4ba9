from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, JpegImagePlugin, PngImagePlugin

from ar_unified.data.images import ImageError, Limits, Resize, decode, recoloured, resize, to_png, to_rgb
from ar_unified.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_too_little_memory_is_no_fault_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were, a training would leave good images out."""
    data = to_png(np.zeros((8, 8, 3), np.uint8))

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(MemoryError):
        decode(data)


def test_transparency_lies_on_white_in_every_mode() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    rgba = Image.fromarray(pixels)
    palette = rgba.quantize(4)
    for image in (rgba, rgba.convert("LA"), palette):
        out = decode(encoded(image))
        assert out.shape == (2, 2, 3) and (out[1, 1] == 255).all() and not (out[0, 0] == 255).all()


def test_grey_and_sixteen_bit_become_rgb() -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    eight, sixteen = Image.fromarray(ramp.astype(np.uint8)), Image.fromarray(ramp * 257)
    assert np.array_equal(decode(encoded(eight))[..., 1], ramp)
    assert np.array_equal(decode(encoded(sixteen))[..., 2], ramp)


def tiff(values: list[float], dtype: str, *, white: int = 1, bits: int = 0) -> bytes:
    """A TIFF with one row of grey, also of kinds that Pillow cannot write. `white`: 0 if 0 means white."""
    data = np.array(values, dtype).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[np.dtype(dtype).kind]
    bits = bits or 8 * np.dtype(dtype).itemsize
    tags = [
        (256, 4, len(values)), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, white),
        (273, 4, 8 + 2 + 12 * 10 + 4), (277, 3, 1), (278, 4, 1), (279, 4, len(data)), (339, 3, kind),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, size, 1, value) for tag, size, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def png(depth: int, colour: int, row: bytes, clear: bytes, width: int = 2) -> bytes:
    """A PNG with one row. `colour` is 0 for grey or 2 for RGB; `clear` is the transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)) + chunk(b"tRNS", clear)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        tiff([64 / 255, 192 / 255], "<f4"),
        tiff([64.0, 192.0], "<f4"),
        tiff([64 * 257.0, 192 * 257.0], "<f4"),
        tiff([64, 192], "<i4"),
        tiff([64 * 257, 192 * 257], "<u4"),
        tiff([64, 192], "<i2"),
        tiff([64 * 257, 192 * 257], "<u2"),
        tiff([255 - 64, 255 - 192], "u1", white=0),
        tiff([65535 - 64 * 257, 65535 - 192 * 257], "<u2", white=0),
        tiff([1 - 64 / 255, 1 - 192 / 255], "<f4", white=0),
        b"Pf 2 1 -1.0\n" + struct.pack("<ff", 64 / 255, 192 / 255),
        b"P5 2 1 65535\n" + struct.pack(">HH", 64 * 257, 192 * 257),
        b"P5 2 1 4095\n" + struct.pack(">HH", 1028, 3083),
        b"P6 2 1 65535\n" + struct.pack(">HHHHHH", *[64 * 257] * 3, *[192 * 257] * 3),
    ],
    ids=lambda data: "",
)
def test_every_kind_of_number_is_the_same_grey(data: bytes) -> None:
    assert decode(data).tolist() == [[[64] * 3, [192] * 3]]


def test_twelve_bits_end_at_4095() -> None:
    packed = b"\x40\x4c\x0c"  # 1028 and 3084, 12 bits each
    data = tiff([0, 0], "<u2", bits=12)[:-4] + packed
    assert decode(data)[0, :, 0].tolist() == [64, 192]


def test_floats_may_overshoot_and_a_dark_image_stays_dark() -> None:
    assert decode(tiff([-0.003, 1.003], "<f4"))[0, :, 0].tolist() == [0, 255]
    assert decode(tiff([0.0, 0.02], "<f4"))[0, :, 0].tolist() == [0, 5]
    for dtype in ("<f4", "<i4"):
        assert not decode(tiff([0, 0], dtype)).any()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff([0.0, float("nan")], "<f4"), "NaN or infinite"),
        (tiff([0.0, float("inf")], "<f4"), "NaN or infinite"),
        (tiff([-1.0, 1.0], "<f4"), "found -1 to 1, so the value of white is unknown"),
        (tiff([0.0, 3.0], "<f4"), "expected values of 0 to 1 or 0 to 255 or 0 to 65535, found 0 to 3,"),
        (tiff([0.0, 1e6], "<f4"), "found 0 to 1e"),
        (tiff([0, 2**30], "<i4"), "found 0 to 1.07374e"),
        (tiff([0, 2**31 + 5], "<u4"), "the value of white is unknown"),
        (tiff([-5, 200], "<i2"), "found -5 to 200"),
        (tiff([0, 20000], "<i2"), "expected values of 0 to 255, found"),  # the maximum is unknown, 32767 or 65535
        (tiff([-5, 100], "i1"), "signed 8 bit"),
        (tiff([0.0, 1.0], "<f8"), "of a kind that Pillow reads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_whose_range_cannot_be_told_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as error:
        decode(data)
    assert error.value.kind == "unreadable_image"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(1, 0, b"\x40", b"\0\0"), [255, 255]),
        (png(1, 0, b"\x40", b"\0\1"), [0, 255]),
        (png(2, 0, b"\x60", b"\0\1"), [255, 170]),
        (png(4, 0, b"\x4c", b"\0\4"), [255, 204]),
        (png(8, 0, b"\x40\xc0", b"\0\x40"), [255, 192]),
        (png(16, 0, b"\x40\x40\xc0\xc0", b"\x40\x40"), [255, 192]),
        (png(16, 0, b"\x40\x41\xc0\xc0", b"\x40\x40"), [64, 192]),
        (png(8, 2, b"\x40\x40\x40\xc0\xc0\xc0", b"\0\x40" * 3), [255, 192]),
        (png(16, 2, b"\x40\x41" * 3 + b"\xc0\xc0" * 3, b"\x40\x41" * 3), [255, 192]),
    ],
    ids=["1", "1 white", "2", "4", "8", "16", "16, nearly", "rgb 8", "rgb 16"],
)
def test_a_transparent_colour_is_white_in_every_depth(data: bytes, expected: list[int]) -> None:
    assert decode(data)[0, :, 0].tolist() == expected


def test_the_other_modes_keep_their_colours() -> None:
    red = Image.new("RGB", (16, 16), (200, 40, 40))
    inks = red.convert("CMYK")
    for image, kind in [(inks, "JPEG"), (inks, "TIFF"), (red.convert("YCbCr"), "TIFF"), (red.quantize(4), "GIF")]:
        assert np.abs(decode(encoded(image, kind))[8, 8].astype(int) - (200, 40, 40)).max() <= 6, (image.mode, kind)
    assert (decode(encoded(Image.new("CMYK", (8, 8)), "JPEG")) == 255).all(), "no ink is white"
    lab = Image.new("LAB", (2, 2), (255, 128, 128))
    assert decode(encoded(lab, "TIFF")).min() > 240
    assert set(decode(encoded(Image.new("1", (2, 2), 1)))[0, 0]) == {255}
    sixteen = b"\x40\x40\xc0\xc0\x20\x20" * 2
    assert decode(png(16, 2, sixteen, b"\0\1" * 3))[0, 0].tolist() == [64, 192, 32]


def test_of_several_images_the_first_is_taken() -> None:
    frames = [Image.new("L", (4, 4), grey) for grey in (64, 192)]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert (decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)) == 64).all(), kind


def test_images_that_others_opened_are_read_alike() -> None:
    for data in (png(4, 0, b"\x4c", b"\0\4"), tiff([64, 192], "<i4"), encoded(Image.new("LA", (3, 2)))):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(to_rgb(image), decode(data)) and np.array_equal(to_rgb(image), decode(data))
    assert to_rgb(Image.fromarray(np.array([[0.25, 1.0]], np.float32)))[0, :, 0].tolist() == [64, 255]


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    assert decode(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).shape == (8, 4, 3)


# The XYZ of red, green and blue (columns) for Display P3 and sRGB, adapted to D50.
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2."""
    at, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">3I", *D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


D50 = (63190, 65536, 54061)
GAMMA = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256))
NAMED = {
    b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"Wide\0" + bytes(78),
    b"cprt": b"text" + bytes(4) + b"-\0",
}


def xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def wide() -> bytes:
    points = {name: xyz(P3[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    white = {b"wtpt": xyz(np.array(D50) / 65536)}
    return profile(b"RGB ", NAMED | white | points | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), GAMMA))


def test_wide_gamut_becomes_srgb() -> None:
    shown = np.array([180, 90, 60])
    linear = np.linalg.inv(SRGB) @ P3 @ (shown / 255) ** 2.2
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)
    assert expected[0] > 188 and expected[2] < 55, "the same numbers mean a stronger colour"
    image = Image.new("RGB", (8, 8), tuple(shown.tolist()))
    clear = Image.merge("RGBA", (*image.split(), Image.new("L", (8, 8), 255)))
    for each, kind in [(image, "PNG"), (image, "TIFF"), (clear, "PNG"), (clear, "WEBP"), (image.quantize(4), "PNG")]:
        options = {"lossless": True} if kind == "WEBP" else {}
        found = decode(encoded(each, kind, icc_profile=wide(), **options))[4, 4]
        assert np.abs(found - expected).max() <= 1.5, (each.mode, kind)
    assert np.abs(decode(encoded(image, "JPEG", icc_profile=wide(), quality=98))[4, 4] - expected).max() <= 4
    exif = Image.Exif()
    exif[274] = 6
    turned = decode(encoded(image.resize((8, 4)), "PNG", icc_profile=wide(), exif=exif))
    assert turned.shape == (8, 4, 3) and np.abs(turned[4, 2] - expected).max() <= 1.5


def test_inks_follow_their_profile() -> None:
    even, identity = bytes(range(256)), struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).flatten())
    corners = (
        bytes([255, 128, 128]) + bytes([0, 128, 128]) * 15
    )  # in Lab: paper is white, and full ink of any colour is black
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + even * 4 + corners + even * 3
    made = bytearray(profile(b"CMYK", NAMED | {b"wtpt": xyz(np.array(D50) / 65536), b"A2B0": lut}))
    made[12:16], made[20:24] = b"prtr", b"Lab "
    image = Image.new("CMYK", (8, 8), (128, 0, 0, 0))
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    for kind, options in (("JPEG", {"quality": 98}), ("TIFF", {})):
        found = decode(encoded(image, kind, icc_profile=bytes(made), **options)).astype(int)
        assert np.ptp(found[4, 1]) <= 3 and 100 < found[4, 1, 0] < 140 and found[4, 6].min() > 250, kind


def test_a_grey_profile_and_one_that_fits_nothing() -> None:
    dark = b"curv" + bytes(4) + struct.pack(">IH", 1, 3 * 256)  # a gamma of 3
    grey = profile(b"GRAY", NAMED | {b"wtpt": xyz(np.array(D50) / 65536), b"kTRC": dark})
    value = decode(encoded(Image.new("L", (4, 4), 128), "PNG", icc_profile=grey))[0, 0]
    assert abs(int(value[0]) - 255 * (1.055 * ((128 / 255) ** 3) ** (1 / 2.4) - 0.055)) <= 2 and len(set(value)) == 1
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (4, 4), (180, 90, 60))
    for odd in (grey, srgb, b"no profile", wide()[:200]):
        assert decode(encoded(image, "PNG", icc_profile=odd))[0, 0].tolist() == [180, 90, 60]


def test_bombs_are_refused_by_their_header() -> None:
    whole = encoded(Image.new("1", (4000, 4000)))
    with pytest.raises(ImageError, match="4000 x 4000") as bomb:
        decode(whole[:100], Limits(pixels=10**6))  # these bytes contain the header and no pixels
    assert bomb.value.kind == "image_shape"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty_file"),
        (b"GIF, they said", "unreadable_image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "unreadable_image"),
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


def test_png_round_trips() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 9, 3), np.uint8)
    assert np.array_equal(decode(to_png(pixels)), pixels)
    assert resize(pixels, 3, 3).shape == (3, 3, 3)


@pytest.mark.parametrize("side", [(25, 32), (23, 29)], ids=["top", "left"])
def test_a_window_whose_edge_rounds_below_zero_is_inside(side: tuple[int, int]) -> None:
    """(25 - 88 * 25 / 88) / 2 is -2e-15, and Pillow refuses a box that begins at a negative number."""
    assert resize(np.full((*side, 3), 7, np.uint8), 88, 112).min() == 7


def test_recoloured_changes_colours_and_no_shape() -> None:
    pixels = np.array([[[0, 100, 200], [255, 255, 255], [0, 0, 0], [0, 100, 200]]], np.uint8)
    assert np.array_equal(recoloured(pixels, (0.0, 0.5, 0.5, 0.5)), pixels)
    # The 0.99 chooses the last order of the channels, and the 0.0 raises the last channel to the power of 1/2.
    turned = recoloured(pixels, (0.99, 0.5, 0.5, 0.0))
    assert turned[0, 0].tolist() == [200, 100, 0] and turned[0, :3].max() == 255 and not turned[0, 2].any()
    assert recoloured(pixels, (0.2, 0.5, 0.0, 0.9999))[0, 0].tolist() == [0, round(255 * (200 / 255) ** 0.5), 39]
    seen = {recoloured(pixels, draw)[0, 0].tobytes() for draw in np.random.default_rng(0).random((50, 4))}
    assert len(seen) > 40


def photograph(height: int, width: int) -> np.ndarray:
    """Smooth shapes with fine waves, which a filter must remove."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 61) + np.cos(y / 47), np.sin((x + y) / 83), np.cos(x / 29 - y / 53)]
    fine = 0.2 * np.sin(x * 2.1) * np.cos(y * 1.7)
    return np.stack([np.clip(128 + 50 * (wave + fine), 0, 255) for wave in waves], axis=-1).astype(np.uint8)


def jpeg(pixels: np.ndarray, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=95, exif=exif)
    return file.getvalue()


def near(a: np.ndarray, b: np.ndarray) -> float:
    """The PSNR of two images, in dB."""
    return float(-10 * np.log10(np.mean((a.astype(np.float64) - b) ** 2) / 255**2 + 1e-12))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(512, 768), (515, 771), (1030, 529)])
def test_a_jpeg_that_its_decoder_made_smaller_shows_the_same(shape: tuple[int, int], orientation: int) -> None:
    """The image is at the same place: half a pixel of shift would cost 5 to 13 dB."""
    data, ways = jpeg(photograph(*shape), orientation), (Resize("crop", 64, 64), Resize("aspect", 64, 64, 8))
    for full in ways:
        reduced = dataclasses.replace(full, decoding="reduced")
        a, b = decode(data, resize=full), decode(data, resize=reduced)
        assert a.shape == b.shape and near(a, b) > 52


def test_only_a_jpeg_of_four_times_the_size_is_decoded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []  # for each call, by what factor the decoder reduced the side
    draft = JpegImagePlugin.JpegImageFile.draft

    def told(image: Any, *arguments: Any) -> Any:
        height, found = image.height, draft(image, *arguments)
        asked.append(height / image.height)
        return found

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", told)
    reduced, full = Resize("crop", 64, 64, decoding="reduced"), Resize("crop", 64, 64)
    for side, scale in ((255, 0), (256, 2), (511, 2), (512, 4), (1024, 8), (2000, 8)):
        asked.clear()
        data = jpeg(photograph(side, side + 90))
        decode(data, resize=full)
        assert not asked
        decode(data, resize=reduced)
        assert list(map(round, asked)) == ([scale] if scale else [])
    decode(to_png(photograph(512, 512)), resize=reduced)
    assert len(asked) == 1, "a PNG is read whole"


def test_the_filter_decides_the_pixels() -> None:
    pixels = photograph(100, 130)
    found = {name: Resize("crop", 32, 32, resample=name)(pixels) for name in ("lanczos", "bicubic", "bilinear")}
    box = (15.0, 0.0, 115.0, 100.0)
    for name, ours in found.items():
        theirs = Image.fromarray(pixels).resize((32, 32), Image.Resampling[name.upper()], box)
        assert np.array_equal(ours, theirs), name
    assert not np.array_equal(found["lanczos"], found["bilinear"])
    with pytest.raises(UserError, match="resample 'lanczos' or 'bicubic' or .* or 'bilinear_simd', found 'nearest'"):
        Resize("crop", 32, 32, resample="nearest")  # type: ignore[arg-type]


def test_records_of_before_say_what_the_defaults_are() -> None:
    """A folder that was prepared without these keys has the same plan."""
    known = {"kind": "crop", "height": 8, "width": 8, "factor": 1, "max_height": 0, "max_width": 0}
    assert Resize("crop", 8, 8).record() == known
    assert Resize("crop", 8, 8, decoding="reduced").record() == known | {"decoding": "reduced"}
