"""The embedded dataset `shapes`: procedural scenes through TFDS, built in seconds, without TensorFlow.

    shapes/captions    {image, text, scene}               an image and one caption that determines it
    shapes/questions   {image, question, answer, scene}   a question with one right short answer
    shapes/stories     {texts, images, scenes}            two to four images, each after its text
    shapes/edits       {image, instruction, edited_image, scene, edited_scene}   see edits.py
    shapes/conversations   {messages, images, kinds, scenes}    turns about a picture; see conversations.py

Each also exists as `<name>_32`, with images of 32 x 32 instead of 64 x 64 pixels. The splits are `train`,
`validation` (scenes that are not in train) and `unseen_combinations` (scenes with a (shape, colour) that no training
image or text contains). For edits and conversations, edits.py and conversations.py describe the splits. `scene` is JSON
(`scenes.scene_from_json`). Importing this module makes the names known to `tfds.data_source`; nothing is downloaded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ar_unified.data import conversations, edits, scenes

_TRAIN = {"captions": 40_000, "questions": 60_000, "stories": 10_000, "edits": 40_000, "conversations": 12_000}
_HELD_OUT = {"captions": 1_000, "questions": 1_000, "stories": 500, "edits": 1_000, "conversations": 300}
_QUESTIONS_PER_IMAGE = 6


@dataclass(eq=False, kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
    """`train` is the number of examples in the training split. `held_out` is their number in each other split."""

    kind: str
    side: int = 64
    train: int = 0
    held_out: int = 0


def _configs() -> list[ShapesConfig]:
    return [
        ShapesConfig(
            name=kind if side == 64 else f"{kind}_{side}",
            description=f"{kind}, images of {side} x {side} pixels",
            kind=kind,
            side=side,
            train=_TRAIN[kind],
            held_out=_HELD_OUT[kind],
        )
        for side in (64, 32)
        for kind in _TRAIN
    ]


class Shapes(tfds.core.GeneratorBasedBuilder):
    """One to three coloured shapes on a light ground, with captions, questions, stories, edits and conversations."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.0.0": "First version.", "1.1.0": "Examples in the order in which they were made."}
    BUILDER_CONFIGS = _configs()
    # Nothing is downloaded. Without this line, TFDS 4.9.10 would look for checksums next to this file, with the package
    # importlib_resources, which TFDS does not install.
    url_infos = None

    def __init__(self, *, file_format: Any = "array_record", **kwargs: object) -> None:
        # The default format of TFDS, tfrecord, cannot be read without TensorFlow.
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        image = tfds.features.Image(shape=(config.side, config.side, 3), encoding_format="png")
        text = tfds.features.Text()
        message = {"role": text, "content": text}
        features = {
            "captions": {"image": image, "text": text, "scene": text},
            "questions": {"image": image, "question": text, "answer": text, "scene": text},
            "stories": {
                "texts": tfds.features.Sequence(text),
                "images": tfds.features.Sequence(image),
                "scenes": tfds.features.Sequence(text),
            },
            "edits": {"image": image, "instruction": text, "edited_image": image, "scene": text, "edited_scene": text},
            "conversations": {
                "messages": tfds.features.Sequence(message),
                "images": tfds.features.Sequence(image),
                "kinds": tfds.features.Sequence(text),
                "scenes": tfds.features.Sequence(text),
            },
        }[config.kind]
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # the questions about an image stay together, so that `prepare` encodes it once
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, object]]]]:
        return {split: self._generate_examples(split) for split in scenes.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, object]]]:
        config = self.builder_config
        yield from enumerate(islice(_examples(config.kind, split, config.side), self.counts()[split]))

    def counts(self) -> dict[str, int]:
        """The number of examples in each split."""
        config = self.builder_config
        return {split: config.train if split == "train" else config.held_out for split in scenes.SPLITS}


def captions_held_out(split: str) -> tuple[set[str], set[str]]:
    """All captions of shapes/captions in a split (not "train"), and their scenes (`scenes.scene_to_json`)."""
    examples = list(islice(_examples("captions", split, 64), _HELD_OUT["captions"]))
    return {example["text"] for example in examples}, {example["scene"] for example in examples}


def _examples(kind: str, split: str, side: int) -> Iterator[dict[str, Any]]:
    """Yields examples without end. A split consists of the first of them."""
    make = {
        "captions": _captions,
        "questions": _questions,
        "stories": _stories,
        "edits": _edits,
        "conversations": _conversations,
    }[kind]
    return make(np.random.default_rng([list(_TRAIN).index(kind), scenes.SPLITS.index(split)]), split, side)


def _image(scene: scenes.Scene, side: int) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(scenes.render(scene, side)).save(file, "PNG", compress_level=1)
    file.seek(0)
    return file


def _captions(rng: np.random.Generator, split: str, side: int) -> Iterator[dict[str, object]]:
    while True:
        scene = scenes.sample_scene(rng, split)
        yield {
            "image": _image(scene, side),
            "text": scenes.caption(rng, scene),
            "scene": scenes.scene_to_json(scene),
        }


def _questions(rng: np.random.Generator, split: str, side: int) -> Iterator[dict[str, object]]:
    while True:
        scene = scenes.sample_scene(rng, split)
        image = _image(scene, side)
        asked: set[str] = set()
        while len(asked) < _QUESTIONS_PER_IMAGE:
            question, answer = scenes.question(rng, scene, split)
            if question not in asked:
                asked.add(question)
                image.seek(0)
                yield {
                    "image": image,
                    "question": question,
                    "answer": answer,
                    "scene": scenes.scene_to_json(scene),
                }


def _stories(rng: np.random.Generator, split: str, side: int) -> Iterator[dict[str, object]]:
    while True:
        length = int(rng.integers(2, 5))
        shown = [scenes.sample_scene(rng, split)]
        texts = [scenes.caption(rng, shown[0])]
        while len(shown) < length and (change := scenes.sample_change(rng, shown[-1], split)):
            shown.append(change.after)
            texts.append(change.text)
        if len(shown) < length:
            continue
        yield {
            "texts": texts,
            "images": [_image(scene, side) for scene in shown],
            "scenes": [scenes.scene_to_json(scene) for scene in shown],
        }


def _edits(rng: np.random.Generator, split: str, side: int) -> Iterator[dict[str, object]]:
    while True:
        edit = edits.sample_edit(rng, split)
        yield {
            "image": _image(edit.before, side),
            "instruction": edit.instruction,
            "edited_image": _image(edit.after, side),
            "scene": scenes.scene_to_json(edit.before),
            "edited_scene": scenes.scene_to_json(edit.after),
        }


def _conversations(rng: np.random.Generator, split: str, side: int) -> Iterator[dict[str, object]]:
    while True:
        talk = conversations.sample_conversation(rng, split)
        messages, images = [], []
        for i, exchange in enumerate(talk.exchanges):
            asked = exchange.asked
            if i == 0 and talk.shown is not None:
                images.append(_image(talk.shown, side))
                asked = f"<image>{asked}"
            if exchange.answer is None:
                images.append(_image(exchange.scene, side))
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": exchange.answer or "<image>"})
        yield {
            "messages": messages,
            "images": images,
            "kinds": [exchange.kind for exchange in talk.exchanges],
            "scenes": [scenes.scene_to_json(exchange.scene) for exchange in talk.exchanges],
        }
