"""What a sample may depend on; and the cached loop computes the same as the teacher-forced forward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.language.document import CodesPart, Document, TextPart, TokensPart
from ar_unified.language.grammar import Grammar
from ar_unified.model.transformer import Transformer, init
from ar_unified.parallel.mesh import make_mesh
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.head import text_ids
from ar_unified.sampling.request import Request
from ar_unified.sampling.steps import FACTS
from tests.sampling.tiny import CONFIG, GRAMMARS, random_params

LENGTH = 192  # length of the caches, and of the forward passes that are compared
GREEDY = dict(text=Filter(0.0), image=Filter(0.0))


def image(grammar, seed=0, size=None):
    h, w = size or (grammar.layout.height, grammar.layout.width)
    return CodesPart(np.random.default_rng(seed).integers(0, 24, (h, w)).astype(np.int32))


def requests(grammar, **changes):
    """Ragged prompts, all modes, one to three contexts, mixed scales, seeds, filters and sizes."""
    size = (2, 3)
    hole = np.array([[5, 7, -1], [-1, -1, 9]], np.int32)
    rows = [
        Request("t2i", (TextPart("abc"),), mode="image", guidance=3.0, n=2, seed=5),
        Request("t2i plain", (TextPart("abc"),), mode="image", seed=5),
        Request("long", (TextPart("ponmlkjihgfedcba" * 2),), mode="image", guidance=1.5, image=Filter(0.7, 5)),
        Request("i2t", (image(grammar), TextPart("a")), mode="text", max_tokens=9, text=Filter(1.0, 0, 0.8), n=3),
        Request("story", (), turn=False, min_images=2, max_images=3, guidance=2.0, max_tokens=60, context="bos_boi"),
        Request("go on", (TextPart("abc"), image(grammar, 1), TextPart("de")), turn=False, max_tokens=35, seed=9),
        Request("two", (TextPart("h"),), mode="image", min_images=2, max_images=2, image_size=size, guidance=2.0),
        Request("short", (TextPart("b"),), mode="free", max_tokens=1),
        Request("both", (TextPart("ca"),), mode="interleaved", max_tokens=50, guidance=2.0, context="from_boi"),
        Request("edit", (image(grammar, 2), TextPart("p")), mode="image", guidance=3.0, image_guidance=1.2, n=2),
        Request("not", (TextPart("ab"),), mode="image", guidance=4.0, context="negative_prompt", negative_prompt="dd"),
        Request("alike", (image(grammar, 3), TextPart("o")), mode="image", guidance=2.0, context="image_only"),
        Request("hole", (TextPart("ab"),), mode="image", canvas=hole, image_size=size, guidance=2.0, min_images=2),
        Request("anew", (TextPart("abcd"),), mode="text", max_tokens=12, repetition_penalty=1.5, seed=4),
    ]
    return [dataclasses.replace(row, **changes) for row in rows]


def engine(grammar, params, config=CONFIG, **changes):
    """All engines here and in test_conversation have these shapes, so they share compiled programs."""
    return Engine(config, params, grammar, **(dict(batch_size=4, max_length=LENGTH) | changes))


def collect(samples):
    return {(sample.request.id, sample.index): sample for sample in samples}


@jax.jit
def _forward(params, tokens):
    model = Transformer.bind(CONFIG, params)
    positions = jnp.arange(tokens.shape[1])[None]
    return model.logits(model(tokens, positions, jnp.zeros_like(positions)))[0]


def forward_logits(params, tokens):
    """The teacher-forced forward pass of one sequence: f32 [n, V]. The sequence is padded at the end; because of
    causality, this does not change the logits before."""
    return np.asarray(_forward(params, np.pad(tokens, (0, LENGTH - len(tokens)))[None]))[: len(tokens)]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Compiling takes most of the time of these tests, so there is one bucket of prompts and one length of cache."""
    monkeypatch.setattr("ar_unified.sampling.prompts._SMALLEST", 64)
    monkeypatch.setattr("ar_unified.sampling.plan._SHARES", (1,))


