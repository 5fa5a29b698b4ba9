"""Broken image files, and unusual ones that are good. The tables say which fault or which pixels each file has."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ar_unified.data.images import to_png

GOOD = to_png(np.full((8, 8, 3), 7, np.uint8))


def image(**options: Any) -> bytes:
    """The file of a black image."""
    picture = Image.new(options.pop("mode", "RGB"), options.pop("size", (8, 8)))
    return saved(picture, options.pop("format", "PNG"), **options)


def saved(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _zeros(size: int) -> bytes:
    """`size` MiB of zeros, compressed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size)) + packer.flush()


def _png_bomb(side: int) -> bytes:
    """A PNG of side x side black and white pixels."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    data = png_chunk(b"IDAT", _zeros(side * (side // 8 + 1) // (1 << 20) + 1))
    return GOOD[:8] + head + data + png_chunk(b"IEND", b"")


def _cut(format: str, share: float = 0.6, **options: Any) -> bytes:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    data = saved(noise.convert("P") if format == "GIF" else noise, format, **options)
    return data[: int(len(data) * share)]


def _damaged(data: bytes, at: int, by: bytes) -> bytes:
    return data[:at] + by + data[at + len(by) :]


def _floats(values: list[list[float]]) -> bytes:
    return saved(Image.fromarray(np.array(values, np.float32)), "TIFF")


FRAMES = [Image.new("L", (8, 8), grey) for grey in (0, 255)]
ROTATED = Image.Exif()
ROTATED[274] = 6

# Name -> the file and the kind of its fault.
BROKEN: dict[str, tuple[bytes, str]] = {
    "png cut short": (_cut("PNG"), "unreadable_image"),
    "jpeg cut short": (_cut("JPEG"), "unreadable_image"),
    "webp cut short": (_cut("WEBP"), "unreadable_image"),
    "gif cut short": (_cut("GIF"), "unreadable_image"),
    "bmp cut short": (_cut("BMP"), "unreadable_image"),
    "tiff cut short": (_cut("TIFF", 0.4), "unreadable_image"),
    "pnm cut short": (_cut("PPM"), "unreadable_image"),
    "a checksum that is wrong": (_damaged(GOOD, 45, b"\xff\xff\xff"), "unreadable_image"),
    "empty": (b"", "empty_file"),
    "zeros": (bytes(4096), "unreadable_image"),
    "html in place of an image": (b"<!doctype html><title>404</title>", "unreadable_image"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "unreadable_image"),
    "a zip archive": (b"PK\x03\x04" + bytes(100), "unreadable_image"),
    "eps, which would start a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "unreadable_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "unreadable_image"),
    "bomb: 30,000 x 30,000 in a few bytes": (_png_bomb(30_000), "image_shape"),
    "bomb: a text of 200 MB": (
        GOOD[:33] + png_chunk(b"zTXt", b"a\0\0" + _zeros(200)) + GOOD[33:],
        "unreadable_image",
    ),
    "bomb: a bmp that claims 2,000,000 x 2,000": (
        _damaged(image(format="BMP"), 18, struct.pack("<II", 2_000_000, 2_000)), "image_shape"
    ),
    "30,000 px wide": (image(size=(30_000, 8)), "image_shape"),
    "NaN": (_floats([[0.5, np.nan]] * 2), "unreadable_image"),
    "infinite": (_floats([[0.5, np.inf]] * 2), "unreadable_image"),
    "floats of no range": (_floats([[0.5, 1e9]] * 2), "unreadable_image"),
    "no pixels": (GOOD[:16] + bytes(8) + GOOD[24:], "unreadable_image"),
    "a tiff whose directory is itself": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "unreadable_image"),
}  # fmt: skip


def _upright(top: int, bottom: int) -> np.ndarray:
    grey = np.full((16, 16), top, np.uint8)
    grey[8:] = bottom
    return grey


def _of(mode: str, format: str, **options: Any) -> Callable[[np.ndarray], bytes]:
    return lambda grey: saved(Image.fromarray(grey).convert(mode), format, **options)


def _clear(grey: np.ndarray) -> bytes:
    return saved(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(np.zeros_like(grey))]))


# Name -> the file of a 16 x 16 image with one grey in the upper half and one in the lower half.
ODD: dict[str, Callable[[np.ndarray], bytes]] = {
    "png": _of("RGB", "PNG"),
    "jpeg": _of("RGB", "JPEG", quality=95),
    "webp": _of("RGB", "WEBP", lossless=True),
    "bmp": _of("RGB", "BMP"),
    "pnm": _of("RGB", "PPM"),
    "tiff": _of("RGB", "TIFF"),
    "grey": _of("L", "PNG"),
    "palette": _of("P", "PNG"),
    "inks": _of("CMYK", "JPEG", quality=95),
    "inks in a tiff": _of("CMYK", "TIFF"),
    "alpha": _of("RGBA", "PNG"),
    "1 bit": lambda grey: saved(Image.fromarray(grey > 127)),
    "16 bit": lambda grey: saved(Image.fromarray(grey.astype(np.uint16) * 257)),
    "floats": lambda grey: saved(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
    "animated": lambda grey: saved(Image.fromarray(grey), "GIF", save_all=True, append_images=FRAMES),
    "rotated": lambda grey: saved(Image.fromarray(np.rot90(grey).copy()), "JPEG", exif=ROTATED, quality=95),
    "transparent": _clear,
}


def odd(number: int, format: str = "") -> tuple[bytes, tuple[int, int]]:
    """The image file for a number, in one of the formats of ODD, and its two greys from 0 to 15."""
    name = format or list(ODD)[number % len(ODD)]
    greys = number * 7 % 16, number // 16 * 5 % 16
    data = ODD[name](_upright(*(16 * grey + 8 for grey in greys)))
    if name == "transparent":
        return data, (15, 15)
    if name == "1 bit":
        return data, (15 * (greys[0] > 7), 15 * (greys[1] > 7))
    return data, greys


# ---- what a set holds -------------------------------------------------------------------------------------------

Said = tuple[str, tuple[tuple[int, int], ...]]  # a document's text without blanks, and the two greys of each image
Bad = tuple[str, str]  # a bad item's path inside the set, and the kind of its fault
LONG = "a long caption " * 70_000  # 1 MB


@dataclass
class Part:
    """What one source holds: its items in order (each with its content or its fault), and the kinds of faults."""

    spec: dict[str, Any]
    items: list[Said | Bad] = field(default_factory=list)
    ways: set[str] = field(default_factory=set)

    @property
    def good(self) -> list[Said]:
        return [item for item in self.items if isinstance(item[1], tuple)]

    @property
    def bad(self) -> list[Bad]:
        return [item for item in self.items if isinstance(item[1], str)]


def said(text: str, *greys: tuple[int, int]) -> Said:
    return "".join(text.split()), greys


def odd_text(number: int) -> str:
    """Good texts: with control characters, direction marks, text that looks like a token, and so on."""
    texts = ("plain", "\a\b\x1b[2J\u202e", "<boi> <image> </s>", "naïve \U0001f9d1\u200d\U0001f33e", "'\"\\", "\ufeffx")
    return f"{number} {texts[number % len(texts)]}"
