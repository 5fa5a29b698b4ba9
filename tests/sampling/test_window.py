"""Several positions of an image at once give the same tokens as one by one, in fewer steps. The width is chosen by
measuring."""

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
from ar_unified.sampling.pairs import Pairs
from ar_unified.sampling.request import Request
from ar_unified.sampling.steps import CHUNK, Shape
from tests.language.small import grammar_of
from tests.sampling.test_conversation import script
from tests.sampling.test_engine import collect, engine, requests
from tests.sampling.tiny import CONFIG, GRAMMARS, random_params


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Compiling takes most of the time of these tests, so there is one bucket of prompts and one length of cache."""
    monkeypatch.setattr("ar_unified.sampling.prompts._SMALLEST", 64)
    monkeypatch.setattr("ar_unified.sampling.plan._SHARES", (1,))


def images(count, size, **changes):
    """Requests for images with all their settings, two contexts each."""
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
    """The requests have ragged prompts, texts and images, canvases, one to three contexts, filters, and a penalty of
    repetition."""
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


class Restless(Pace):
    """A pace that changes the window after nearly every chunk, and makes chunks short, whatever this costs."""

    def next(self, shape, steps):
        self.turn = getattr(self, "turn", 0) + 1
        return (1, 4, 4, 1, 1, 4)[self.turn % 6], min(steps, 5), False


@pytest.mark.slow
def test_mixed_requests_and_windows_that_change_give_the_same_tokens(params):
    """There are many more requests than slots, each with its own settings. Guesses from before a change of requests are
    not used."""
    grammar, rng = GRAMMARS["rows"], np.random.default_rng(0)
    asked = [
        dataclasses.replace(
            one,
            id=f"{one.id} {i}",
            seed=int(rng.integers(1 << 31)),
            image=Filter(rng.choice([0.0, 0.3, 1.0, 1.5]), int(rng.choice([0, 4])), rng.choice([1.0, 0.8])),
            text=Filter(rng.choice([0.0, 1.0]), int(rng.choice([0, 6])), rng.choice([1.0, 0.9])),
            repetition_penalty=rng.choice([1.0, 1.4]),
        )
        for i in range(10)
        for one in requests(grammar)
    ]
    expected = collect(engine(grammar, params).generate(asked))
    wide, restless = engine(grammar, params, window=4), engine(grammar, params, window="auto")
    restless._pace = Restless("auto")
    for each in (wide, restless):
        same(collect(each.generate(asked)), expected)
        assert each.tokens_a_step > 1.05


def test_a_conversation_has_the_same_turns(params):
    grammar = GRAMMARS["rows"]
    talks = [Conversation(engine(grammar, params, max_length=192, window=window)) for window in (1, 4)]
    for parts, settings in script(grammar)[:4]:
        one, several = (talk.say(parts, **settings) for talk in talks)
        np.testing.assert_array_equal(several.tokens, one.tokens)
    np.testing.assert_array_equal(talks[1].tokens, talks[0].tokens)


def test_what_is_certain_comes_in_whole_windows():
    """The model always gives the same code. Tokens that the grammar forces are not taken from the model."""
    grammar, params = GRAMMARS["rows"], random_params()
    # All ids have the same vector, and no layer adds to it, so every step has the same logits.
    flat = jax.tree.map(jnp.zeros_like, params) | {"embedding": jnp.ones_like(params["embedding"])}
    head = jnp.zeros_like(params["head"]).at[grammar.vocabulary.image_offset + 7].set(1.0)
    flat |= {"head": head, "norm": params["norm"]}
    wide = engine(grammar, flat, window=4)
    found = collect(wide.generate(images(4, (3, 4))))
    assert all((part.codes == 7).all() for sample in found.values() for part in sample.document.parts[:1])
    # 16 tokens after the size: codes, line ends, and the end of the image. Then the end, or another image with its
    # size.
    assert wide.tokens_a_step > 2


def test_auto_draws_the_same_tokens(params, monkeypatch):
    monkeypatch.setattr(pace, "_AFTER", 8)
    monkeypatch.setattr(pace, "_DECIDING", 1)
    monkeypatch.setattr(pace, "_BLOCK", 4)
    monkeypatch.setattr(pace, "WIDTHS", (1, 4))
    monkeypatch.setattr(pace, "FEW", 4)
    monkeypatch.setattr(pace, "_DOUBTFUL", 1e6)  # tries all widths at once, whatever they cost
    monkeypatch.setattr(pace, "_SHARE", 1e6)
    monkeypatch.setattr(pace, "_BETTER", 0.0)  # the wider one wins
    grammar = GRAMMARS["rows"]
    asked = images(40, (3, 4))
    params = jax.device_put(params, jax.devices()[0])  # where the parameters of a loaded bundle are, too
    auto = engine(grammar, params, window="auto")
    programs, inserts = auto._programs.several._cache_size(), auto._programs.insert._cache_size()
    same(collect(auto.generate(asked)), collect(engine(grammar, params).generate(asked)))
    assert auto.tokens_a_step > 1.05
    assert auto._programs.several._cache_size() - programs <= 1, "the pace allows for one compilation"
    assert auto._programs.insert._cache_size() - inserts <= 2, "pools with guesses, and pools without"


@pytest.fixture
def _steps_for_seconds(monkeypatch):
    monkeypatch.setattr(pace, "_COMPILING", 0.0)


def driven(cost, share, images, more=1.0, compiling=0.0, program=None, seed=0, cached=(), unseen=1.0, idle=0.0):
    """Simulates a pool that draws images of 64 codes. `share` is the share of codes that is guessed right, `cost` the
    cost of a step with each window, `compiling` the additional cost if its program must be compiled, and `more` the
    factor by which a window's own draws raise the number of right guesses. In use, a step of a window takes `unseen`
    times as long as when it is measured alone. After every seventh image, no request arrives for `idle` seconds.

    Returns the tokens and the seconds of each width, and the pace.
    """
    rng, shape = np.random.default_rng(seed), Shape(2, 64)
    first, waited = Pace("auto", program, clock=lambda: sum(seconds.values()) + waited), 0.0
    tokens, seconds, compiled = dict.fromkeys(pace.WIDTHS, 0.0), dict.fromkeys(pace.WIDTHS, 0.0), set(cached)
    left, image = 65.0, rng.random(64) < share
    while images > 0:
        width, count, timed = first.next(shape, CHUNK)
        gained = 1 + min(more * (1 - share**width) / (1 - share) - more, width - 1.0)
        took = 0.0 if width in compiled else compiling
        compiled.add(width)
        first.called(shape, width, took)
        took += cost[width] * count
        if timed:
            first.took(shape, took, gained, count)
        seconds[width] += took * (unseen if width > 1 else 1.0)
        first.drew(shape, width, count * gained, count, 1)
        tokens[width] += count * gained
        left -= count * gained
        while left <= 0:
            if first.asks(shape):
                first.saw(shape, 65, [image])
            left, image, images = left + 65, rng.random(64) < share, images - 1
            if images % 7 == 0 and idle:
                waited += idle
                first.begins()
    return tokens, seconds, first


# Costs of a step by width, on a device limited by memory and on one limited by computation.
WAITING = {1: 1.0, 2: 1.1, 4: 1.4, 8: 2.0}
COMPUTING = {1: 1.0, 2: 1.9, 4: 3.6, 8: 7.0}


@pytest.mark.usefixtures("_steps_for_seconds")
@pytest.mark.parametrize(
    "cost, share, more, best",
    [
        (WAITING, 0.9, 1.0, 8),
        ({1: 1.0, 2: 1.3, 4: 1.8, 8: 3.4}, 0.75, 1.0, 4),
        (WAITING, 0.3, 3.0, 2),  # good only through guesses from its own draws
        (WAITING, 0.05, 1.0, 1),
        (COMPUTING, 0.6, 1.0, 1),
    ],
)
def test_auto_takes_the_width_that_is_fastest(cost, share, more, best):
    tokens, seconds, _ = driven(cost, share, 3000, more)
    assert max(tokens, key=tokens.get) == best
    assert tokens[best] > 0.8 * sum(tokens.values())


@pytest.mark.usefixtures("_steps_for_seconds")
@pytest.mark.parametrize("images", [1, 5, 20, 100, 400, 3000])
@pytest.mark.parametrize("compiling", [0.0, 500.0, 20_000.0])
@pytest.mark.parametrize("cost, share", [(COMPUTING, 0.6), (COMPUTING, 0.9), (WAITING, 0.05), (WAITING, 0.4)])
def test_auto_is_never_slower_than_one_by_one(cost, share, images, compiling):
    """This is true for jobs of any length, and however long it takes to compile useless widths."""
    tokens, seconds, _ = driven(cost, share, images, compiling=compiling)
    alone = compiling + cost[1] * sum(tokens.values())
    assert sum(seconds.values()) * 0.97 <= alone


@pytest.mark.usefixtures("_steps_for_seconds")
@pytest.mark.parametrize("images", [20, 100, 400, 3000])
@pytest.mark.parametrize("unseen, share", [(1.5, 0.6), (2.5, 0.6), (4.0, 0.9)])
def test_nor_where_a_window_takes_longer_in_use_than_alone(unseen, share, images):
    tokens, seconds, _ = driven(WAITING, share, images, unseen=unseen)
    assert sum(seconds.values()) * 0.97 <= WAITING[1] * sum(tokens.values())


@pytest.mark.usefixtures("_steps_for_seconds")
def test_time_without_requests_is_nobodys():
    tokens, *_ = driven(WAITING, 0.9, 3000, idle=5000.0)
    assert tokens[8] > 0.8 * sum(tokens.values())
    tokens, *_ = driven(WAITING, 0.6, 3000, unseen=2.5, idle=5000.0)
    assert tokens[1] > 0.95 * sum(tokens.values())


@pytest.mark.usefixtures("_steps_for_seconds")
def test_a_window_that_takes_longer_in_use_is_left_out_for_good():
    tokens, *_ = driven(WAITING, 0.6, 3000, unseen=2.5)
    assert tokens[1] > 0.95 * sum(tokens.values())
    tokens, *_ = driven(WAITING, 0.9, 3000, unseen=1.5)  # the window is still twice as fast
    assert tokens[8] > 0.8 * sum(tokens.values())


def test_nor_where_its_own_program_came_from_a_cache():
    """A step takes a millisecond and compiling a wider program takes seconds, which is not known in advance."""
    cost = {width: seconds / 1000 for width, seconds in COMPUTING.items()}
    for images in (100, 1000, 6000):
        tokens, seconds, _ = driven(cost, 0.6, images, compiling=5.0, cached=(1,))
        assert sum(seconds.values()) * 0.97 <= cost[1] * sum(tokens.values())


@pytest.mark.usefixtures("_steps_for_seconds")
def test_what_was_measured_in_this_process_is_not_measured_again():
    tokens, *_ = driven(WAITING, 0.9, 40, compiling=500.0, program="these")
    assert max(tokens, key=tokens.get) == 1  # the job is too short to pay for compilation
    driven(WAITING, 0.9, 3000, compiling=500.0, program="these")
    tokens, *_ = driven(WAITING, 0.9, 40, compiling=0.0, program="these")
    assert max(tokens, key=tokens.get) == 8
    tokens, *_ = driven(WAITING, 0.9, 40, compiling=500.0, program="those")
    assert max(tokens, key=tokens.get) == 1


def test_auto_gives_up_a_window_that_does_not_bring_what_was_foreseen():
    """The window's steps become more expensive, or its guesses worse, than when it was chosen."""
    first, shape = Pace("auto", None), Shape(1, 64)
    for _ in range(3000):
        width, count, timed = first.next(shape, CHUNK)
        if timed:
            first.took(shape, WAITING[width] * count, 1.0, count)
        first.drew(shape, width, count, count, 1)
        first.saw(shape, 65, [np.ones(64, bool)])  # all should be guessed, but none is
    assert first.next(shape, CHUNK)[0] == 1


