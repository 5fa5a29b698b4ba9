"""Conversations about a picture of a scene (`scenes`): several turns. Most turns can only be understood with an earlier
turn.

    describe    What is in the picture?             In the top left there is a small red circle.
    draw        Draw this: top left: a red star.    a picture
    question    What colour is the star?            red
    follow_up   Where is it?  And the circle?       top left
    edit        Make the circle blue.               the picture, edited (`edits`)
    edit_it     Now make it large.                  a picture; "it" is the object mentioned last
    before      What colour was it before?          red

As with edits (`edits`), the content of a conversation decides its split: all of its scenes belong to that split, and
validation uses only edits that never occur in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ar_unified.data import edits
from ar_unified.data.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    caption,
    number,
    pick,
    reference,
    sample_scene,
    without,
)


@dataclass(frozen=True)
class Exchange:
    """A question and its right answer.

    Attributes:
        kind: one of the kinds in the table above.
        asked: the user's words.
        answer: the assistant's words; None if the answer is a picture of `scene`.
        scene: what the last picture shows after the answer.
    """

    kind: str
    asked: str
    answer: str | None
    scene: Scene


@dataclass(frozen=True)
class Conversation:
    """`shown` is the scene whose picture is in the first question; None if the first picture is an answer."""

    shown: Scene | None
    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True)
class _State:
    """What has been said so far.

    Attributes:
        scene: what the last picture shows.
        it: the object that "it" means.
        told: the attributes of `it` that were mentioned.
        attribute: the attribute that was asked for last.
        edited: the last edit, as (kind, object before, object after).
        asked: all questions about the last picture.
    """

    scene: Scene
    split: str
    it: Object | None = None
    told: frozenset[str] = frozenset()
    attribute: str = ""
    edited: tuple[str, Object, Object] | None = None
    asked: frozenset[str] = frozenset()


_Step = tuple[Exchange, _State]
_QUESTIONS_OF_IT = {
    "colour": ("What colour is it?", "What colour was it before?"),
    "shape": ("What shape is it?", "What shape was it before?"),
    "size": ("Is it large or small?", "Was it large or small before?"),
    "place": ("Where is it?", "Where was it before?"),
}
_CHANGED = {"recolour": "colour", "reshape": "shape", "resize": "size", "move": "place"}
_NAMED = {"colour": frozenset(COLOURS), "shape": frozenset(SHAPES), "size": frozenset(SIZES)}


def sample_conversation(rng: np.random.Generator, split: str) -> Conversation:
    """A random conversation of `split`, of two to four exchanges."""
    while True:
        plan = _plan(rng, _EDITS[split])
        for _ in range(_TRIES):
            scene = sample_scene(rng, split)
            if exchanges := _carried_out(rng, plan, _State(scene, split)):
                return Conversation(None if plan[0] == "draw" else scene, exchanges)


def _plan(rng: np.random.Generator, most: int) -> tuple[str, ...]:
    """The kinds of questions, in order. They are chosen before the scene, so that edits that few scenes allow are as
    frequent as other edits. `most` is the maximum number of edits.
    """
    length = int(rng.integers(2, 5))
    plan = ["draw"] if rng.random() < _DRAWN_FIRST else []
    spoken_of = untold = described = counted = False
    while len(plan) < length:
        last = plan[-1].rpartition(" ")[2] if plan else ""
        banned = {
            "follow_up": not untold,
            "edit_it": not spoken_of,
            "describe": described,
            "count": counted,
            "before": last not in _CHANGED,
        }
        if sum("edit" in each for each in plan) == most:
            banned |= {"edit": True, "edit_it": True}
        ways = [way for way in _WEIGHTS if not banned.get(way)]
        weights = np.array([_WEIGHTS[way] for way in ways])
        way = ways[int(rng.choice(len(ways), p=weights / weights.sum()))]
        if way in ("edit", "edit_it"):
            kind = pick(rng, [kind for kind in edits.KINDS_OF_EDITS if (way, kind) != ("edit_it", "add")])
            spoken_of = kind != "remove"
            untold = kind not in ("add", "remove") and (untold or way == "edit")
            described = counted = False
            way = f"{way} {kind}"
        elif way in ("describe", "count"):
            described, counted = described or way == "describe", counted or way == "count"
            spoken_of = untold = False
        elif way == "question":
            spoken_of = untold = True
        plan.append(way)
    return tuple(plan)


def _carried_out(rng: np.random.Generator, plan: tuple[str, ...], state: _State) -> tuple[Exchange, ...]:
    """Carries out a plan on the scene of `state`. Returns the exchanges; () if this scene does not allow them."""
    exchanges: list[Exchange] = []
    for way in plan:
        name, _, kind = way.partition(" ")
        step = _WAYS[name](rng, state, kind) if kind else _WAYS[name](rng, state)
        if step is None or step[0].asked in state.asked:
            return ()
        exchange, then = step
        exchanges.append(exchange)
        state = replace(then, asked=then.asked | {exchange.asked})
    return tuple(exchanges)


def _draw(rng: np.random.Generator, state: _State) -> _Step:
    said = f"{pick(rng, ('Draw this: ', 'Please draw: '))}{caption(rng, state.scene)}"
    return Exchange("draw", said, None, state.scene), state


def _describe(rng: np.random.Generator, state: _State) -> _Step:
    said = pick(rng, ("What is in the picture?", "Describe the picture."))
    return Exchange("describe", said, caption(rng, state.scene), state.scene), replace(state, it=None)


def _count(rng: np.random.Generator, state: _State) -> _Step:
    said = "How many objects are there?"
    return Exchange("question", said, number(len(state.scene)), state.scene), replace(state, it=None)


def _question(rng: np.random.Generator, state: _State) -> _Step | None:
    """A question about an object, by its name or its place."""
    o = state.scene[int(rng.integers(len(state.scene)))]
    attribute = pick(rng, tuple(_QUESTIONS_OF_IT))
    if attribute == "shape" or (attribute == "colour" and rng.random() < 0.5):
        said, told = f"What {attribute} is in the {o.place}?", frozenset({"place"})
    else:
        name = reference(rng, o, state.scene, avoid=(attribute,))
        if name is None:
            return None
        said, told = _asking(attribute, f"the {name}"), _told(name)
    return _answered(state, "question", said, o, attribute, told)


def _asking(attribute: str, name: str) -> str:
    return {"colour": f"What colour is {name}?", "size": f"Is {name} large or small?", "place": f"Where is {name}?"}[
        attribute
    ]


def _answered(state: _State, kind: str, said: str, o: Object, attribute: str, told: frozenset[str]) -> _Step:
    then = replace(state, it=o, told=told | {attribute}, attribute=attribute)
    return Exchange(kind, said, getattr(o, attribute), state.scene), then


def _told(name: str) -> frozenset[str]:
    """The attributes that a noun phrase mentions."""
    return frozenset(attribute for attribute, words in _NAMED.items() if words & set(name.split()))


def _follow_up(rng: np.random.Generator, state: _State) -> _Step | None:
    """Another question about the same object, or the same question about another object."""
    if state.it is None:
        return None
    others = without(state.scene, state.it)
    if others and state.attribute in ("colour", "size", "place") and rng.random() < 0.5:
        o = others[int(rng.integers(len(others)))]
        name = reference(rng, o, state.scene, avoid=(state.attribute,))
        return _answered(state, "follow_up", f"And the {name}?", o, state.attribute, _told(name)) if name else None
    open_ = [attribute for attribute in _QUESTIONS_OF_IT if attribute not in state.told]
    if not open_:
        return None
    attribute = pick(rng, open_)
    return _answered(state, "follow_up", _QUESTIONS_OF_IT[attribute][0], state.it, attribute, state.told)


def _edit(rng: np.random.Generator, state: _State, kind: str) -> _Step | None:
    """An edit that names its object."""
    for old, new, after in edits.options(rng, kind, state.scene, state.split):
        name = reference(rng, old, state.scene) if old else None
        said = edits.instruction(rng, kind, old, new, f"the {name}")
        if new is None and rng.random() < 0.5:
            said = f"Draw it without the {name}."
        return _edited("edit", said, kind, (old, new), after, state, _told(name or ""))
    return None


def _edit_it(rng: np.random.Generator, state: _State, kind: str) -> _Step | None:
    """An edit of the object mentioned last."""
    for old, new, after in edits.options(rng, kind, state.scene, state.split):
        if old is not None and old == state.it:
            said = edits.instruction(rng, kind, old, new, "it")
            said = said if rng.random() < 0.5 else f"Now {said[0].lower()}{said[1:]}"
            return _edited("edit_it", said, kind, (old, new), after, state, state.told)
    return None


def _edited(
    turn: str, said: str, kind: str, change: edits.Option, after: Scene, state: _State, told: frozenset[str]
) -> _Step:
    old, new = change
    if new is not None:
        # An added object was described in full. The new value of a changed attribute was mentioned.
        told = frozenset(_QUESTIONS_OF_IT) if old is None else told | {_CHANGED[kind]}
    then = _State(after, state.split, new, told, edited=(kind, old, new) if old and new else None)
    return Exchange(turn, said, None, after), then


def _before(rng: np.random.Generator, state: _State) -> _Step | None:
    """A question about the object before its edit."""
    if state.edited is None or state.it != state.edited[2]:
        return None
    kind, old, _ = state.edited
    attribute = _CHANGED[kind]
    said = _QUESTIONS_OF_IT[attribute][1]
    return Exchange("before", said, getattr(old, attribute), state.scene), replace(state, attribute="")


_WAYS: dict[str, Callable[..., _Step | None]] = {
    "draw": _draw,
    "describe": _describe,
    "question": _question,
    "count": _count,
    "follow_up": _follow_up,
    "edit": _edit,
    "edit_it": _edit_it,
    "before": _before,
}
_WEIGHTS = {"describe": 1, "question": 2, "count": 0.5, "follow_up": 3, "edit": 2, "edit_it": 3, "before": 3}
_DRAWN_FIRST = 0.3  # share of conversations that begin with "draw"
# Maximum number of edits in a conversation. Two held-out edits in a row need three held-out scenes: that is too rare.
_EDITS = {"train": 2, "validation": 1, "unseen_combinations": 2}
_TRIES = 500  # maximum number of scenes that are tried for a plan
