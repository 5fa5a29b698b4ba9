"""Chooses the size of images so that a layout can write them, and counts images that are too small for their size."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from ar_unified.data.images import AnyImage, Cells, Resize, sides_of
from ar_unified.language.syntax import ImageLayout

# Images whose sides are enlarged by more than this are reported. They are blurred, but may be meant so: they are used.
ENLARGED = 2.0
# Where the size is not known yet, images with a shorter side are reported: any size in use enlarges them so much.
TINY = 16


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


class Enlarged:
    """Counts images, and those that become much larger than they are. Safe to use from many threads."""

    def __init__(self) -> None:
        self.images = self.count = self._least = 0
        self._worst = 0.0, (0, 0), (0, 0)
        self._lock = threading.Lock()

    def add(self, sides: tuple[int, int], target: tuple[int, int] | None) -> None:
        """Counts an image. sides: its height and width; target: those that it gets, None if they are not known."""
        wanted = target or (TINY * ENLARGED, TINY * ENLARGED)
        times = max(side / own for side, own in zip(wanted, sides, strict=True))
        with self._lock:
            self.images += 1
            if times > ENLARGED:
                self.count += 1
                self._least = max(self._least, min(sides) + 1)
            self._worst = max(self._worst, (times, sides, target or (0, 0)))

    def __str__(self) -> str:
        """A remark for the user; "" if no image is enlarged much."""
        if not self.count:
            return ""
        _, sides, target = self._worst
        found, wanted = (" x ".join(map(str, each)) for each in (sides, target))
        said = (
            f"are enlarged to more than {ENLARGED:g} times their sides (the worst: {found} to {wanted} pixels)"
            if any(target)
            else f"have a side below {TINY} pixels (the smallest: {found}), and training enlarges them to its size"
        )
        return (
            f"{self.count} of {self.images} images {said}. They are used all the same; "
            f"config.data.filters.min_side={self._least} would leave them out of the data"
        )


class Counting(Resize):
    """Resizes like another `Resize`, and counts what it does to the images in `enlarged`."""

    enlarged: Enlarged

    def __init__(self, resize: Resize):
        super().__init__(**{field.name: getattr(resize, field.name) for field in dataclasses.fields(Resize)})
        object.__setattr__(self, "enlarged", Enlarged())  # the dataclass is frozen

    def __call__(self, image: AnyImage, whole: tuple[int, int] | None = None) -> np.ndarray:
        """See `Resize`."""
        sides = whole or sides_of(image)
        self.enlarged.add(sides, self.target(*sides))
        return super().__call__(image, whole)
