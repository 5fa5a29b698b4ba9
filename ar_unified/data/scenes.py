"""Procedural scenes: what the embedded dataset `shapes` shows, how it is drawn, and the English texts about it.

A scene is one to three objects. Each has a shape, a colour and a size, and its own corner of the image. No two objects
have the same colour and shape. So a corner identifies an object, and so does "the red circle". Everything here is a
function of its arguments and of the given numpy generator.

The content of a scene decides its split (`split_of`), so no split can leak into another.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {  # RGB, far apart from one another and from the background
    "red": (224, 49, 58),
    "yellow": (250, 190, 20),
    "green": (38, 166, 91),
    "blue": (38, 110, 226),
    "purple": (156, 60, 196),
    "black": (44, 47, 58),
}
SIZES = ("large", "small")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUND = (250, 248, 243)
UNSEEN = frozenset({("circle", "purple"), ("square", "yellow"), ("triangle", "blue"), ("star", "green")})
SPLITS = ("train", "validation", "unseen_combinations")

_RADIUS = {"large": 0.195, "small": 0.132}  # share of the image's side
KINDS = [(shape, colour) for shape in SHAPES for colour in COLOURS]


@dataclass(frozen=True)
class Object:
    """One figure of a scene: what it is, and where it is on the grid."""

    shape: str
    colour: str
    size: str
    place: str

    @property
    def kind(self) -> tuple[str, str]:
        """(shape, colour); some of these pairs are held out."""
        return self.shape, self.colour


Scene = tuple[Object, ...]  # in the order of PLACES


def scene_to_json(scene: Scene) -> str:
    """A scene as one line of JSON, as TFDS stores it together with the image."""
    return json.dumps([vars(o) for o in scene])


def scene_from_json(text: str | bytes) -> Scene:
    """The scene that `scene_to_json` wrote."""
    return tuple(Object(**o) for o in json.loads(text))


# ------------------------------------------------------------------------------------------------------------
# Scenes
# ------------------------------------------------------------------------------------------------------------


def split_of(scene: Scene) -> str:
    """The split of a scene: "unseen_combinations" if it has a held-out (shape, colour). A hash puts a tenth of all
    other scenes into "validation".
    """
    if any(o.kind in UNSEEN for o in scene):
        return "unseen_combinations"
    words = " ".join(f"{o.shape} {o.colour} {o.size} {o.place}" for o in scene)
    return "validation" if zlib.crc32(words.encode()) % 10 == 0 else "train"


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """A random scene of `split`. Scenes of one, two and three objects are about equally frequent."""
    while True:
        count = int(rng.choice((1, 2, 3), p=(0.3, 0.35, 0.35)))
        places = sorted(rng.permutation(len(PLACES))[:count])
        kinds = rng.permutation(len(KINDS))[:count]
        sizes = rng.integers(len(SIZES), size=count)
        drawn = [(*KINDS[k], SIZES[s], PLACES[p]) for k, s, p in zip(kinds, sizes, places, strict=True)]
        scene = tuple(Object(shape, colour, size, place) for shape, colour, size, place in drawn)
        if split_of(scene) == split:
            return scene


@dataclass(frozen=True)
class Change:
    """One step of a story: `before` becomes `after`, and `text` says how."""

    before: Scene
    after: Scene
    text: str


def sample_change(rng: np.random.Generator, scene: Scene, split: str) -> Change | None:
    """A random change that turns `scene` into a scene of `split`: an object moves, changes colour, appears or
    disappears.

    Returns None if no change does that, which happens rarely in the small splits.
    """
    ways = (_moves, _recolourings, _appearances, _disappearances)
    for way in rng.permutation(len(ways)):
        options = ways[way](scene)
        for i in rng.permutation(len(options)):
            after, subject, target = options[i]
            if split_of(after) == split:
                return Change(scene, after, _change_text(rng, scene, subject, target))
    return None


def in_order(objects: Sequence[Object]) -> Scene:
    """The scene with these objects, in the order of PLACES."""
    return tuple(sorted(objects, key=lambda o: PLACES.index(o.place)))


def without(scene: Scene, gone: Object) -> list[Object]:
    """The objects of the scene without `gone`."""
    return [o for o in scene if o != gone]


def free_places(scene: Scene) -> list[str]:
    """The places without an object."""
    return [p for p in PLACES if all(o.place != p for o in scene)]


# Each function returns tuples: the scene after the change, the object that the text is about, and what it becomes.


def _moves(scene: Scene) -> list[tuple[Scene, Object, Object | None]]:
    moved = [(o, replace(o, place=p)) for o in scene for p in free_places(scene)]
    return [(in_order([*without(scene, o), n]), o, n) for o, n in moved]


def _recolourings(scene: Scene) -> list[tuple[Scene, Object, Object | None]]:
    taken = {o.kind for o in scene}
    painted = [(o, replace(o, colour=c)) for o in scene for c in COLOURS if (o.shape, c) not in taken]
    return [(in_order([*without(scene, o), n]), o, n) for o, n in painted]


def _appearances(scene: Scene) -> list[tuple[Scene, Object, Object | None]]:
    if len(scene) == 3:
        return []
    taken = {o.kind for o in scene}
    new = [
        Object(*kind, size, place)
        for kind in KINDS
        if kind not in taken
        for size in SIZES
        for place in free_places(scene)
    ]
    return [(in_order([*scene, n]), n, None) for n in new]


def _disappearances(scene: Scene) -> list[tuple[Scene, Object, Object | None]]:
    return [(in_order(without(scene, o)), o, None) for o in scene] if len(scene) > 1 else []


# ------------------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def sprite(shape: str, size: str, cell: int) -> np.ndarray:
    """The share of each pixel that a shape in the middle of its corner covers: f32 [cell, cell]."""
    scale = 8  # drawn large and averaged down, for anti-aliasing
    middle, radius = cell * scale / 2 - 0.5, _RADIUS[size] * 2 * cell * scale
    canvas = Image.new("L", (cell * scale, cell * scale))
    draw = ImageDraw.Draw(canvas)
    if shape == "circle":
        draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=255)
    elif shape == "square":
        half = 0.94 * radius
        draw.rectangle((middle - half, middle - half, middle + half, middle + half), fill=255)
    else:
        # A triangle and a star are polygons with vertices around a centre. Both are set a little low, where they look
        # centred.
        corners, stretch, drop = {
            "triangle": ((1.0, 1.0, 1.0), 1.2, 0.22),
            "star": ((1.0, 0.42) * 5, 1.2, 0.06),
        }[shape]
        angle = 2 * np.pi * np.arange(len(corners)) / len(corners)
        ring = np.array(corners) * stretch * radius
        x, y = middle + ring * np.sin(angle), middle + drop * radius - ring * np.cos(angle)
        draw.polygon(list(zip(x.tolist(), y.tolist(), strict=True)), fill=255)
    return np.asarray(canvas.reduce(scale), np.float32) / 255


@lru_cache(maxsize=8)
def _ground(side: int) -> np.ndarray:
    return np.full((side, side, 3), BACKGROUND, np.uint8)


@lru_cache(maxsize=256)
def _corner(shape: str, colour: str, size: str, cell: int) -> np.ndarray:
    """A corner with an object: uint8 [cell, cell, 3]."""
    ground = np.array(BACKGROUND, np.float32)
    cover = sprite(shape, size, cell)[..., None]
    return np.rint(ground + cover * (np.array(COLOURS[colour], np.float32) - ground)).astype(np.uint8)


def render(scene: Scene, side: int = 64) -> np.ndarray:
    """Draws a scene: uint8 [side, side, 3]. Every object is in the middle of its corner."""
    if side % 2 or side < 32:
        raise ValueError(f"a shapes image needs an even side of at least 32 pixels, found {side}")
    cell = side // 2
    image = _ground(side).copy()
    for o in scene:
        row, column = divmod(PLACES.index(o.place), 2)
        corner = _corner(o.shape, o.colour, o.size, cell)
        image[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = corner
    return image


# ------------------------------------------------------------------------------------------------------------
# Language
# ------------------------------------------------------------------------------------------------------------

_SIZE_WORDS = {"large": ("large", "large", "big"), "small": ("small", "small", "little")}
_REFERENCES = (
    ("colour", "shape"),
    ("colour", "shape"),
    ("colour", "shape"),
    ("size", "shape"),
    ("shape",),
)
_NUMBERS = ("zero", "one", "two", "three")
_ATTRIBUTE = re.compile(
    "|".join((*SHAPES, *COLOURS, *(w for words in _SIZE_WORDS.values() for w in set(words)), *PLACES))
)


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """A random choice; all are equally likely."""
    return options[int(rng.integers(len(options)))]


def number(count: int) -> str:
    """A number from zero to three as a word."""
    return _NUMBERS[count]


def noun(rng: np.random.Generator, o: Object) -> str:
    """Size, colour and shape in words: "big red circle"."""
    return f"{pick(rng, _SIZE_WORDS[o.size])} {o.colour} {o.shape}"


def _join(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _sentence(text: str, end: str = ".") -> str:
    return text[0].upper() + text[1:] + end


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """A caption with every object's shape, colour, size and place, in one of several wordings and in any order."""
    objects = [scene[i] for i in rng.permutation(len(scene))]
    # The place comes before the object: a causal model then knows to which object each attribute belongs. With some
    # captions the other way round, a small model mixed up the objects in half of its images of three objects.
    nouns = [noun(rng, o) for o in objects]
    way = int(rng.integers(4))
    if way == 0:
        pairs = zip(objects, nouns, strict=True)
        return " ".join(_sentence(f"{o.place}: a {noun}") for o, noun in pairs)
    before, verb = (("in the", " there is"), ("the", " shows"), ("at the", " you see"))[way - 1]
    verbs = [verb, *[""] * (len(objects) - 1)]
    triples = zip(objects, verbs, nouns, strict=True)
    return _sentence(_join([f"{before} {o.place}{v} a {noun}" for o, v, noun in triples]))


