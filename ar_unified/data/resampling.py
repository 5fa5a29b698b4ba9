"""The filters that give an image its size: Pillow's, and the same ones computed with vector instructions.

Pillow's own code uses none: of a photograph of 1,536 x 1,152 pixels, Lanczos takes 13 ms of 20. The values that end in
`_simd` are computed by the Rust crate fast_image_resize, in the package cykooz-resizer, in a sixth of the time and less
(docs/data_at_scale.md). It rounds its weights to 16 bits where Pillow has 22 and takes columns first, so pixels
differ: they are values of their own, and the default stays Pillow's.

Its bicubic filter is left out. Version 6.1 reads outside its buffer, up to a crash, where an image is enlarged and the
first result lies on a pixel's centre: the weights of the pixels beside are 0 there and dropped, though the next result
begins with them. The weights of the other two are 0 at their ends alone, so no result begins before the first.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Literal

import numpy as np
from PIL import Image

from ar_unified.errors import UserError

Resample = Literal["lanczos", "bicubic", "bilinear", "lanczos_simd", "bilinear_simd"]
# What the crate calls a filter, and how far it reaches beyond the box, in pixels of the result, as Pillow counts it
_VECTORS = {"lanczos_simd": ("lanczos3", 2.5), "bilinear_simd": ("bilinear", 0.5)}
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def require(resample: str) -> None:
    """Raises UserError, which says how to install it, if the package that computes a filter is missing."""
    if resample in _VECTORS and importlib.util.find_spec("cykooz_resizer") is None:
        raise UserError(
            f"{resample!r} needs the package cykooz-resizer, which is not here: pip install 'ar_unified[simd]'"
        )


def scaled(image: Image.Image, height: int, width: int, box: Box, resample: Resample, gap: float) -> np.ndarray:
    """The part of an RGB image that lies in `box`, scaled to height x width. uint8 [height, width, 3].

    gap: a large image is first shrunk by whole factors to no less than so many times height and width: it costs a
        fraction and looks the same.

    Raises:
        UserError: `require`.
    """
    if resample not in _VECTORS:
        filter_ = Image.Resampling[resample.upper()]
        return np.asarray(image.resize((width, height), filter_, box, reducing_gap=gap))
    require(resample)
    from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer  # few users have it

    name, reach = _VECTORS[resample]
    image, (left, top, right, bottom) = _shrunk(image, height, width, box, reach, gap)
    window = CropBox(left, top, right - left, bottom - top)
    algorithm = ResizeAlg.convolution(FilterType[name])
    result = Image.new("RGB", (width, height))
    # A Resizer may not be used by two threads at once, and costs nothing to make.
    Resizer().resize_pil(image, result, ResizeOptions(algorithm, crop_box=window))
    return np.asarray(result)


def _shrunk(image: Image.Image, height: int, width: int, box: Box, reach: float, gap: float) -> tuple[Image.Image, Box]:
    """What Pillow's `reducing_gap` does before the filter: means over whole factors, of the part that is needed."""
    left, top, right, bottom = box
    across, down = (right - left) / width, (bottom - top) / height
    times = max(int(across / gap), 1), max(int(down / gap), 1)
    if times == (1, 1):
        return image, box
    x, y = max(int(left - reach * across), 0), max(int(top - reach * down), 0)
    end = min(math.ceil(right + reach * across), image.width), min(math.ceil(bottom + reach * down), image.height)
    box = ((left - x) / times[0], (top - y) / times[1], (right - x) / times[0], (bottom - y) / times[1])
    return image.reduce(times, (x, y, *end)), box
