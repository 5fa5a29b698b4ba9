"""The size that pictures get so that a layout can write them."""

from __future__ import annotations

from ar_unified.data.images import Cells, Resize
from ar_unified.grammar import ImageLayout


def default_resize(layout: ImageLayout, tokenizer: Cells) -> Resize:
    """The resize a layout implies, as an experiment's config makes both: a grid crops; rows keep the aspect, at the
    area of a picture of half the layout's sides (`Resize.largest`)."""
    factor, across = tokenizer.factor, layout.width // tokenizer.codes_per_position
    height, width = layout.height * factor, across * factor
    if not layout.sized:
        return Resize("crop", height, width, factor)
    half_height, half_width = (max(1, side // 2) * factor for side in (layout.height, across))
    return Resize("aspect", half_height, half_width, factor, height, width)