def read_caption(text: str) -> Scene | None:
    """The scene that a caption describes, whatever its wording; None if it does not describe exactly one scene."""
    canonical = {w: size for size, words in _SIZE_WORDS.items() for w in words}
    found = [canonical.get(w, w) for w in _ATTRIBUTE.findall(text.lower())]
    objects = []
    for i in range(0, len(found), 4):
        words = set(found[i : i + 4])
        values = [words & set(names) for names in (SHAPES, COLOURS, SIZES, PLACES)]
        if any(len(v) != 1 for v in values):
            return None
        objects.append(Object(*(v.pop() for v in values)))
    return in_order(objects) if objects and len({o.place for o in objects}) == len(objects) else None


def reference(rng: np.random.Generator, o: Object, scene: Scene, avoid: Sequence[str] = ()) -> str | None:
    """A noun phrase that fits only `o` in the scene ("red circle", "large star", "star").

    `avoid` names attributes that the phrase may not use; the result is None if no phrase fits.
    """
    fitting = [
        way
        for way in _REFERENCES
        if not set(way) & set(avoid) and sum(all(getattr(x, a) == getattr(o, a) for a in way) for x in scene) == 1
    ]
    return " ".join(getattr(o, a) for a in fitting[rng.integers(len(fitting))]) if fitting else None


