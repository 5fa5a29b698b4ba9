"""What a sample may depend on, and that the cached loop computes what the teacher-forced forward does."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.document import CodesPart, TextPart
from ar_unified.model.transformer import Transformer
from ar_unified.sampling import decoding, guidance
from ar_unified.sampling import engine as engine_module
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.engine import Engine, _rows, prefill, step
from ar_unified.sampling.request import Request
from tests.sampling.tiny import CONFIG, GRAMMARS, random_params

NOISE = 1e-4  # of the largest logit: rounding, which these large random weights amplify; an error is of order 1
GREEDY = dict(text=Filter(0.0), image=Filter(0.0))


def picture(grammar, seed=0, size=None):
    h, w = size or (grammar.layout.height, grammar.layout.width)
    return CodesPart(np.random.default_rng(seed).integers(0, 24, (h, w)).astype(np.int32))


def requests(grammar, **changes):
    """Ragged prompts, all modes, mixed scales, seeds, filters and sizes."""
    size = (2, 3)
    rows = [
        Request("t2i", (TextPart("abc"),), mode="image", guidance=3.0, n=2, seed=5),
        Request("t2i plain", (TextPart("abc"),), mode="image", seed=5),
        Request("long", (TextPart("ponmlkjihgfedcba" * 2),), mode="image", guidance=1.5, image=Filter(0.7, 5)),
        Request("i2t", (picture(grammar), TextPart("a")), mode="text", max_tokens=9, text=Filter(1.0, 0, 0.8), n=3),
        Request("story", (), turn=False, mode="free", min_images=2, max_images=3, guidance=2.0, max_tokens=60),
        Request("go on", (TextPart("abc"), picture(grammar, 1), TextPart("de")), turn=False, max_tokens=35, seed=9),
        Request("two", (TextPart("h"),), mode="image", min_images=2, max_images=2, image_size=size, guidance=2.0),
        Request("short", (TextPart("b"),), mode="free", max_tokens=1),
    ]
    return [dataclasses.replace(row, **changes) for row in rows]


def engine(grammar, params, **changes):
    return Engine(CONFIG, params, grammar, **(dict(batch_size=4, max_length=96) | changes))


def collect(samples):
    return {(sample.request.id, sample.index): sample for sample in samples}


@jax.jit
def _forward(params, tokens):
    model = Transformer.bind(CONFIG, params)
    positions = jnp.arange(tokens.shape[1])[None]
    return model.logits(model(tokens, positions, jnp.zeros_like(positions)))[0]


def forward_logits(params, tokens):
    """The teacher-forced forward of one sequence: f32 [n, V]. Padded behind its end, which causality keeps apart."""
    return np.asarray(_forward(params, np.pad(tokens, (0, 96 - len(tokens)))[None]))[: len(tokens)]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Compiling is what these tests wait for: one bucket instead of many. The buckets have a test of their own."""
    monkeypatch.setattr(engine_module, "_SMALLEST", 64)


def test_every_sample_parses_and_keeps_its_request(grammar, params):
    asked = requests(grammar)
    found = collect(engine(grammar, params).generate(asked))
    assert set(found) == {(request.id, i) for request in asked for i in range(request.n)}
    for sample in found.values():
        request = sample.request
        assert not sample.error and sample.tokens[-1] == grammar.vocabulary.eos
        assert len(sample.tokens) <= (request.max_tokens or 96)
        pictures = [part for part in sample.document.parts if isinstance(part, CodesPart)]
        least, most = request.images
        assert least <= len(pictures) <= most
        if request.mode == "image":
            assert len(pictures) == len(sample.document.parts)
        if request.image_size:
            assert {part.codes.shape for part in pictures} == {request.image_size}
    assert found["short", 0].finish_reason == "length" and found["t2i", 0].finish_reason == "eos"
    assert not np.array_equal(found["t2i", 0].tokens, found["t2i", 1].tokens)


def test_what_goes_on_is_what_follows_the_prompt(params):
    grammar = GRAMMARS["grid"]
    request = requests(grammar)[5]
    (sample,) = engine(grammar, params).generate([request])
    whole = grammar.parse(np.concatenate([grammar.prompt_tokens(request.parts, turn=False), sample.tokens]))
    text = "".join(part.text if isinstance(part, TextPart) else "#" for part in whole.parts)
    answer = "".join(part.text if isinstance(part, TextPart) else "#" for part in sample.document.parts)
    assert text == "abc#de" + answer and answer


