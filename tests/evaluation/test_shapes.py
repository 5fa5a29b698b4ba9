"""The pixel checker reads what was drawn in spite of noise and blur, and does not read a smudge as a shape."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ar_unified.data import scenes
from ar_unified.data.scenes import Object
from ar_unified.evaluation.shapes import read_scene, scene_matches, story_change_matches

ALL = ("shape", "colour", "size", "place")


def images(count: int, side: int) -> list[tuple[scenes.Scene, np.ndarray]]:
    rng = np.random.default_rng(11)
    drawn = [scenes.sample_scene(rng, scenes.SPLITS[i % 3]) for i in range(count)]
    return [(scene, scenes.render(scene, side)) for scene in drawn]


@pytest.mark.parametrize(("count", "side"), [(2000, 64), (300, 32), (100, 128)])
def test_clean_images_are_read_without_an_error(count: int, side: int) -> None:
    for scene, image in images(count, side):
        assert read_scene(image) == scene


def test_noise_and_blur_are_read_through() -> None:
    rng = np.random.default_rng(0)

    def spoil(image: np.ndarray) -> np.ndarray:
        blurred = Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)
        soft = np.asarray(blurred.resize((64, 64), Image.Resampling.BILINEAR), np.float32)
        return np.clip(soft + rng.normal(0, 12, soft.shape), 0, 255).astype(np.uint8)

    right = [scene_matches(read_scene(spoil(p)), scene, ALL) for scene, p in images(1000, 64)]
    assert np.mean(right) >= 0.99


def test_a_smudge_is_no_shape_and_a_strange_colour_no_colour() -> None:
    image = scenes.render((), 64)
    y, x = np.mgrid[:32, :32]
    haze = np.exp(-((y - 16) ** 2 + (x - 16) ** 2) / 300.0)[..., None]
    image[:32, :32] = image[:32, :32] * (1 - haze)
    cover = scenes.sprite("square", "large", 32)[..., None]
    image[32:, 32:] = image[32:, 32:] * (1 - cover) + cover * (0, 255, 255)
    first, second = read_scene(image)
    assert first.shape == "unclear" and first.place == "top left"
    assert second.shape == "square" and second.colour == "unclear"


def test_matching_counts_every_object_once() -> None:
    red = Object("circle", "red", "large", "top left")
    blue = Object("star", "blue", "small", "top right")
    assert scene_matches([blue, red], [red, blue])
    assert not scene_matches([red], [red, blue])
    assert not scene_matches([red, blue], [red])
    assert scene_matches([red], [Object("circle", "red", "small", "top left")])
    assert not scene_matches([red], [Object("circle", "red", "small", "top left")], ALL)


def test_a_story_must_show_its_change() -> None:
    rng = np.random.default_rng(5)
    for scene, before in images(30, 64):
        if change := scenes.sample_change(rng, scene, scenes.split_of(scene)):
            after = scenes.render(change.after, 64)
            assert story_change_matches(before, after, change.after)
            assert not story_change_matches(before, before, change.after)


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        read_scene(np.zeros((64, 64, 3), np.float32))
