"""Converts the pixels of an image file to uint8 RGB. The table says how each kind of pixel is converted.

1, 2, 4, 8 bit grey and RGB           kept as they are
16 bit grey, RGB, with or without alpha; 12 bit TIFF   white is 65535 (4095 for 12 bit), even if no pixel has it
palette, CMYK (Adobe's too), YCbCr, LAB                converted to RGB by Pillow
alpha, a transparent colour or palette entry           drawn on a white background
floats (TIFF, PFM)                    white is 1, 255 or 65535; `_white` chooses from the values of the pixels
32 bit and signed 16 bit integers     white is 255 or 65535, chosen in the same way
grey in which 0 is white              inverted
NaN, infinite or negative values, an unknown range, signed 8 bit   refused as "unreadable_image"
animations, files of several pages    only the first image is used
EXIF orientation                      the image is turned upright
an ICC profile (Display P3, Adobe RGB, inks, grey)     converted to sRGB; a profile that is broken, or made for other
                                      pixels, is ignored

"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED = 2  # the sample format of signed integers
_WHITES = (1, 255, 65535)  # the values that white may have if the file does not define it


AnyImage = np.ndarray | Image.Image  # uint8 [H, W, 3], or the same pixels as an image of Pillow


class ImageError(ValueError):
    """An image that cannot be used. `kind` is "empty_file", "unreadable_image" or "image_shape"."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def in_rgb(image: Image.Image) -> AnyImage:
    """Converts an image of Pillow to upright RGB, by the table above. Raises ImageError."""
    tags, clear, profile = dict(getattr(image, "tag_v2", {})), _clear(image), image.info.get("icc_profile")
    declared = 65535 if image.format in ("PNG", "PPM") and image.mode == "I" else 0
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)) and image.mode not in ("I", "F"):
        raise ImageError("unreadable_image", "expected values of 0 or more, found a TIFF of signed 8 bit values")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        white = declared or _white(values, image.mode, tags)
        grey = np.clip(np.rint(values.astype(np.float32) * np.float32(255 / white)), 0, 255).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == 0:  # 0 is white, and Pillow inverts only 8 bit images
            grey = 255 - grey
        if clear is not None:
            grey[values == clear] = 255
        return np.repeat(grey[..., None], 3, axis=-1)
    if clear is not None:
        image.info["transparency"] = clear
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = _in_srgb(image.convert("RGBA"), profile)
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    else:
        image = _in_srgb(image.convert("RGB") if image.mode == "P" else image, profile)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_srgb(image: Image.Image, profile: object) -> Image.Image:
    """Converts RGB, RGBA, CMYK or L to sRGB if its profile can be used. Returns other images unchanged."""
    transform = _to_srgb(profile, image.mode) if isinstance(profile, bytes) and profile else None
    found = transform and ImageCms.applyTransform(image, transform)
    return found or image


@functools.lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None if the profile is sRGB already or cannot be used."""
    if mode not in ("RGB", "RGBA", "CMYK", "L"):
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(opened).startswith("sRGB"):
            return None
        return ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGBA" if mode == "RGBA" else "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _white(values: np.ndarray, mode: str, tags: Mapping[int, Any]) -> int:
    """The value of white in a grey image [H, W] whose mode does not define it. Raises ImageError.

    Floats are in 0..1, 0..255 or 0..65535, and integers of mode "I" are in 0..255 or 0..65535. The smallest range that
    contains all pixels is chosen. Values may be outside by 1/255 of the range, because resampling overshoots. If no
    pixel is brighter than 1/16 of 255 or 65535, the image would be almost black. It probably has another range, so it
    is refused.
    """
    bits = int(np.max(tags.get(_BITS, 16)))
    if mode.startswith("I;16"):
        return 2**bits - 1 if bits < 16 else 65535
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(
            "unreadable_image", "expected finite values, found NaN or infinite values in an image of floats"
        )
    signed16 = bits == 16 and _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1))  # the largest value is 32767
    whites = _WHITES if mode == "F" else _WHITES[1:2] if signed16 else _WHITES[1:]
    for white in whites:
        least = 0 if white == 1 else white / 16
        if low >= -white / 255 and (least <= high <= white + white / 255 or low == high == 0):
            return white
    ranges = " or ".join(f"0 to {white}" for white in whites)
    raise ImageError(
        "unreadable_image",
        f"expected values of {ranges}, found {low:g} to {high:g}, so the value of white is unknown; save the image "
        "in 8 bits",
    )


def _clear(image: Image.Image) -> int | tuple[int, ...] | None:
    """The transparent colour of a PNG without a palette, as Pillow's pixels store it; None if there is none.

    A PNG stores the colour in the bit depth of the file. Pillow scales 2 and 4 bits to 8, and in 16 bit RGB it keeps
    the upper 8 bits. So the colour is converted in the same way.
    """
    clear = image.info.get("transparency")
    if image.format != "PNG" or image.mode == "P" or not isinstance(clear, int | tuple):
        return None
    tiles = getattr(image, "tile", None)  # read before the pixels, because Pillow drops it when it loads them
    raw = tiles[0].args if tiles else ""
    if isinstance(clear, tuple):
        return tuple(value >> 8 for value in clear) if raw == "RGB;16B" else clear
    return clear * {"L;2": 85, "L;4": 17}.get(str(raw), 1)