def test_a_sample_depends_on_weights_request_seed_and_index_only(grammar, params):
    """DESIGN §3.5. Alone, permuted, in other slots, beside other mates, by index, by another engine: the same bits."""
    asked = requests(grammar)
    first = engine(grammar, params)
    reference = collect(first.generate(asked))
    shuffled = [asked[i] for i in np.random.default_rng(1).permutation(len(asked))]
    mates = [dataclasses.replace(r, id=f"mate {r.id}", seed=77, n=3) for r in asked]
    runs = [
        collect(first.generate(shuffled)),
        collect(first.generate([*mates, *shuffled])),
        collect(engine(grammar, params).generate(mates[::2] + asked)),
        collect(sample for request in asked for sample in first.generate([request])),
        collect(first.draw([(asked[0], 1), (asked[3], 2), (asked[3], 0)])),
    ]
    for run, count in zip(runs, (11, 11, 11, 11, 3), strict=True):
        shared = [key for key in run if key in reference]
        assert len(shared) == count
        for key in shared:
            np.testing.assert_array_equal(run[key].tokens, reference[key].tokens, err_msg=str(key))
    other = collect(engine(grammar, random_params(1)).generate(asked))
    assert any(not np.array_equal(other[key].tokens, reference[key].tokens) for key in reference)


def test_scale_one_is_no_guidance_bit_for_bit(grammar, params):
    """In a batch of two contexts, too: a row of scale 1 keeps its own logits exactly."""
    asked = [dataclasses.replace(r, guidance=1.0, mode="image", max_tokens=None) for r in requests(grammar)[:3]]
    first = engine(grammar, params)
    jobs = [first._plan(request) for request in asked]
    bucket = max(job.bucket for job in jobs)
    rows = _rows(jobs, bucket, grammar.vocabulary.pad)
    keys = decoding.row_keys(rows.seed, rows.sample)
    one, two = (prefill(CONFIG, grammar, params, rows, contexts=c, length=64) for c in (1, 2))
    advance = jax.jit(lambda state: step(CONFIG, grammar, params, state, rows, keys))
    for _ in range(12):
        np.testing.assert_array_equal(
            one.logits, guidance.mix(two.logits, guidance.weights(rows.scale, 2), jnp.full(3, True))
        )
        one, two = advance(one), advance(two)
    np.testing.assert_array_equal(one.tokens, two.tokens)


def test_guided_batch_equals_a_two_context_loop_without_cache(grammar, params):
    """Mixed scales, several pictures, text between them; greedy."""
    v, empty = grammar.vocabulary, list(grammar.unconditional)
    asked = [
        Request("a", (TextPart("abc"),), mode="image", guidance=4.0, **GREEDY),
        Request(
            "b", (TextPart("dd"),), mode="image", guidance=0.0, min_images=2, max_images=2, image_size=(2, 3), **GREEDY
        ),
        Request("c", (TextPart("ab"),), turn=False, min_images=2, guidance=2.5, max_tokens=50, **GREEDY),
        Request("d", (picture(grammar), TextPart("p")), mode="image", guidance=-1.0, **GREEDY),
    ]
    found = collect(engine(grammar, params).generate(asked))
    for request in asked:
        sample = found[request.id, 0]
        assert len([p for p in sample.document.parts if isinstance(p, CodesPart)]) >= 1
        prompt = grammar.prompt_tokens(request.parts, turn=request.turn)
        tokens = np.concatenate([prompt, sample.tokens])
        own, image = forward_logits(params, tokens), v.role(tokens) == 4
        for i in np.flatnonzero(image):
            if i < len(prompt):
                continue
            begin = np.flatnonzero(tokens[:i] == v.boi)[-1]
            other = forward_logits(params, np.concatenate([empty, tokens[begin:i]]))[-1]
            mixed = other + request.guidance * (own[i - 1] - other)
            codes = mixed[v.image_offset : v.image_offset + v.codebook_size]
            assert codes[tokens[i] - v.image_offset] >= codes.max() - 1e-4, (request.id, i)
    plain = collect(engine(grammar, params).generate(dataclasses.replace(r, guidance=1.0) for r in asked))
    assert any(not np.array_equal(plain[key].tokens, found[key].tokens) for key in found)  # guidance did something


