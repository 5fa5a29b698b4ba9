"""Pictures as bytes -> uint8 RGB -> the size a model wants. Nothing is decoded before its header was found sane.

Axes: `H` `W` height and width in pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ar_unified.errors import UserError

# Formats Pillow reads by itself. Formats that start another program (EPS) or are hardly tested stay out.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class ImageError(ValueError):
    """A picture that cannot be used. `kind`: "empty_file", "unreadable_image" or "image_shape"."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Limits:
    """What a picture may be; read off its header, so that a decompression bomb costs nothing.

    Attributes:
        pixels: most pixels (2**26 is 8192 x 8192, 192 MiB decoded).
        aspect: most times that one side may be as long as the other.
    """

    pixels: int = 2**26
    aspect: float = 20.0

    def check(self, height: int, width: int) -> None:
        """Raises ImageError "image_shape"."""
        found = f"{height} x {width} pixels (height x width)"
        if min(height, width) < 1 or height * width > self.pixels:
            raise ImageError("image_shape", f"expected 1 to {self.pixels} pixels, found {found}")
        if max(height, width) > self.aspect * min(height, width):
            raise ImageError("image_shape", f"expected sides within a factor {self.aspect:g}, found {found}")


LIMITS = Limits()


def decode(data: bytes, limits: Limits = LIMITS) -> np.ndarray:
    """A picture file as read-only uint8 [H, W, 3]: upright (EXIF), first frame, transparency on white, 16 bit as 8.

    Raises:
        ImageError: "empty_file" (no bytes), "image_shape" (outside `limits`), "unreadable_image" (no picture of
            FORMATS, truncated or broken).
    """
    with _opened(data, limits) as picture:
        ImageOps.exif_transpose(picture, in_place=True)
        pixels = np.array(_rgb(picture))
    pixels.flags.writeable = False  # sources hand the same picture out more than once
    return pixels


def size(data: bytes, limits: Limits = LIMITS) -> tuple[int, int]:
    """Height and width in pixels from the header alone, before EXIF rotation. Raises ImageError like `decode`."""
    with _opened(data, limits) as picture:
        return picture.height, picture.width


@contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    if not data:
        raise ImageError("empty_file", "the file has no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            limits.check(picture.height, picture.width)
            yield picture
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("image_shape", str(error)) from error
    except UnidentifiedImageError:  # whose text names an address in memory
        reason = f"expected a picture ({', '.join(FORMATS)}), found bytes that begin with {data[:8]!r}"
        raise ImageError("unreadable_image", reason) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError("unreadable_image", f"{type(error).__name__}: {error}") from error


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bit greyscale; Pillow's own conversion would clip it
        values = np.asarray(picture, np.float32) / 257
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def to_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def to_thumbnail(pixels: np.ndarray, side: int) -> bytes:
    """uint8 [H, W, 3] as the bytes of a JPEG file, scaled so that its longer side has at most `side` pixels."""
    file, picture = io.BytesIO(), Image.fromarray(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Floats in [-1, 1], any shape, as uint8: the inverse of x / 127.5 - 1."""
    return np.clip(np.rint((np.asarray(pixels, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


# ---- sizes -------------------------------------------------------------------------------------------------------


class Cells(Protocol):
    """What a code stands for: `codes_per_position` of them, side by side, are `factor` x `factor` pixels."""

    @property
    def factor(self) -> int: ...

    @property
    def codes_per_position(self) -> int: ...


class NoImages:
    """In place of an image tokenizer where there is text alone: it has no codes, and is never to see a picture."""

    codebook_size, factor, codes_per_position, hash = 0, 1, 1, ""

    def encode(self, images: np.ndarray, /) -> np.ndarray:
        raise UserError("expected text alone, found a picture: this experiment has no image tokenizer")

    decode = encode


@dataclass(frozen=True)
class Resize:
    """How pictures of any size come to sizes that a tokenizer and a layout take.

    Attributes:
        kind: "crop": the largest centred window of the target's aspect, scaled to exactly height x width.
            "aspect": the picture's own aspect, as near as sides that are multiples of `factor` allow, with about
            height * width pixels (the way of Emu3 and Lumina-mGPT); what hangs over is cropped from the middle.
        height, width: of the target, in pixels, multiples of `factor`.
        factor: pixels a side of one code.
        max_height, max_width: largest sides of "aspect", in pixels; 0: twice the target's.
    """

    kind: Literal["crop", "aspect"]
    height: int
    width: int
    factor: int = 1
    max_height: int = 0
    max_width: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("crop", "aspect"):
            raise UserError(f'resize: expected kind "crop" or "aspect", found {self.kind!r}')
        for name in ("height", "width"):
            side = getattr(self, name)
            if side < self.factor or side % self.factor:
                raise UserError(f"resize: expected {name} a multiple of the factor {self.factor}, found {side}")

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture of height x width pixels gets."""
        if self.kind == "crop":
            return self.height, self.width
        scale = math.sqrt(self.height * self.width / (height * width))
        most = (self.max_height or 2 * self.height, self.max_width or 2 * self.width)
        sides = (round(side * scale / self.factor) for side in (height, width))
        h, w = (min(max(n, 1), m // self.factor) * self.factor for n, m in zip(sides, most, strict=True))
        return h, w

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [*target(H, W), 3]. A picture that has its size already is not touched."""
        return resize(pixels, *self.target(*pixels.shape[:2]))


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centred window with the aspect of height x width, scaled (Lanczos) to it. uint8 [H, W, 3]."""
    h, w = pixels.shape[:2]
    if (h, w) == (height, width):
        return pixels
    scale = min(h / height, w / width)
    top, left = (h - height * scale) / 2, (w - width * scale) / 2
    box = (left, top, min(left + width * scale, w), min(top + height * scale, h))
    # reducing_gap: a large photograph is first shrunk by whole factors, which costs a fraction and looks the same.
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0))
