"""Reads the objects of a shapes image from its pixels, and checks whether they are the right ones.

Each corner is read separately: which pixels differ from the background, which colour of the palette they have, and
which shape, with its size and place, covers them best. If a corner looks like no shape or no colour of the dataset, the
result is "unclear", which matches nothing, so that a smudge does not count as a circle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from ar_unified.data.scenes import COLOURS, PLACES, SHAPES, SIZES, Object, Scene, render, sprite

UNCLEAR = "unclear"

_EMPTY = 0.02  # a corner with a smaller share of marked pixels is empty; the smallest shape covers a share of 0.06
_MIN_OVERLAP = 0.94  # minimum Dice overlap with the best shape; after an autoencoder at 27 dB, the overlap is 0.96
_MAX_COLOUR_DISTANCE = 62.0  # in RGB; the two closest colours of the palette have a distance of 124


@lru_cache(maxsize=8)
def _templates(cell: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Masks, f32 [N, cell^2], and the (shape, size) of each mask. They show every shape and size, sharp and soft
    (blurred), at its place and moved by up to two pixels."""
    reach = 2
    steps = range(-reach, reach + 1)
    names = [(shape, size) for shape in SHAPES for size in SIZES]
    masks = []
    for shape, size in names:
        sharp = sprite(shape, size, cell)
        soft = sharp  # the loop blurs it like an autoencoder: a blurred square is closer to a circle than to a square
        for axis in (0, 1):
            soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
        masks += [np.roll(m, (dy, dx), (0, 1)).ravel() for m in (sharp, soft) for dy in steps for dx in steps]
    return np.stack(masks), [name for name in names for _ in range(len(masks) // len(names))]


def read_scene(pixels: np.ndarray) -> tuple[Object, ...]:
    """The objects that an image shows, in the order of their places. `pixels`: uint8 [side, side, 3]."""
    side = len(pixels)
    if pixels.dtype != np.uint8 or pixels.shape != (side, side, 3):
        raise ValueError(f"expected a square image, uint8 [H, H, 3], found {pixels.dtype} {pixels.shape}")
    image = pixels.astype(np.float32)
    background = np.median(image.reshape(-1, 3), 0)
    cell = side // 2
    found = []
    for i, place in enumerate(PLACES):
        row, column = divmod(i, 2)
        corner = image[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        seen = _read_corner(corner - background, background)
        if seen:
            found.append(Object(*seen, place))
    return tuple(found)


def _read_corner(difference: np.ndarray, background: np.ndarray) -> tuple[str, str, str] | None:
    """(shape, colour, size) of the object in a corner; None if it is empty. `difference`: f32 [H, H, 3]."""
    cell = len(difference)
    flat = difference.reshape(-1, 3)
    distance = np.linalg.norm(flat, axis=1)
    marked = distance > 75  # well above noise, but half-covered pixels of the palest colour still count
    if marked.mean() < _EMPTY:
        return None

    # The colour: the median of the most different pixels, which are inside the shape, not on its soft edge.
    core = np.median(flat[distance >= np.quantile(distance[marked], 0.7)], 0)
    palette = np.array(list(COLOURS.values()), np.float32) - background
    off = np.linalg.norm(palette - core, axis=1)
    colour = list(COLOURS)[int(off.argmin())] if off.min() <= _MAX_COLOUR_DISTANCE else UNCLEAR

    # The shape: compares each pixel's coverage by that colour with every template (Dice overlap).
    cover = np.clip(flat @ core / (core @ core), 0, 1)
    cover = np.where(distance > 45, cover, 0)  # noise of the background does not count as coverage
    masks, names = _templates(cell)
    overlap = 2 * (masks @ cover) / ((masks**2).sum(1) + cover @ cover)
    shape, size = names[int(overlap.argmax())]
    return (shape if overlap.max() >= _MIN_OVERLAP else UNCLEAR), colour, size


def scene_matches(
    found: Iterable[Object],
    wanted: Iterable[Object],
    attributes: Sequence[str] = ("shape", "colour", "place"),
) -> bool:
    """Whether both scenes have exactly the same objects, if only `attributes` are compared."""

    def key(objects: Iterable[Object]) -> list[tuple[str, ...]]:
        return sorted(tuple(getattr(o, a) for a in attributes) for o in objects)

    return key(found) == key(wanted)


def closeness(pixels: np.ndarray, scene: Scene) -> dict[str, float]:
    """How similar an image is to the picture of a scene, in [0, 1], at the place of each object.

    If a and b are the differences of the two images from their backgrounds, the result is Bray and Curtis' similarity,
    1 - sum |a - b| / (sum |a| + sum |b|). `pixels` is uint8 [side, side, 3].
    """
    cell = len(pixels) // 2
    both = [image.astype(np.float32) for image in (pixels, render(scene, len(pixels)))]
    both = [image - np.median(image.reshape(-1, 3), 0).astype(np.float32) for image in both]
    found = {}
    for each in scene:
        row, column = divmod(PLACES.index(each.place), 2)
        a, b = (image[row * cell :, column * cell :][:cell, :cell] for image in both)
        found[each.place] = float(1 - np.abs(a - b).sum() / (np.abs(a).sum() + np.abs(b).sum()))
    return found


def edit_matches(pixels: np.ndarray, scene: Scene) -> bool:
    """Whether an edited image shows the right scene, including sizes. This also checks that nothing else was
    changed."""
    return scene_matches(read_scene(pixels), scene, ("shape", "colour", "size", "place"))


def story_change_matches(
    before_pixels: np.ndarray,
    after_pixels: np.ndarray,
    scene_after: Scene,
    attributes: Sequence[str] = ("shape", "colour", "place"),
) -> bool:
    """Whether the second image shows the scene after the change in the text, and the first image shows a different
    scene."""
    after = read_scene(after_pixels)
    return scene_matches(after, scene_after, attributes) and not scene_matches(
        read_scene(before_pixels), after, attributes
    )
