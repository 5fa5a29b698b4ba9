"""The size that pictures get so that a layout can write them."""

from __future__ import annotations

from ar_unified.data.images import Cells, Resize
from ar_unified.grammar import ImageLayout


def default_resize(layout: ImageLayout, tokenizer: Cells) -> Resize:
    """The resize a layout implies: a grid crops; rows keep the aspect, at half the area of the largest picture."""
    factor, across = tokenizer.factor, layout.width // tokenizer.codes_per_position
    height, width = layout.height * factor, across * factor
    if not layout.sized:
        return Resize("crop", height, width, factor)
    target_h, target_w = (max(1, round(side / 2**0.5)) * factor for side in (layout.height, across))
    return Resize("aspect", target_h, target_w, factor, height, width)
