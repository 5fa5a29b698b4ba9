"""Several positions of an image at once: the tokens that are drawn one by one, in fewer steps, and a measured width."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.language.document import TextPart
from ar_unified.language.layouts import WITH_IMAGES
from ar_unified.sampling import pace
from ar_unified.sampling.conversation import Conversation
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.pace import Pace
from ar_unified.sampling.request import Request
from ar_unified.sampling.steps import CHUNK, Shape
from tests.language.small import grammar_of
from tests.sampling.test_conversation import script
from tests.sampling.test_engine import collect, engine, requests
from tests.sampling.tiny import CONFIG, GRAMMARS, random_params


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Compiling is what these tests wait for: one bucket of prompts and one length of cache."""
    monkeypatch.setattr("ar_unified.sampling.prompts._SMALLEST", 64)
    monkeypatch.setattr("ar_unified.sampling.plan._SHARES", (1,))


def images(count, size, **changes):
    """Requests for images with what a request may say of them, two contexts each."""
    filters = itertools.cycle([Filter(), Filter(0.3), Filter(0.0), Filter(1.0, 5), Filter(0.7, 0, 0.8)])
    prompts = ("abc", "ponmlkjihgfedcba" * 2, "d")
    return [
        Request(f"image {i}", (TextPart(prompts[i % 3]),), mode="image", image_size=size, guidance=1.2 + i % 3, seed=i,
                min_images=1 + i % 2, max_images=1 + i % 2, image=one, **changes)
        for i, one in zip(range(count), filters, strict=False)
    ]  # fmt: skip


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key].tokens, other[key].tokens, err_msg=str(key))


@pytest.mark.slow
@pytest.mark.parametrize(
    "width, kind",
    [
        (2, "grid"),
        (8, "rows"),
        pytest.param(4, "rows", marks=pytest.mark.exact),
        pytest.param(4, "grid", marks=pytest.mark.exact_later),
        pytest.param(2, "rows", marks=pytest.mark.exhaustive),
        pytest.param(8, "grid", marks=pytest.mark.exhaustive),
    ],
)
def test_tokens_are_those_drawn_one_by_one(params, width, kind):
    """Ragged prompts, texts beside images, canvases, one to three contexts, filters, a penalty of repetition."""
    grammar = GRAMMARS[kind]
    asked, wide = requests(grammar), engine(grammar, params, window=width)
    same(collect(wide.generate(asked)), collect(engine(grammar, params).generate(asked)))
    assert wide.tokens_a_step > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_so_they_are_in_every_layout(kind):
    grammar = grammar_of(kind)
    config = dataclasses.replace(CONFIG, vocab_size=grammar.vocabulary.size)
    params = random_params(config=config)
    asked = images(8, (2, 3)) + [
        dataclasses.replace(one, id=f"free {i}", mode="interleaved", image_size=None, max_tokens=60)
        for i, one in enumerate(images(4, None))
    ]
    made = [engine(grammar, params, config=config, max_length=192, window=window) for window in (1, 4)]
    one, several = (collect(each.generate(asked)) for each in made)
    same(several, one)
    assert made[1].tokens_a_step > 1


def test_a_conversation_has_the_same_turns(params):
    grammar = GRAMMARS["rows"]
    talks = [Conversation(engine(grammar, params, max_length=192, window=window)) for window in (1, 4)]
    for parts, settings in script(grammar)[:4]:
        one, several = (talk.say(parts, **settings) for talk in talks)
        np.testing.assert_array_equal(several.tokens, one.tokens)
    np.testing.assert_array_equal(talks[1].tokens, talks[0].tokens)


def test_what_is_certain_comes_in_whole_windows():
    """A model that says one code whatever it has read; and what the grammar says, the model is not asked for."""
    grammar, params = GRAMMARS["rows"], random_params()
    # All ids are the same vector, and no layer adds to it: what is said last is what is said next.
    flat = jax.tree.map(jnp.zeros_like, params) | {"embedding": jnp.ones_like(params["embedding"])}
    head = jnp.zeros_like(params["head"]).at[grammar.vocabulary.image_offset + 7].set(1.0)
    flat |= {"head": head, "norm": params["norm"]}
    wide = engine(grammar, flat, window=4)
    found = collect(wide.generate(images(4, (3, 4))))
    assert all((part.codes == 7).all() for sample in found.values() for part in sample.document.parts[:1])
    # 16 tokens behind the size: codes, line ends, the end of the image; and the end, or another image with its size.
    assert wide.tokens_a_step > 2


def test_auto_draws_the_same_tokens(params, monkeypatch):
    monkeypatch.setattr(pace, "_AFTER", 8)
    monkeypatch.setattr(pace, "WIDTHS", (1, 4))
    monkeypatch.setattr(pace, "FEW", 4)
    monkeypatch.setattr(pace, "_BETTER", 0.0)  # the wider one wins
    grammar = GRAMMARS["rows"]
    asked = images(40, (3, 4))
    auto = engine(grammar, params, window="auto")
    same(collect(auto.generate(asked)), collect(engine(grammar, params).generate(asked)))
    assert auto.tokens_a_step > 1.05


def measured(seconds, tokens, steps):
    """The windows that a pool decoded with whose steps take so long and have so many tokens, by width."""
    found, first, shape = [], Pace("auto"), Shape(2, 64)
    while len(found) < steps:
        width, count, timed = first.next(shape, CHUNK)
        found += [width] * count
        if timed:
            first.took(shape, seconds[width], tokens[width])
    return found


@pytest.mark.parametrize(
    "seconds, tokens, best",
    [
        ({1: 1.0, 2: 1.1, 4: 1.4, 8: 2.0}, {1: 1.0, 2: 1.8, 4: 3.0, 8: 5.0}, 8),
        ({1: 1.0, 2: 1.1, 4: 1.4, 8: 2.8}, {1: 1.0, 2: 1.8, 4: 3.0, 8: 5.0}, 4),
        ({1: 1.0, 2: 1.9, 4: 3.5, 8: 7.0}, {1: 1.0, 2: 1.5, 4: 2.0, 8: 2.2}, 1),
    ],
)
def test_auto_takes_the_width_that_measures_best(seconds, tokens, best):
    found = measured(seconds, tokens, 6000)
    assert set(found[: 8 * CHUNK]) == {1}  # a short job tries nothing
    assert max(set(found), key=found.count) == best
    assert found.count(best) > 0.8 * len(found)
    if best == 1:  # and what was tried in vain cost less than a hundredth
        assert sum(seconds[width] / tokens[width] for width in found) < 1.01 * len(found)


def test_a_width_of_its_own_is_kept():
    assert [Pace(4).next(Shape(1, 64), 50), Pace("2").most, Pace("auto").most] == [(4, 50, False), 2, 8]


@pytest.mark.parametrize("window", [0, 3, 9, "wide", 1.5])
def test_a_window_there_is_not_is_refused(params, window):
    with pytest.raises(ValueError, match="window: expected one of 1, 2, 4, 8, auto; found"):
        engine(GRAMMARS["rows"], params, window=window)