def test_pairs_learn_what_follows_two_codes():
    """Even if codes share entries of the table, a guess is a code that occurred."""
    codes = np.array([[1, 2, 3], [1, 2, 5], [1, 2, 4]])
    learned = Pairs()
    np.testing.assert_array_equal(
        learned.learn(codes), [0, 0, 0, 1, 1, 0, 1, 1, 0]
    )  # the code above, or the code before
    np.testing.assert_array_equal(learned.learn(codes), np.ones(9, bool))
    large = np.random.default_rng(0).integers(0, 1 << 18, (64, 64))
    learned.learn(large)
    assert learned.learn(large).mean() > 0.8
    assert set(np.unique(learned.table)) <= {-1, *codes.ravel(), *large.ravel()}


def test_where_the_code_above_is_right_more_often_it_is_the_guess():
    """Six of ten codes equal the code above, the others are any of eight. The code that followed last time is right
    four times in ten."""
    learned, rng, right = Pairs(), np.random.default_rng(0), []
    for _ in range(60):
        codes = rng.integers(0, 8, (12, 12))
        for row in range(1, 12):
            codes[row] = np.where(rng.random(12) < 0.55, codes[row - 1], codes[row])
        right.append(learned.learn(codes).reshape(12, 12)[1:].mean())
    assert np.mean(right[20:]) > 0.55


