"""Conversations about scenes. An independent reader agrees with them, and training data contain nothing held out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from ar_unified.data import conversations, edits, scenes
from ar_unified.data.conversations import Conversation, sample_conversation
from ar_unified.data.scenes import Object, Scene
from ar_unified.data.sources import open_source
from ar_unified.evaluation.shapes import edit_matches
from ar_unified.language.document import ImagePart
from tests.data.test_edits import obeyed
from tests.data.test_shapes import tiny

ATTRIBUTES = ("colour", "shape", "size", "place")
WORDS = {"colour": scenes.COLOURS, "shape": scenes.SHAPES, "size": scenes.SIZES, "place": scenes.PLACES}


def some(split: str, count: int) -> list[Conversation]:
    rng = np.random.default_rng(7)
    return [sample_conversation(rng, split) for _ in range(count)]


def unique(scene: Scene, words: str) -> Object:
    """The one object that a text means."""
    named = {w for names in WORDS.values() for w in names if re.search(rf"\b{w}\b", words)}
    (found,) = [o for o in scene if named <= set(vars(o).values())]
    return found


def attribute_of(words: str) -> str:
    said = {"colour": "what colour", "shape": "what shape", "size": "large or small", "place": "where"}
    return next((name for name, start in said.items() if start in words), "")


def answers(talk: Conversation) -> list[str | Scene | None]:
    """The answers of a reader who remembers the picture, what "it" means, the last question, and what "it" was
    before."""
    scene, it, asked, was = talk.shown, None, "", None
    found: list[str | Scene | None] = []
    for exchange in talk.exchanges:
        words = exchange.asked.lower()
        if words.startswith(("draw this", "please draw")):
            scene = scenes.read_caption(exchange.asked)
        elif "in the picture" in words or "describe" in words:
            it = None
            found.append(scene)
            continue
        elif words.startswith("how many"):
            it = None
            found.append(("zero", "one", "two", "three")[len(scene)])
            continue
        elif words.endswith("?"):
            if words.startswith("and the"):
                it = unique(scene, words)
            else:
                asked = attribute_of(words)
                if " it" not in words:
                    it = unique(scene, words.replace("large or small", ""))
            found.append(getattr(was if "before" in words else it, asked))
            continue
        else:
            before = scene
            words = words.removeprefix("now ").replace("draw it without", "remove")
            if re.search(r"\bit\b", words.split(":")[0]) and it is not None:
                # Replace "it" by a name that nothing else has.
                words = re.sub(r"\bit\b", f"the {it.size} {it.colour} {it.shape}", words, count=1)
            scene = obeyed(scene, words)
            new = set(scene) - set(before)
            gone = set(before) - set(scene)
            it, was = (next(iter(new), None), next(iter(gone), None))
        found.append(scene)
    return found


@pytest.mark.parametrize("split", ["train", "unseen_combinations"])
def test_every_answer_follows_from_what_was_said_before(split: str) -> None:
    talks = some(split, 300)
    for talk in talks:
        for exchange, right in zip(talk.exchanges, answers(talk), strict=True):
            if exchange.kind == "describe":
                assert scenes.read_caption(exchange.answer) == right == exchange.scene, talk
            else:
                assert (exchange.scene if exchange.answer is None else exchange.answer) == right, talk
            assert scenes.split_of(exchange.scene) == split
        assert (talk.shown is None) == (talk.exchanges[0].kind == "draw")
        assert len({e.asked for e in talk.exchanges}) > 1
    assert {e.kind for talk in talks for e in talk.exchanges} == set(
        "draw describe question follow_up edit edit_it before".split()
    )
    assert {len(talk.exchanges) for talk in talks} == {2, 3, 4}


def shown_and_done(talks: list[Conversation]) -> tuple[set[Scene], set[str]]:
    shown, done = set(), set()
    for talk in talks:
        before = talk.shown or ()
        for exchange in talk.exchanges:
            shown.add(exchange.scene)
            if exchange.kind.startswith("edit"):
                gone, new = set(before) - set(exchange.scene), set(exchange.scene) - set(before)
                done.add(edits.action_of(next(iter(gone), None), next(iter(new), None)))
            before = exchange.scene
    return shown, done


def test_what_is_held_out_is_neither_shown_nor_done_in_training() -> None:
    (train, told), (held_out, asked) = (shown_and_done(some(s, n)) for s, n in (("train", 1500), ("validation", 30)))
    assert not train & held_out and not told & asked and len(asked) > 5


def test_a_conversation_is_drawn_from_its_generator_alone() -> None:
    assert some("train", 20) == some("train", 20)
    plans = {conversations._plan(np.random.default_rng(i), 1) for i in range(300)}
    assert max(sum("edit" in way for way in plan) for plan in plans) == 1


def test_tfds_serves_them_as_turns(tmp_path, monkeypatch) -> None:
    builder = tiny("conversations", tmp_path, held_out=2)
    monkeypatch.setattr("ar_unified.data.sources.named._builder", lambda name, data_dir: builder)
    source: Any = open_source(dict(kind="tfds", name="shapes/tiny_conversations", split="train"))
    assert source.has_images and len(source) == 40
    rng = np.random.default_rng([4, 0])
    for i in range(8):
        talk, document = sample_conversation(rng, "train"), source[i]
        document.check()
        assert [turn.speaker for turn in document.turns] == ["user", "assistant"] * len(talk.exchanges)
        assert [turn.learned for turn in document.turns] == [False, True] * len(talk.exchanges)
        assert document.meta["kinds"] == [exchange.kind for exchange in talk.exchanges]
        for turn, exchange in zip(document.turns[1::2], talk.exchanges, strict=True):
            (part,) = turn.parts
            if exchange.answer is None:
                assert isinstance(part, ImagePart) and edit_matches(part.pixels, exchange.scene)
            else:
                assert part.text == exchange.answer
        first = document.turns[0].parts
        assert isinstance(first[0], ImagePart) == (talk.shown is not None) and first[-1].text == talk.exchanges[0].asked
        assert source.texts(i)[0] == talk.exchanges[0].asked
