"""Rewards that come with the package, by their names in `reward.function`.

exact_answer  1 if the answer's text is right; white space at its ends does not matter
shapes        1 if the image shows the scene in the prompt's `meta` (evaluation/shapes.py)
shapes_objects  intersection over union of the objects in that scene and the objects in the image; 1 if `shapes` is 1
shapes_closeness  the mean value of all places where that scene or the image has an object. The right object gives half
              of a place's value; the closeness of its pixels gives the other half. Unlike `shapes`, it also tells apart
              images that are partly right, so it suits scenes that are rarely drawn right
easy_vqa      1 if the image shows the figure that the prompt names (evaluation/easy_vqa.py)
brevity       -1 for each character of the answer's text: shorter is better
length        the number of characters of the answer's text
"""

from __future__ import annotations

from collections.abc import Callable

from ar_unified.data.scenes import Scene, scene_from_json
from ar_unified.evaluation.right_answers import PROTOCOLS, same_text, text_of
from ar_unified.evaluation.shapes import closeness, read_scene
from ar_unified.language.document import Document, ImagePart


def exact_answer(prompt: Document, answer: Document) -> float:
    """1 if the answer's text is the right one, else 0. The right text is the prompt's own answer or, for a request,
    its column "expected". Raises ValueError if a prompt has neither.
    """
    expected = (text_of(prompt, answer=True) if prompt.asks else "") or str(prompt.meta.get("expected", ""))
    if not expected:
        raise ValueError('the prompt has no right answer as text: add an answer to it, or a column "expected"')
    return float(same_text(expected, text_of(answer)))


def _pixels(protocol: str) -> Callable[[Document, Document], float]:
    matches = PROTOCOLS[protocol].image_matches
    assert matches is not None

    def reward(prompt: Document, answer: Document) -> float:
        """The reward is 0 if an answer has no image or several."""
        images = [part for part in answer.parts if isinstance(part, ImagePart)]
        return float(len(images) == 1 and matches(prompt, images[0].pixels))

    return reward


def shapes_objects(prompt: Document, answer: Document) -> float:
    """Intersection over union of the wanted and the drawn objects. Two objects are equal if they have the same shape,
    colour and place.
    """
    if (scenes := _wanted_and_found(prompt, answer)) is None:
        return 0.0
    wanted, found = ({(each.shape, each.colour, each.place) for each in objects} for objects in scenes)
    return len(wanted & found) / max(len(wanted | found), 1)


def shapes_closeness(prompt: Document, answer: Document) -> float:
    """The mean value of all places where at least one scene has an object. The right object gives half of a place's
    value. The fourth power of the closeness of its pixels gives the other half.

    The fourth power separates right objects from nearly right ones: a square in place of a circle has a closeness of
    0.91.
    """
    if (scenes := _wanted_and_found(prompt, answer)) is None:
        return 0.0
    wanted, found = ({each.place: (each.shape, each.colour) for each in objects} for objects in scenes)
    (image,) = (part for part in answer.parts if isinstance(part, ImagePart))
    near = closeness(image.pixels, scenes[0])
    each = [((found.get(place) == kind) + near[place] ** 4) / 2 for place, kind in wanted.items()]
    return sum(each) / max(len(wanted.keys() | found.keys()), 1)


def _wanted_and_found(prompt: Document, answer: Document) -> tuple[Scene, Scene] | None:
    """The scene of the prompt and the scene of the answer's image; None unless there is exactly one image."""
    images = [part.pixels for part in answer.parts if isinstance(part, ImagePart)]
    if len(images) != 1:
        return None
    return scene_from_json(prompt.meta["scene"]), read_scene(images[0])


def length(prompt: Document, answer: Document) -> float:
    """The number of characters in the answer's texts."""
    return float(len(text_of(answer)))


def brevity(prompt: Document, answer: Document) -> float:
    """Fewer characters are better."""
    return -length(prompt, answer)


REWARDS: dict[str, Callable[[Document, Document], float]] = {
    "exact_answer": exact_answer,
    "shapes": _pixels("shapes"),
    "shapes_objects": shapes_objects,
    "shapes_closeness": shapes_closeness,
    "easy_vqa": _pixels("easy_vqa"),
    "length": length,
    "brevity": brevity,
}
