"""The embedded dataset: its texts are true, its splits share nothing, and TFDS serves it."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest

from ar_unified.data import scenes, shapes
from ar_unified.data.sources import open_source
from ar_unified.errors import UserError
from ar_unified.evaluation.shapes import read_scene


def some_scenes(split: str, count: int = 300) -> list[scenes.Scene]:
    rng = np.random.default_rng(7)
    return [scenes.sample_scene(rng, split) for _ in range(count)]


def tiny(kind: str, folder: object, held_out: int = 20) -> shapes.Shapes:
    config = shapes.ShapesConfig(name=f"tiny_{kind}", kind=kind, side=32, train=40, held_out=held_out)
    builder = shapes.Shapes(config=config, data_dir=str(folder))
    builder.download_and_prepare()
    return builder


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_a_caption_determines_the_scene(split: str) -> None:
    rng = np.random.default_rng(0)
    captions = {}
    for scene in some_scenes(split):
        text = scenes.caption(rng, scene)
        assert scenes.read_caption(text) == scene, text
        captions[text] = scene
    assert len({text.split()[0] for text in captions}) >= 4  # the wording varies


@pytest.mark.parametrize("text", ["", "a red circle", "a red blue circle in the top left", "red " * 4])
def test_a_caption_that_is_unclear_is_not_guessed(text: str) -> None:
    assert scenes.read_caption(text) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, train, held_out", [("captions", 40_000, 1_000), ("questions", 60_000, 1_000), ("stories", 10_000, 500)]
)
def test_all_that_the_demo_trains_on_can_be_drawn(kind, train, held_out, tmp_path, monkeypatch) -> None:
    """No pixels are drawn. No scene runs out of questions, and every story can continue."""
    monkeypatch.setattr(shapes, "_image", lambda scene, side: io.BytesIO())
    builder = shapes.Shapes(config=kind, data_dir=str(tmp_path))
    drawn = {split: sum(1 for _ in builder._generate_examples(split)) for split in scenes.SPLITS}
    assert drawn == {split: train if split == "train" else held_out for split in scenes.SPLITS}


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_answers_are_right(split: str) -> None:
    """Answers a question from the scene in another way: by filtering objects with the words of the question."""
    rng = np.random.default_rng(1)
    for scene in some_scenes(split):
        for _ in range(4):
            question, answer = scenes.question(rng, scene, split)
            words = question.rstrip("?").lower()
            asked = words.split(" the ")[-1] if " the " in words else words
            attributes = (scenes.SHAPES, tuple(scenes.COLOURS), scenes.SIZES, scenes.PLACES)
            named = {w for names in attributes for w in names if f" {w}" in f" {asked}"}
            if words.endswith("large or small"):
                named -= set(scenes.SIZES)
            fitting = [o for o in scene if named <= {o.shape, o.colour, o.size, o.place}]
            if words.startswith("how many"):
                assert answer == ("one", "two", "three")[len(scene) - 1]
            elif words.startswith("is there"):
                assert answer == ("yes" if fitting else "no"), (question, scene)
            else:
                assert len(fitting) == 1, (question, scene)
                (o,) = fitting
                if words.startswith(("what colour", "what shape")) or words.startswith(("where", "is the")):
                    assert answer in {o.shape, o.colour, o.size, o.place} - named, (question, answer)
                else:
                    vertical, horizontal = o.place.split()
                    across = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
                    vertical = across[vertical] if "above" in words or "below" in words else vertical
                    horizontal = horizontal if "above" in words or "below" in words else across[horizontal]
                    there = [x for x in scene if x.place == f"{vertical} {horizontal}"]
                    assert answer == (f"{there[0].colour} {there[0].shape}" if there else "nothing")


def test_a_story_text_leads_from_one_scene_to_the_next() -> None:
    rng = np.random.default_rng(2)
    verbs = set()
    for scene in some_scenes("train"):
        change = scenes.sample_change(rng, scene, "train")
        assert change is not None and change.before == scene and scenes.split_of(change.after) == "train"
        gone, new = set(scene) - set(change.after), set(change.after) - set(scene)
        assert (len(gone), len(new)) in {(1, 1), (0, 1), (1, 0)}
        for o in new:  # the text says what is new about the object
            fresh = {o.place, o.colour} - ({gone_o.place for gone_o in gone} | {x.colour for x in gone})
            assert all(word in change.text for word in fresh), (change.text, o)
        verbs.add((len(gone), len(new)))
    assert len(verbs) == 3


def test_nothing_changes_in_a_story_but_what_the_text_names() -> None:
    rng = np.random.default_rng(3)
    scene = next(s for s in some_scenes("train") if len(s) == 3)
    changes = (scenes.sample_change(rng, scene, "train") for _ in range(100))
    change = next(c for c in changes if c and len(c.after) == 2)
    before, after = scenes.render(scene, 64), scenes.render(change.after, 64)
    (gone,) = set(scene) - set(change.after)
    row, column = divmod(scenes.PLACES.index(gone.place), 2)
    differs = (before != after).any(-1)
    assert differs.any()
    differs[row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32] = False
    assert not differs.any()


@pytest.mark.parametrize("side", [32, 64])
def test_an_image_is_its_colours_laid_over_the_ground_as_far_as_shapes_cover_it(side: int) -> None:
    cell = side // 2
    for scene in some_scenes("train", 50):
        wanted = np.full((side, side, 3), scenes.BACKGROUND, np.float32)
        for o in scene:
            row, column = divmod(scenes.PLACES.index(o.place), 2)
            corner = wanted[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            cover = scenes.sprite(o.shape, o.size, cell)[..., None]
            corner += cover * (np.array(scenes.COLOURS[o.colour], np.float32) - corner)
        found = scenes.render(scene, side)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.rint(wanted))
        found[:] = 0  # the caller may change the array


def test_splits_are_apart() -> None:
    seen = {split: set(some_scenes(split, 2000)) for split in scenes.SPLITS}
    assert not seen["train"] & seen["validation"]
    train_kinds = {o.kind for scene in seen["train"] | seen["validation"] for o in scene}
    assert not train_kinds & scenes.UNSEEN and len(train_kinds) == 20
    assert all(any(o.kind in scenes.UNSEEN for o in scene) for scene in seen["unseen_combinations"])
    assert {shape for shape, _ in train_kinds} == set(scenes.SHAPES)
    assert {colour for _, colour in train_kinds} == set(scenes.COLOURS)


def test_no_training_text_names_an_unseen_combination() -> None:
    rng = np.random.default_rng(4)
    for scene in some_scenes("train", 1000):
        question, answer = scenes.question(rng, scene, "train")
        assert not any(f"{c} {s}" in f"{question} {answer}" for s, c in scenes.UNSEEN)


@pytest.mark.parametrize("kind", ["captions", "questions", "stories"])
def test_tfds_builds_the_same_thing_twice(kind: str, tmp_path) -> None:
    def examples(folder: object) -> list[dict]:
        return list(tiny(kind, folder).as_data_source(split="validation"))

    once, again = examples(tmp_path / "a"), examples(tmp_path / "b")
    assert len(once) == 20
    for a, b in zip(once, again, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(np.asarray(a[key]), np.asarray(b[key]))


def test_tfds_serves_images_of_the_scenes(tmp_path) -> None:
    for example in tiny("stories", tmp_path).as_data_source(split="unseen_combinations"):
        assert 2 <= len(example["texts"]) == len(example["images"]) == len(example["scenes"]) <= 4
        for image, scene in zip(example["images"], example["scenes"], strict=True):
            assert image.dtype == np.uint8 and image.shape == (32, 32, 3)
            assert read_scene(image) == scenes.scene_from_json(scene)


def test_the_names_are_known_without_tensorflow() -> None:
    code = (
        "import sys, tensorflow_datasets as tfds, ar_unified.data.shapes;"
        "b = tfds.builder('shapes/stories', data_dir='unused');"
        "assert b.info.file_format.value == 'array_record' and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_drawn_here_is_not_said_to_be_downloaded(tmp_path, monkeypatch, capsys):
    few = {split: 3 for split in scenes.SPLITS}
    monkeypatch.setattr(shapes.Shapes, "counts", lambda self: few)
    for _ in range(2):
        source = open_source(dict(kind="tfds", name="shapes/stories_32", data_dir=str(tmp_path)))
        assert len(source) == 3
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "Unknown" not in out and "Downloading" not in out
    assert "shapes/stories_32/1.1.0: drawing 3 train, 3 validation" in out
    with pytest.raises(UserError, match="shapes/stories_32': Unknown split 'dev'"):
        open_source(dict(kind="tfds", name="shapes/stories_32", split="dev", data_dir=str(tmp_path)))