def test_what_a_prompt_has_said_counts_also_where_others_of_other_lengths_begin_with_it(monkeypatch):
    """Several calls read prompts of several lengths, and each slot remembers the pieces of its own prompt."""
    monkeypatch.setattr("ar_unified.sampling.prompts._SMALLEST", 16)
    texts = ("abcdefgh", "ponmlkjihgfedcba" * 2, "hijklmnop", "bcde" * 12)
    asked = [
        Request(text + str(seed), (TextPart(text),), mode="text", max_tokens=4, repetition_penalty=5.0, seed=seed)
        for seed in range(6)
        for text in texts
    ]
    grammar, params = GRAMMARS["grid"], random_params()
    first = engine(grammar, params)
    together = collect(first.generate(asked))
    alone = (sample for each in asked for sample in first.generate([each]))
    assert all(together[one.request.id, 0].tokens.tolist() == one.tokens.tolist() for one in alone)


def watch(first):
    """A list that gets the logits [R, C, V] of all rows before each step; the engine then does one step at a time."""
    head, call, seen = np.asarray(first.params["head"]), first.call, []

    def one_by_one(function, *args):
        if function is not first._programs.decode:
            return call(function, *args)
        weights, state, halted, count = args
        pieces = []
        for i in range(int(count)):
            seen.append(np.asarray(state.hidden).reshape(*state.position.shape, -1) @ head.T)
            state, packed = call(function, weights, state, halted & (i == 0), np.int32(1))
            pieces.append(packed)
        rest = packed[:, len(pieces) :].at[:, -FACTS].set(sum(piece[:, -FACTS] for piece in pieces))
        return state, jnp.concatenate([*(piece[:, :1] for piece in pieces), rest], axis=1)

    first.call = one_by_one
    return seen


def contexts_of(grammar, plan, tokens):
    """The tokens that each context of a request has read if its sample so far is `tokens`; an independent
    implementation."""
    v, request = grammar.vocabulary, plan.request
    own = np.concatenate([plan.prompt, tokens])
    begins = np.flatnonzero(own == v.control("boi"))
    at_hand = own[begins[-1] :] if len(begins) else own[:0]
    bases = {
        "empty_prompt": [v.bos, v.control("eot")],
        "bos_boi": [v.bos],
        "from_boi": [],
        "negative_prompt": [v.bos, *grammar.text_codec.encode(request.negative_prompt), v.control("eot")],
    }
    images = own[own >= v.text_size]
    wanted = [request.context, "image_only"][: len(plan.prefixes) - 1]
    return [own, *(images if name == "image_only" else np.array([*bases[name], *at_hand]) for name in wanted)]


def test_every_sample_parses_and_keeps_its_request(grammar, params):
    asked = requests(grammar)
    found = collect(engine(grammar, params).generate(asked))
    assert set(found) == {(request.id, i) for request in asked for i in range(request.n)}
    for sample in found.values():
        request = sample.request
        assert not sample.error and sample.tokens[-1] == grammar.vocabulary.eos
        assert len(sample.tokens) <= (request.max_tokens or LENGTH)
        images = [part for part in sample.document.parts if isinstance(part, CodesPart)]
        least, most = request.images
        assert least <= len(images) <= most
        if request.mode == "image":
            assert len(images) == len(sample.document.parts)
        if request.image_size:
            assert {part.codes.shape for part in images} == {request.image_size}
    codes, canvas = found["hole", 0].document.parts[0].codes, found["hole", 0].request.canvas
    np.testing.assert_array_equal(codes[canvas >= 0], canvas[canvas >= 0])
    second = found["hole", 0].document.parts[1].codes  # the canvas is only for the first image
    assert (second[canvas >= 0] != canvas[canvas >= 0]).any()
    assert found["short", 0].finish_reason == "length" and found["t2i", 0].finish_reason == "eos"
    assert not np.array_equal(found["i2t", 0].tokens, found["i2t", 1].tokens)


@pytest.mark.exact
def test_a_sample_depends_on_weights_request_seed_and_index_only(grammar, params):
    """DESIGN §3.5. A sample has the same bits alone, permuted, in another slot, with other neighbours, resumed, or by
    another engine."""
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
    for run, count in zip(runs, (*[len(reference)] * 4, 3), strict=True):
        shared = [key for key in run if key in reference]
        assert len(shared) == count
        for key in shared:
            np.testing.assert_array_equal(run[key].tokens, reference[key].tokens, err_msg=str(key))
    other = collect(engine(grammar, random_params(1)).generate(asked))
    assert any(not np.array_equal(other[key].tokens, reference[key].tokens) for key in reference)