def test_decode_logits_equal_the_forward_in_both_contexts(grammar, params):
    """DESIGN §3.6, along the engine's own path: prefill, every step, and companions after each reset."""
    asked = requests(grammar)[2:5] + requests(grammar)[6:7]
    planner = engine(grammar, params)
    jobs = [planner._plan(request) for request in asked]
    rows = _rows(jobs, max(job.bucket for job in jobs), grammar.vocabulary.pad)
    keys, v = decoding.row_keys(rows.seed, rows.sample), grammar.vocabulary
    state = prefill(CONFIG, grammar, params, rows, contexts=2, length=96)
    advance = jax.jit(lambda state: step(CONFIG, grammar, params, state, rows, keys))
    logits, resets = [np.asarray(state.logits)], 0
    while not bool(grammar.automaton.done(state.automaton).all()):
        state = advance(state)
        logits.append(np.asarray(state.logits))
    R = len(jobs)
    for row, job in enumerate(jobs):
        generated = np.asarray(state.tokens)[row]
        generated = generated[generated != v.pad]
        whole = np.concatenate([job.prompt, generated])
        own = forward_logits(params, whole)
        for i in range(len(generated)):
            np.testing.assert_allclose(logits[i][row], own[len(job.prompt) + i - 1], atol=NOISE * np.abs(own).max())
        for begin in np.flatnonzero(generated == v.boi):
            end = begin + np.flatnonzero(generated[begin:] == v.eoi)[0]
            other = forward_logits(params, np.concatenate([grammar.unconditional, generated[begin:end]]))
            for i in range(begin, end):
                expected = other[len(grammar.unconditional) + i - begin]
                np.testing.assert_allclose(logits[i + 1][R + row], expected, atol=NOISE * np.abs(other).max())
            resets += 1
    assert resets >= 5


def test_no_request_compiles_another_program(params):
    grammar = GRAMMARS["grid"]
    first = engine(grammar, params)
    list(first.generate([Request("a", (TextPart("abc"),), mode="image", guidance=2.0)]))
    before = first._prefill._cache_size(), first._decode._cache_size()
    changed = Request("b", (TextPart("p"),), mode="image", guidance=7.0, seed=3, n=2, image=Filter(0.5, 3, 0.5))
    list(first.generate([changed]))
    assert (first._prefill._cache_size(), first._decode._cache_size()) == before == (1, 1)


BAD = [
    (dict(parts=(TextPart("a" * 200),)), "max_length is 96"),
    (dict(min_images=40, max_images=40), "40 pictures"),
    (dict(max_tokens=500), "at most"),
    (dict(max_tokens=3), "found 3"),
    (dict(image_size=(9, 9)), "9 x 9"),
    (dict(guidance=float("nan")), "guidance"),
    (dict(image=Filter(temperature=float("nan"))), "image.temperature"),
    (dict(mode="poem"), "poem"),
    (dict(seed=-1), "seed"),
    (dict(n=0), "n: expected"),
    (dict(parts=(CodesPart(np.full((2, 3), 99, np.int32)),)), "codes 0..23"),
]


def test_a_request_that_cannot_be_served_is_one_error_and_no_more(params):
    good = Request("good", (TextPart("abc"),), mode="image", n=2)
    bad = [dataclasses.replace(good, id=words, **change) for change, words in BAD]
    samples = list(engine(GRAMMARS["grid"], params).generate([*bad, good]))
    assert [sample.request.id for sample in samples] == [*(words for _, words in BAD), "good", "good"]
    for sample in samples[: len(BAD)]:
        assert sample.request.id in sample.error and sample.document is None
    assert all(sample.document is not None for sample in samples[len(BAD) :])


def test_broken_weights_are_named_not_sampled(params):
    nan = jax.tree.map(lambda p: p * np.nan, params)
    (sample,) = engine(GRAMMARS["grid"], nan).generate([Request("a", (TextPart("abc"),), mode="image")])
    assert "NaN" in sample.error and sample.document is None
