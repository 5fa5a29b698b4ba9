"""The filters that resize an image: Pillow's, and the same ones computed with vector instructions.

Pillow's own code does not use vector instructions. Reading a photograph of 1,536 x 1,152 pixels takes 20 ms, of which
Lanczos takes 13 ms. Filters whose names end in `_simd` use the Rust crate fast_image_resize (package cykooz-resizer).
They take a sixth of the time or less (docs/data_at_scale.md). The crate rounds its weights to 16 bits (Pillow: 22
bits), and filters columns before rows. So the crate's pixels differ from Pillow's. This is why its filters have their
own names, and Pillow's filter remains the default.

The crate's bicubic filter is left out, because version 6.1 may read outside its buffer and crash. This happens where an
image is enlarged and the first output pixel lies on the centre of an input pixel. There the weights of the neighbouring
input pixels are 0, and the crate drops these pixels, but the next output pixel needs them. The weights of the two
filters that are used here are 0 only at their ends, so the first output pixel always needs the first input pixels.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Literal

import numpy as np
from PIL import Image

from ar_unified.errors import UserError

Resample = Literal["lanczos", "bicubic", "bilinear", "lanczos_simd", "bilinear_simd"]
# The crate's name of a filter, and how far the filter reaches beyond the box in Pillow, in output pixels
_VECTORS = {"lanczos_simd": ("lanczos3", 2.5), "bilinear_simd": ("bilinear", 0.5)}
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def require(resample: str) -> None:
    """Raises UserError if the package that computes a filter is missing. The message says how to install it."""
    if resample in _VECTORS and importlib.util.find_spec("cykooz_resizer") is None:
        raise UserError(
            f"{resample!r} needs the package cykooz-resizer, which is not installed: pip install 'ar_unified[simd]'"
        )


def scaled(image: Image.Image, height: int, width: int, box: Box, resample: Resample, gap: float) -> np.ndarray:
    """The part of an RGB image that lies in `box`, scaled to height x width. uint8 [height, width, 3].

    gap: a large image is first shrunk by whole factors, to at least `gap` times height and width. This takes a fraction
        of the time and looks the same.

    Raises:
        UserError: if the package that computes the filter is missing (`require`).
    """
    if resample not in _VECTORS:
        filter_ = Image.Resampling[resample.upper()]
        return np.asarray(image.resize((width, height), filter_, box, reducing_gap=gap))
    require(resample)
    # imported here, because few users have the package
    from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer

    name, reach = _VECTORS[resample]
    image, (left, top, right, bottom) = _shrunk(image, height, width, box, reach, gap)
    window = CropBox(left, top, right - left, bottom - top)
    algorithm = ResizeAlg.convolution(FilterType[name])
    result = Image.new("RGB", (width, height))
    # A Resizer may not be used by two threads at once, and costs nothing to make.
    Resizer().resize_pil(image, result, ResizeOptions(algorithm, crop_box=window))
    return np.asarray(result)


def _shrunk(image: Image.Image, height: int, width: int, box: Box, reach: float, gap: float) -> tuple[Image.Image, Box]:
    """Averages blocks of pixels before the filter, as Pillow's `reducing_gap` does, in the region that the filter
    needs.
    """
    left, top, right, bottom = box
    across, down = (right - left) / width, (bottom - top) / height
    times = max(int(across / gap), 1), max(int(down / gap), 1)
    if times == (1, 1):
        return image, box
    x, y = max(int(left - reach * across), 0), max(int(top - reach * down), 0)
    end = min(math.ceil(right + reach * across), image.width), min(math.ceil(bottom + reach * down), image.height)
    box = ((left - x) / times[0], (top - y) / times[1], (right - x) / times[0], (bottom - y) / times[1])
    return image.reduce(times, (x, y, *end)), box
