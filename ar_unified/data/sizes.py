"""Chooses the size of images so that a layout can write them."""

from __future__ import annotations

from ar_unified.data.images import Cells, Resize
from ar_unified.language.syntax import ImageLayout


def default_resize(layout: ImageLayout, tokenizer: Cells) -> Resize:
    """The resize that fits a layout. If the layout has one size, images are cropped to it. If it allows many sizes,
    images keep their aspect ratio. They get about as many pixels as an image whose sides are half of the layout's
    largest sides (`Resize.largest`).
    """
    factor = tokenizer.factor * layout.units[0]
    height, width = (side * factor for side in layout.most)
    if not layout.sized:
        return Resize("crop", height, width, factor)
    half_height, half_width = (max(1, side // 2) * factor for side in layout.most)
    return Resize("aspect", half_height, half_width, factor, height, width)
