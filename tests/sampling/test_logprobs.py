"""Log-probabilities of drawn tokens: the samples do not change, and the numbers are those of the distribution."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.language.automaton import FREE, IMAGE, TEXT, Opened, Wanted
from ar_unified.language.document import TextPart
from ar_unified.language.spans import spans
from ar_unified.sampling import decoding
from ar_unified.sampling.decoding import Filter, Filters
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.replay import replay
from ar_unified.sampling.request import Request
from tests.sampling import tiny

REQUESTS = [
    Request("free", (TextPart("abc"),), mode="free", n=2, seed=3, image=Filter(0.7), max_tokens=40),
    Request("guided", (TextPart("cab"),), mode="image", n=3, seed=5, guidance=1.5, image=Filter(1.5)),
    Request("filtered", (TextPart("pad"),), mode="text", n=1, seed=7, text=Filter(0.8, top_k=5), max_tokens=9),
    Request("likeliest", (TextPart("pad"),), mode="text", n=1, text=Filter(0.0), max_tokens=9),
]


def drawn(grammar, **more):
    engine = Engine(tiny.CONFIG, tiny.random_params(), grammar, batch_size=4, max_length=64, **more)
    plans = {request.id: engine.plan(request) for request in REQUESTS}
    return plans, {(s.request.id, s.index): s for s in engine.generate(plans.values())}


@pytest.mark.parametrize("name", [pytest.param("rows", marks=pytest.mark.slow), "grid"])
def test_samples_say_how_likely_their_tokens_were_and_stay_the_same(name):
    """The replay does not use the sampler to find the positions where there was a choice."""
    grammar = tiny.GRAMMARS[name]
    plans, told = drawn(grammar, logprobs=True)
    _, plain = drawn(grammar)
    served = [(plans[id], sample) for (id, _), sample in told.items()]
    choice, ranges, image = replay(grammar, served, 64)
    for row, (key, sample) in enumerate(told.items()):
        n = len(sample.tokens)
        np.testing.assert_array_equal(sample.tokens, plain[key].tokens)
        assert plain[key].logprobs is None and sample.logprobs.shape == (n,)
        assert (sample.logprobs <= 1e-6).all() and not sample.logprobs[~choice[row, :n]].any()
        assert not choice[row, n:].any() and not image[row, n:].any()
        if key[0] == "likeliest":
            assert not sample.logprobs.any() and choice[row].any()
        else:
            assert sample.logprobs[choice[row, :n]].sum() < -0.1
        inside = (ranges[row, :n, :, 0] <= sample.tokens[:, None]) & (sample.tokens[:, None] < ranges[row, :n, :, 1])
        assert inside.any(axis=1)[choice[row, :n]].all()
        codes = sample.tokens >= grammar.vocabulary.image_offset
        np.testing.assert_array_equal(image[row, :n], codes & choice[row, :n])


def test_probabilities_of_all_tokens_add_up_to_one():
    rng = np.random.default_rng(0)
    logits, allowed = jnp.asarray(rng.normal(0, 2, (1, 12)), jnp.float32), jnp.asarray(rng.random((1, 12)) < 0.7)
    for filter in (Filter(), Filter(0.5), Filter(1.3, top_k=3), Filter(0.9, top_p=0.6)):
        filters = Filters(*(jnp.array([getattr(filter, name)]) for name in Filters._fields))
        one = jax.jit(lambda token, filters=filters: decoding.log_probability(logits, allowed, filters, token))
        scaled = jnp.where(allowed, logits / filter.temperature, -jnp.inf)
        kept = np.asarray(decoding.nucleus(scaled, filters.top_k, filters.top_p))[0]
        found = np.array([float(one(jnp.array([i]))[0]) for i in range(12)])
        assert np.exp(found[kept]).sum() == pytest.approx(1, abs=1e-5)


def test_log_probabilities_and_a_window_are_refused():
    with pytest.raises(ValueError, match="window: expected 1 with logprobs, found 4"):
        Engine(tiny.CONFIG, None, tiny.GRAMMARS["grid"], batch_size=1, max_length=8, window=4, logprobs=True)


@pytest.mark.parametrize("name", ["grid", "rows"])
def test_the_ranges_are_what_the_automaton_allows(name):
    """For states on random paths through the grammar, in every mode."""
    machine = tiny.GRAMMARS[name].automaton
    wanted = list(itertools.product((TEXT, IMAGE, FREE), (0, 1), (6, 20, 60)))
    columns = (np.array(column, np.int32) for column in zip(*wanted, strict=True))
    mode, least, remaining = columns
    state = machine.resume(Opened(), Wanted(remaining, mode, least, least + 2))
    ids = np.arange(machine.syntax.vocabulary.size)
    look = jax.jit(lambda state: (machine.allowed(state), spans(machine, state)))
    advance = jax.jit(machine.advance)
    rng = np.random.default_rng(1)
    for _ in range(30):
        allowed, ranges = map(np.asarray, look(state))
        inside = (ranges[:, :, :1] <= ids) & (ids < ranges[:, :, 1:])
        np.testing.assert_array_equal(inside.any(axis=1), allowed)
        state = advance(state, np.array([rng.choice(np.flatnonzero(row)) for row in allowed], np.int32))