@pytest.mark.slow
@pytest.mark.exact
def test_a_mesh_gives_the_same_tokens(params):
    """Rows and heads are each divided over two devices: data 2 x tensor 2."""
    grammar = GRAMMARS["grid"]
    asked = [r for r in requests(grammar) if r.contexts < 3]
    one, two = (
        collect(engine(grammar, params, mesh=mesh).generate(asked))
        for mesh in (None, make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4]))
    )
    for key in one:
        np.testing.assert_array_equal(one[key].tokens, two[key].tokens, err_msg=str(key))


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_logits_equal_the_forward_in_every_context(grammar, contexts):
    """DESIGN §3.6, with the engine's own programs: at prefill, after insertion between other rows, across borders of
    chunks, in rows that change between text and images, and in unconditional contexts. The drawn token is the best of
    their mixture."""
    asked = [r for r in requests(grammar, **GREEDY, n=1) if r.contexts == contexts and r.repetition_penalty == 1]
    asked += [
        dataclasses.replace(r, id=f"{r.id} again") for r in asked
    ]  # more requests than slots, so some are inserted later
    params = init(CONFIG, jax.random.key(0))
    first = engine(grammar, params)
    seen, insert = watch(first), first._insert
    placed: list[tuple[int, dict]] = []  # slot -> which samples began at which step

    def inserted(state, shape, fresh, prompts):
        placed.append((len(seen), dict(fresh)))
        return insert(state, shape, fresh, prompts)

    first._insert = inserted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ar_unified.sampling.engine._chunk", lambda *_: 3)
        samples = collect(first.generate(asked))
    assert len(samples) == len(asked)
    checked = codes = 0
    for begin, fresh in placed:
        for slot, job in fresh.items():
            sample = samples[job.plan.request.id, 0]
            generated = sample.tokens
            for i in range(len(job.plan.given), len(generated)):
                found = seen[begin + i - len(job.plan.given)][slot]
                reads = contexts_of(grammar, job.plan, generated[:i])
                image = generated[i] >= grammar.vocabulary.image_offset
                expected = []
                for c, tokens in enumerate(reads):
                    if c and not image:
                        break
                    expected.append(forward_logits(params, tokens)[-1])
                    scale = np.abs(expected[-1]).max()
                    np.testing.assert_allclose(found[c], expected[-1], rtol=0, atol=1e-5 * scale)
                    checked += 1
                if image and job.plan.request.canvas is None:
                    s, s_i = job.plan.request.guidance, job.plan.request.image_guidance
                    if contexts == 2:
                        mixed = expected[1] + s * (expected[0] - expected[1])
                    elif contexts == 3:
                        own, other, images = expected
                        mixed = other + s_i * (images - other) + s * (own - images)
                    else:
                        mixed = expected[0]
                    mixed = mixed[grammar.vocabulary.image_offset :][:24]
                    drawn = generated[i] - grammar.vocabulary.image_offset
                    assert mixed[drawn] >= mixed.max() - 1e-4, (job.plan.request.id, i)
                    codes += 1
    assert checked > 15 and codes > 2


