"""Edits of scenes: only what the instruction says changes, and held-out edits never occur in training."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from ar_unified.data import edits, scenes
from ar_unified.data.scenes import Object
from ar_unified.data.sources import open_source
from ar_unified.data.sources.columns import Columns
from ar_unified.evaluation.shapes import edit_matches
from ar_unified.language.document import DocumentError, ImagePart, TextPart
from tests.data.test_shapes import tiny


def some_edits(split: str, count: int = 200) -> list[edits.Edit]:
    rng = np.random.default_rng(7)
    return [edits.sample_edit(rng, split) for _ in range(count)]


def obeyed(before: scenes.Scene, instruction: str) -> scenes.Scene:
    """Computes the scene after an instruction from only its words. Shares no code with what writes instructions."""
    words = instruction.rstrip(".").lower()
    attributes = (scenes.SHAPES, tuple(scenes.COLOURS), scenes.SIZES, scenes.PLACES)
    words = words.replace("big", "large").replace("little", "small")
    if words.startswith("add") or re.match(r"put a ", words):
        new = [next(word for word in names if word in words) for names in attributes]
        return scenes.in_order([*before, Object(*new)])
    colours, shapes = "|".join(scenes.COLOURS), "|".join(scenes.SHAPES)
    subject = re.search(f"the ((?:large |small )?(?:(?:{colours}) )?(?:{shapes}))", words)
    assert subject is not None, words
    named = set(subject[1].split())
    (old,) = [o for o in before if named <= {o.shape, o.colour, o.size}]
    others, said = scenes.without(before, old), words[subject.end() :]
    if re.match("remove|take away", words):
        return scenes.in_order(others)
    fields = dict(vars(old))
    for name, names in zip(("shape", "colour", "size", "place"), attributes, strict=True):
        fields[name] = next((word for word in names if word in said), fields[name])
    vertical, horizontal = old.place.split()
    steps = {
        "up": f"top {horizontal}",
        "down": f"bottom {horizontal}",
        "left": f"{vertical} left",
        "right": f"{vertical} right",
    }
    if towards := re.fullmatch(" (up|down|left|right)", said):
        fields["place"] = steps[towards[1]]
    return scenes.in_order([*others, Object(**fields)])


@pytest.mark.parametrize("split", ["train", "unseen_combinations"])
def test_an_instruction_determines_the_scene_that_comes_of_it(split: str) -> None:
    found = some_edits(split)
    for edit in found:
        assert obeyed(edit.before, edit.instruction) == edit.after, edit
        assert edits.kind_of(edit.before, edit.after) == edit.kind
        assert scenes.split_of(edit.before) == scenes.split_of(edit.after) == split
    assert {edit.kind for edit in found} == set(edits.KINDS_OF_EDITS)
    assert len({edit.instruction.split()[0] for edit in found}) >= 8  # the wording varies


def actions(found: list[edits.Edit]) -> set[str]:
    said = set()
    for edit in found:
        gone, new = set(edit.before) - set(edit.after), set(edit.after) - set(edit.before)
        said.add(edits.action_of(next(iter(gone), None), next(iter(new), None)))
    return said


def test_what_is_held_out_is_neither_shown_nor_told_in_training() -> None:
    train, held_out = some_edits("train", 2000), some_edits("validation", 60)
    assert not actions(train) & actions(held_out) and len(actions(held_out)) > 20
    shown = {scene for edit in train for scene in (edit.before, edit.after)}
    assert not shown & {scene for edit in held_out for scene in (edit.before, edit.after)}


def test_scenes_that_no_edit_is_between_are_refused() -> None:
    red, blue = Object("circle", "red", "large", "top left"), Object("star", "blue", "small", "top left")
    for before, after in (((red,), (red,)), ((red,), (blue,))):
        with pytest.raises(ValueError, match="expected scenes that differ by one edit"):
            edits.kind_of(before, after)


def test_the_checker_sees_sizes_and_whatever_else_was_touched() -> None:
    red = Object("circle", "red", "large", "top left")
    small = Object("circle", "red", "small", "top left")
    star = Object("star", "blue", "small", "bottom right")
    assert edit_matches(scenes.render((small, star)), (small, star))
    assert not edit_matches(scenes.render((red, star)), (small, star))
    assert not edit_matches(scenes.render((small,)), (small, star))


def test_tfds_serves_edits_as_a_question_with_a_picture_for_an_answer(tmp_path, monkeypatch) -> None:
    builder = tiny("edits", tmp_path, held_out=4)
    monkeypatch.setattr("ar_unified.data.sources.named._builder", lambda name, data_dir: builder)
    source: Any = open_source(dict(kind="tfds", name="shapes/tiny_edits", split="validation"))
    assert source.has_images and len(source) == 4
    for i in range(4):
        document = source[i]
        assert document.task == "text_to_image" and [turn.speaker for turn in document.turns] == ["user", "assistant"]
        instruction, before, after = document.parts
        assert isinstance(before, ImagePart) and isinstance(instruction, TextPart)
        scene, edited = (scenes.scene_from_json(document.meta[name]) for name in ("scene", "edited_scene"))
        np.testing.assert_array_equal(before.pixels, scenes.render(scene, 32))
        np.testing.assert_array_equal(after.pixels, scenes.render(edited, 32))
        assert obeyed(scene, instruction.text) == edited
        assert source.texts(i) == [instruction.text]


def test_columns_of_other_peoples_edits() -> None:
    columns = Columns({"image": "source_img", "instruction": "prompt", "edited": "target_img"})
    row, images = columns.row({"source_img": b"a", "prompt": "Make it blue.", "target_img": b"b"})
    assert images == [b"a", b"b"] and row["prompt"] == 2
    assert [part.get("image") or part["text"] for part in row["segments"]] == ["Make it blue.", "0", "1"]
    known = Columns().row({"image": b"a", "edit_prompt": "Make it blue.", "edited_image": b"b"})
    assert known == (row, images)
    with pytest.raises(DocumentError, match="edited: expected an image, found null"):
        columns.row({"source_img": b"a", "prompt": "Make it blue.", "target_img": None})