def _change_text(rng: np.random.Generator, before: Scene, subject: Object, target: Object | None) -> str:
    if subject not in before:
        what = noun(rng, subject)
        return pick(
            rng,
            (
                f"A {what} appears in the {subject.place}.",
                f"Now there is also a {what} in the {subject.place}.",
            ),
        )
    name = reference(rng, subject, before)
    if target is None:
        return pick(rng, (f"The {name} disappears.", f"The {name} is gone."))
    if target.place != subject.place:
        there = target.place
        return pick(rng, (f"The {name} moves to the {there}.", f"Now the {name} is in the {there}."))
    return pick(rng, (f"The {name} turns {target.colour}.", f"The {name} becomes {target.colour}."))


def question(rng: np.random.Generator, scene: Scene, split: str) -> tuple[str, str]:
    """A question about the scene and its one right answer. Only `unseen_combinations` asks about a held-out kind."""
    ways = (_ask_colour, _ask_shape, _ask_size, _ask_place, _ask_count, _ask_presence, _ask_neighbour)
    share = (0.22, 0.22, 0.12, 0.14, 0.1, 0.12, 0.08)
    while True:
        asked = ways[rng.choice(len(ways), p=share)](rng, scene, split)
        if asked:
            return asked


def _any(rng: np.random.Generator, scene: Scene) -> Object:
    return scene[int(rng.integers(len(scene)))]