def test_scores_are_those_of_the_forward(params):
    grammar = GRAMMARS["rows"]
    pair = Document.of((TextPart("abc"), image(grammar), TextPart("de")), prompt=1)
    plain = Document.of((TextPart("h"), image(grammar, 1)))
    ask = Request("ask", (TextPart("ab"),), turn=False), (TextPart("cd"),)
    answered = Request("ask", (TextPart("ab"),)), (TokensPart((3, 4, 5)),)
    found = engine(grammar, params).score([pair, plain, ask, answered])
    whole = [grammar.encode(pair).tokens, grammar.encode(plain).tokens]
    whole += [np.array([grammar.vocabulary.bos, 0, 1, 2, 3, grammar.vocabulary.eos])]
    whole += [
        np.array([grammar.vocabulary.bos, 0, 1, grammar.vocabulary.control("eot"), 3, 4, 5, grammar.vocabulary.eos])
    ]
    for score, tokens, counts in zip(found, whole, ([19, 2], [1, 19], [2], [3]), strict=True):
        log_p = np.asarray(jax.nn.log_softmax(forward_logits(params, tokens)))
        own = log_p[np.arange(len(tokens) - 1), tokens[1:]]
        assert [part.tokens for part in score.parts] == counts and score.tokens == sum(counts)
        np.testing.assert_allclose(score.eos.log_likelihood, own[-1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(score.log_likelihood, own[-1 - sum(counts) : -1].sum(), rtol=1e-4)
    best = int(forward_logits(params, whole[2][:3])[-1].argmax())
    (greedy,) = engine(grammar, params).score([(ask[0], (TokensPart((best,)),))]) if best < 16 else (None,)
    assert greedy is None or greedy.parts[0].greedy


def test_ids_behind_the_used_ones_are_neither_drawn_nor_counted(params):
    """If the unused rows of a head would have the largest logits, the results are still the same bits as without these
    rows."""
    grid = GRAMMARS["grid"]
    grammar = Grammar(dataclasses.replace(grid.vocabulary, rest=2), grid.layout, grid.text_codec)
    used, head = grammar.vocabulary.used, params["head"]
    assert used == grid.vocabulary.rest_offset + 2 < text_ids(grammar)
    asked = [r for r in requests(grammar, text=Filter(1.0, 9, 0.8)) if r.contexts == 1]
    pair = Document.of((TextPart("abc"), image(grammar), TextPart("de")), prompt=1)
    found = {}
    for name, rows in (("none", jnp.zeros_like(head[used:])), ("loud", 100 * params["embedding"][used:])):
        model = engine(grammar, params | {"head": jnp.concatenate([head[:used], rows])})
        samples = collect(model.generate(asked))
        found[name] = {key: sample.tokens for key, sample in samples.items()}, model.score([pair])
    tokens, (score,) = found["none"]
    assert max(map(np.max, tokens.values())) < used
    jax.tree.map(np.testing.assert_array_equal, tokens, found["loud"][0])
    assert found["loud"][1] == [score]
    ids = grammar.encode(pair).tokens
    log_p = np.asarray(
        jax.nn.log_softmax(forward_logits(params, ids)[:, :used])
    )  # cut, because in a full softmax the unused ids have a probability, too
    np.testing.assert_allclose(score.eos.log_likelihood, log_p[-2, ids[-1]], rtol=1e-5, atol=1e-5)


def test_a_score_by_side_is_of_the_softmax_of_each_tokens_own_side(params):
    """An answer is greedy if its id is the likeliest of its side, although here an image code is likelier."""
    grammar = GRAMMARS["grid"]
    first = grammar.vocabulary.image_offset
    pair = Document.of((TextPart("abc"), image(grammar)), prompt=1)
    ids = grammar.encode(pair).tokens
    logits, where = forward_logits(params, ids)[:-1], np.arange(len(ids) - 1)
    sides = [jax.nn.logsumexp(side, axis=-1) for side in (logits[:, :first], logits[:, first:])]
    log_z = {"joint": jax.nn.logsumexp(logits, axis=-1), "by_side": np.where(ids[1:] < first, *sides)}
    ask = Request("a", (TextPart("ab"),))
    after = forward_logits(params, grammar.prompt(ask.turns))[-1]
    likeliest = ask, (TokensPart((int(after[:first].argmax()),)),)
    assert after.argmax() >= first
    for softmax, greedy in (("by_side", True), ("joint", False)):
        score, of_text = engine(grammar, params, softmax=softmax).score([pair, likeliest])
        expected = logits[where, ids[1:]] - np.asarray(log_z[softmax])
        np.testing.assert_allclose(score.log_likelihood, expected[-1 - score.tokens : -1].sum(), rtol=1e-4)
        np.testing.assert_allclose(score.eos.log_likelihood, expected[-1], rtol=1e-4, atol=1e-4)
        assert of_text.parts[0].greedy == greedy
    with pytest.raises(ValueError, match="softmax: expected one of joint, by_side; found 'both'"):
        engine(grammar, params, softmax="both")


def test_a_rounded_cache_moves_the_logits_a_little():
    """All caches read the same tokens: a prompt and the codes of a canvas. The distance of a step's logits to those of
    the full cache, relative to their norm, is bounded; at most 0.27% and 1.4% were measured."""
    params, found = init(CONFIG, jax.random.key(0)), {}
    canvas = np.array(
        [[-1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 23]], np.int32
    )  # The -1 is one code to draw, because a complete canvas would be part of the prompt.
    asked = Request("a", (TextPart("abcdefghijkl"),), mode="image", guidance=2.0, canvas=canvas, **GREEDY)
    for name in (None, "int8", "float8_e4m3fn"):
        first = engine(GRAMMARS["rows"], params, kv_dtype=name)
        seen = watch(first)
        (sample,) = first.generate([asked])
        found[name] = sample.tokens, np.stack([each[0] for each in seen[: len(sample.tokens) - 3]])
    tokens, whole = found.pop(None)
    assert len(whole) > 14
    for name, (same, rounded) in found.items():
        np.testing.assert_array_equal(same, tokens)
        moved = np.linalg.norm(rounded - whole, axis=-1) / np.linalg.norm(whole, axis=-1)
        assert 0 < moved.max() < {"int8": 0.006, "float8_e4m3fn": 0.03}[str(name)]


def test_what_goes_on_is_what_follows_the_prompt(params):
    grammar = GRAMMARS["grid"]
    (request,) = (r for r in requests(grammar) if r.id == "go on")
    (sample,) = engine(grammar, params).generate([request])
    whole = grammar.parse(np.concatenate([grammar.prompt(request.turns), sample.tokens]))
    text = "".join(part.text if isinstance(part, TextPart) else "#" for part in whole.parts)
    answer = "".join(part.text if isinstance(part, TextPart) else "#" for part in sample.document.parts)
    assert text == "abc#de" + answer and answer


def test_no_request_compiles_another_program(params):
    first = engine(GRAMMARS["grid"], params)
    list(first.generate([Request("a", (TextPart("abc"),), mode="image", guidance=2.0)]))
    programs = first._programs.prefill, first._programs.insert, first._programs.decode
    before = [program._cache_size() for program in programs]
    changed = Request("b", (TextPart("p"),), mode="image", guidance=7.0, seed=3, n=2, image=Filter(0.5, 3, 0.5))
    list(first.generate([changed]))
    assert [program._cache_size() for program in programs] == before


def test_a_stop_ends_the_text_before_it(params):
    grammar = GRAMMARS["grid"]
    request = Request("a", (TextPart("h"),), mode="text", max_tokens=40)
    (free,) = engine(grammar, params).generate([request])
    text = free.document.parts[0].text
    for stop in (text[7:9], tuple(grammar.text_codec.encode(text[7:9]))):
        (cut,) = engine(grammar, params).generate([dataclasses.replace(request, stop=(stop,))])
        assert not cut.error and cut.finish_reason == "stop"
        assert cut.document.parts[0].text == text[: text.index(text[7:9])]
        np.testing.assert_array_equal(cut.tokens, free.tokens[: len(cut.tokens)])


BAD = [
    (dict(parts=(TextPart("a" * 200),)), "max_length is 192"),
    (dict(min_images=40, max_images=40), "40 images"),
    (dict(max_tokens=500), "at most"),
    (dict(max_tokens=3), "found 3"),
    (dict(image_size=(9, 9)), "9 x 9"),
    (dict(guidance=float("nan")), "guidance"),
    (dict(context="nothing"), "context: expected one of"),
    (dict(context="negative_prompt"), "negative_prompt: expected a text"),
    (dict(image_guidance=2.0, context="image_only"), "context: expected another context"),
    (dict(repetition_penalty=0.0), "repetition_penalty"),
    (dict(stop=("",)), "stop: expected"),
    (dict(stop=((99,),)), "text pieces 0..15"),
    (dict(canvas=np.zeros((2, 3), np.int64)), "canvas: expected codes int32"),
    (dict(canvas=np.full((2, 3), 24, np.int32)), "or -1 for a code to sample"),
    (dict(parts=(TokensPart((500,)),)), "ids 0..127"),
    (dict(parts=(TokensPart((20, 20)),)), "expected"),
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
    failed = [sample for sample in samples if sample.error]
    assert [sample.request.id for sample in failed] == [words for _, words in BAD]
    for sample in failed:
        assert sample.request.id in sample.error and sample.document is None
    assert [sample.request.id for sample in samples if not sample.error] == ["good", "good"]


def test_broken_weights_are_named_not_sampled(params):
    nan = jax.tree.map(lambda p: p * np.nan, params)
    samples = list(engine(GRAMMARS["grid"], nan).generate([Request("a", (TextPart("abc"),), mode="image", n=6)]))
    assert len(samples) == 6 and all("NaN" in sample.error and sample.document is None for sample in samples)