def test_the_device_guesses_what_the_host_says_it_would(params):
    """Greedy images of one request are drawn again and again. Once the table knows them, a step draws a whole
    window."""
    grammar = GRAMMARS["grid"]
    wide = engine(grammar, params, window=4, batch_size=4)
    asked = [dataclasses.replace(images(1, None)[0], id=str(i), image=Filter(0.0), n=1) for i in range(4)]
    list(wide.generate(asked))
    wide._drawn[:] = 0
    found = list(wide.generate(asked))
    right = wide._pairs.learn(found[0].document.parts[0].codes)
    assert right.all()  # no pair of codes occurs twice in this image
    # 6 codes and the ends of the image and of the answer are drawn in three steps: one before there are guesses, then
    # four, then the rest.
    assert wide.tokens_a_step == pytest.approx((len(found[0].tokens) - 1) / 3, abs=0.01)


def test_a_width_of_its_own_is_kept():
    assert [Pace(4).next(Shape(1, 64), 50), Pace("2").most, Pace("auto").most] == [(4, 50, False), 2, 8]


@pytest.mark.parametrize("window", [0, 3, 9, "wide", 1.5])
def test_a_window_there_is_not_is_refused(params, window):
    with pytest.raises(ValueError, match="window: expected one of 1, 2, 4, 8, auto; found"):
        engine(GRAMMARS["rows"], params, window=window)