def _ask_colour(rng: np.random.Generator, scene: Scene, split: str) -> tuple[str, str] | None:
    o = _any(rng, scene)
    if rng.random() < 0.5:
        return f"What colour is the object in the {o.place}?", o.colour
    name = reference(rng, o, scene, avoid=("colour",))
    return (f"What colour is the {name}?", o.colour) if name else None


def _ask_shape(rng: np.random.Generator, scene: Scene, split: str) -> tuple[str, str]:
    o = _any(rng, scene)
    same = [x for x in scene if x.colour == o.colour]
    if len(same) == 1 and rng.random() < 0.3:
        return f"What shape is the {o.colour} object?", o.shape
    return f"What shape is in the {o.place}?", o.shape


def _ask_size(rng: np.random.Generator, scene: Scene, split: str) -> tuple[str, str] | None:
    o = _any(rng, scene)
    name = reference(rng, o, scene, avoid=("size",))
    return f"Is the {name} large or small?", o.size


def _ask_place(rng: np.random.Generator, scene: Scene, split: str) -> tuple[str, str]:
    o = _any(rng, scene)
    return f"Where is the {reference(rng, o, scene)}?", o.place


def _ask_count(rng: np.random.Generator, scene: Scene, split: str) -> tuple[str, str]:
    return "How many objects are there?", number(len(scene))


def _ask_presence(rng: np.random.Generator, scene: Scene, split: str) -> tuple[str, str]:
    present = {o.kind for o in scene}
    if rng.random() < 0.5:
        shape, colour = _any(rng, scene).kind
        return f"Is there a {colour} {shape}?", "yes"
    absent = [k for k in KINDS if k not in present and (k not in UNSEEN or split == "unseen_combinations")]
    # At least half of these questions name the colour or the shape of an object of the scene, so one attribute is not
    # enough for the answer.
    close = [k for k in absent if any(k[0] == p[0] or k[1] == p[1] for p in present)]
    chosen = close if rng.random() < 0.5 else absent
    shape, colour = chosen[rng.integers(len(chosen))]
    return f"Is there a {colour} {shape}?", "no"


def _ask_neighbour(rng: np.random.Generator, scene: Scene, split: str) -> tuple[str, str]:
    o = _any(rng, scene)
    vertical, horizontal = o.place.split()
    if rng.random() < 0.5:
        way = "below" if vertical == "top" else "above"
        place = f"{'bottom' if vertical == 'top' else 'top'} {horizontal}"
    else:
        way = "to the right of" if horizontal == "left" else "to the left of"
        place = f"{vertical} {'right' if horizontal == 'left' else 'left'}"
    other = [x for x in scene if x.place == place]
    answer = f"{other[0].colour} {other[0].shape}" if other else "nothing"
    return f"What is {way} the {reference(rng, o, scene)}?", answer
