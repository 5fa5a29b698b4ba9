"""Edits of a scene (`scenes`): a picture, an instruction in English, and the picture that the instruction asks for.

    recolour  Make the red circle blue.              resize   Make the star small.
    reshape   Turn the red circle into a square.     add      Add a small green star in the top left.
    move      Move the star to the bottom right.     remove   Remove the large square.
              Move the star down.

The content of an edit decides its split. Both of its scenes belong to that split. An action is what is done to which
object (`action_of`). A tenth of all actions never occur in training instructions, and validation uses only these
actions. For example, no training instruction makes the yellow circle blue. (But shapes/stories holds out no actions.)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ar_unified.data.scenes import (
    COLOURS,
    KINDS,
    PLACES,
    SHAPES,
    SIZES,
    Object,
    Scene,
    free_places,
    in_order,
    noun,
    pick,
    reference,
    sample_scene,
    split_of,
    without,
)


@dataclass(frozen=True)
class Edit:
    """`before` becomes `after`, as `instruction` says; `kind` is one of KINDS_OF_EDITS."""

    kind: str
    before: Scene
    after: Scene
    instruction: str


Option = tuple[Object | None, Object | None]  # the object before and after the edit; None where it does not exist


def _recolourings(scene: Scene) -> Iterator[Option]:
    return ((o, replace(o, colour=colour)) for o in scene for colour in COLOURS if colour != o.colour)


def _reshapings(scene: Scene) -> Iterator[Option]:
    return ((o, replace(o, shape=shape)) for o in scene for shape in SHAPES if shape != o.shape)


def _resizings(scene: Scene) -> Iterator[Option]:
    return ((o, replace(o, size=size)) for o in scene for size in SIZES if size != o.size)


def _moves(scene: Scene) -> Iterator[Option]:
    return ((o, replace(o, place=place)) for o in scene for place in free_places(scene))


def _additions(scene: Scene) -> Iterator[Option]:
    if len(scene) < 3:
        for place in free_places(scene):
            yield from ((None, Object(*kind, size, place)) for kind in KINDS for size in SIZES)


def _removals(scene: Scene) -> Iterator[Option]:
    return ((o, None) for o in scene if len(scene) > 1)


_WAYS: dict[str, Callable[[Scene], Iterator[Option]]] = {
    "recolour": _recolourings,
    "reshape": _reshapings,
    "resize": _resizings,
    "move": _moves,
    "add": _additions,
    "remove": _removals,
}
KINDS_OF_EDITS = tuple(_WAYS)
_ATTRIBUTES = {"colour": "recolour", "shape": "reshape", "size": "resize", "place": "move"}


def action_of(old: Object | None, new: Object | None) -> str:
    """What is done to which object, as a fixed text that names the object only by its colour and shape."""
    o = old or new
    assert o is not None
    if old is None or new is None:
        return f"{'add' if old is None else 'remove'} {o.colour} {o.shape}"
    changed = next(name for name in _ATTRIBUTES if getattr(old, name) != getattr(new, name))
    return f"{o.colour} {o.shape}: {changed} {getattr(new, changed)}"


@lru_cache(maxsize=4096)
def is_held_out(old: Object | None, new: Object | None) -> bool:
    """Whether this action is held out of the training split. A tenth of all actions are held out."""
    return zlib.crc32(action_of(old, new).encode()) % 10 == 0


def kind_of(before: Scene, after: Scene) -> str:
    """The kind of edit that turns `before` into `after`. Raises ValueError if no single edit does."""
    gone, new = set(before) - set(after), set(after) - set(before)
    if len(gone) == len(new) == 1:
        (old,), (become,) = gone, new
        changed = [way for name, way in _ATTRIBUTES.items() if getattr(old, name) != getattr(become, name)]
        if len(changed) == 1:
            return changed[0]
    elif len(gone) + len(new) == 1:
        return "remove" if gone else "add"
    raise ValueError(f"expected scenes that differ by one edit, found {before} and {after}")


def sample_edit(rng: np.random.Generator, split: str) -> Edit:
    """A random edit of `split`; all kinds are equally likely.

    In `validation`, both scenes and the action are held out. In `unseen_combinations`, both scenes have a (shape,
    colour) that no training image has.
    """
    kind = pick(rng, KINDS_OF_EDITS)
    while True:
        before = sample_scene(rng, split)
        for old, new, after in options(rng, kind, before, split):
            name = f"the {reference(rng, old, before)}" if old else ""
            return Edit(kind, before, after, instruction(rng, kind, old, new, name))


def options(rng: np.random.Generator, kind: str, before: Scene, split: str) -> Iterator[tuple[*Option, Scene]]:
    """The edits of one kind that are possible in the scene `before` and belong to `split`, in random order. Yields the
    object before, the object after, and the scene after.
    """
    found = list(_WAYS[kind](before))
    for i in rng.permutation(len(found)):
        old, new = found[i]
        if split != "unseen_combinations" and is_held_out(old, new) != (split == "validation"):
            continue
        after = in_order([*(without(before, old) if old else before), *([new] if new else [])])
        if _apart(after) and split_of(after) == split:
            yield old, new, after


def _apart(scene: Scene) -> bool:
    """Whether all objects differ in shape or colour."""
    return len({o.kind for o in scene}) == len(scene)


def instruction(rng: np.random.Generator, kind: str, old: Object | None, new: Object | None, name: str) -> str:
    """An edit as an English instruction. `name` refers to the object that is edited: "the red circle" or "it"."""
    if old is None:
        assert new is not None
        what = noun(rng, new)
        return pick(rng, (f"Add a {what} in the {new.place}.", f"Put a {what} in the {new.place}."))
    if new is None:
        return pick(rng, (f"Remove {name}.", f"Take away {name}."))
    if kind == "move":
        towards = _direction(old.place, new.place)
        there = (f"Move {name} to the {new.place}.", f"Put {name} in the {new.place}.")
        return pick(rng, (*there, f"Move {name} {towards}.") if towards else there)
    ways = {
        "recolour": (f"Make {name} {new.colour}.", f"Paint {name} {new.colour}."),
        "reshape": (f"Turn {name} into a {new.shape}.", f"Replace {name} by a {new.shape}."),
        "resize": (f"Make {name} {new.size}.", f"Change {name}: it should be {new.size}."),
    }[kind]
    return pick(rng, ways)


def _direction(old: str, new: str) -> str:
    """The word for a horizontal or vertical step; "" for a diagonal one."""
    (row, column), (to_row, to_column) = (divmod(PLACES.index(place), 2) for place in (old, new))
    if row != to_row and column != to_column:
        return ""
    if row != to_row:
        return "down" if to_row > row else "up"
    return "right" if to_column > column else "left"
