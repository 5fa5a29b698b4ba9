"""A conversation with a kept cache equals the forward pass, reads only new tokens, and does not depend on other
conversations."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ar_unified.language.document import Document, TextPart, Turn
from ar_unified.language.layouts import WITH_IMAGES
from ar_unified.model.transformer import init
from ar_unified.sampling import conversation as conversations
from ar_unified.sampling.conversation import Conversation, say_all
from ar_unified.sampling.plan import without_text
from ar_unified.sampling.request import Request, RequestError
from tests.language.small import grammar_of
from tests.sampling.test_engine import LENGTH, _forward, contexts_of, engine, image, watch
from tests.sampling.tiny import CONFIG, GRAMMARS


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Compiling takes most of the time of these tests, so there is one bucket of prompts."""
    monkeypatch.setattr("ar_unified.sampling.prompts._SMALLEST", 64)
    monkeypatch.setattr("ar_unified.sampling.conversation.CHUNK", 12)


def talking(grammar, params, **changes):
    return engine(grammar, params, **changes)


def script(grammar, seed=0):
    """The parts and settings of six turns, with images in questions and answers, with and without guidance."""
    words = dict(mode="text", max_tokens=7, seed=seed)
    draws = dict(mode="image", image_size=(2, 3), seed=seed, guidance=2.0)
    shown = image(grammar, seed, (2, 3))
    return [
        ((TextPart("abc"),), draws | dict(context="image_only")),
        ((TextPart("de"),), words),
        ((shown, TextPart("f")), words),
        ((TextPart("k"), shown), draws),
        ((), dict(mode="interleaved", max_tokens=20, max_images=1, seed=seed)),
        ((TextPart("po"),), draws | dict(context="image_only")),
    ]


def watch_reads(first):
    """A list that gets an array [R * C] for each call: the numbers of tokens by which it extended the cache's rows."""
    call, reads = first.call, []
    read_on = conversations._programs(first.config, first.grammar, first.mesh).read_on

    def watched(function, *args):
        if function is read_on:
            reads.append(args[-1])
        return call(function, *args)

    first.call = watched
    return reads


@pytest.mark.parametrize(
    "kind", [pytest.param("rows", marks=pytest.mark.exact), pytest.param("grid", marks=pytest.mark.exact_later)]
)
def test_six_turns_compute_what_the_forward_does_and_read_what_is_new(kind):
    grammar = GRAMMARS[kind]
    params = init(CONFIG, jax.random.key(0))
    first = talking(grammar, params)
    seen, reads = watch(first), watch_reads(first)
    talk, checked = Conversation(first), {1: 0, 2: 0}
    images_read = 0  # tokens read by the context that has only images
    for parts, settings in script(grammar):
        plan, before, begin = talk.plan(Request("a", parts, **settings)), len(talk.tokens), len(seen)
        reads.clear()
        sample = talk.say(parts, **settings)

        # The new tokens: the end of the last answer, the turn with its end, and the known beginning of the answer.
        turn = len(grammar.parts(parts)) + 1
        new = [turn + len(plan.given) + 1]  # 1 for the <eos> of the last answer, or for <bos>
        if len(plan.prefixes) > 1:
            whole = len(plan.prefixes[1])
            new.append(whole - images_read if settings.get("context") == "image_only" else whole)
        assert list(talk.prefilled) == new
        assert sum(reads).tolist() == [*new, *[0] * (first.batch_size * len(new) - len(new))]
        if settings.get("context") == "image_only":
            images_read = len(without_text(grammar, talk.tokens[:-1]))

        np.testing.assert_array_equal(talk.tokens, grammar.encode(Document(talk.turns)).tokens)
        assert len(talk.tokens) == before + turn + len(sample.tokens) + (not before)
        for i in range(len(plan.given), len(sample.tokens)):
            found = seen[begin + i - len(plan.given)][0]
            drawn_image = sample.tokens[i] >= grammar.vocabulary.image_offset
            for c, tokens in enumerate(contexts_of(grammar, plan, sample.tokens[:i])):
                if c and not drawn_image:
                    break
                tokens = np.pad(tokens, (0, LENGTH - len(tokens)))[None], len(tokens) - 1
                expected = np.asarray(_forward(params, tokens[0]))[tokens[1]]
                np.testing.assert_allclose(found[c], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
                checked[c + 1] += 1
    assert checked[1] > 40 and checked[2] >= 18 and len(talk.turns) == 12


def talk_through(first, scripts, together):
    """Conversations by seed, in one batch turn by turn, or one at a time. Every second one has a system turn."""
    talks = {seed: Conversation(first, [Turn("system", (TextPart("ok"),))] if seed % 2 else []) for seed in scripts}
    for i in range(6):
        now = [
            (talk, Request(str(seed), parts, **settings))
            for seed, talk in talks.items()
            for parts, settings in scripts[seed][i : i + 1]
        ]
        for batch in [now] if together else [[each] for each in now]:
            assert [sample.error for sample in say_all(batch)] == [""] * len(batch)
    return talks


@pytest.mark.exact
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_alone_is_in_a_batch(params, kv_dtype):
    """Results and cache are equal bit for bit, for five conversations on four slots, with and without guidance
    together."""
    first = talking(GRAMMARS["rows"], params, kv_dtype=kv_dtype)
    scripts = {seed: script(first.grammar, seed)[seed % 2 * 2 :] for seed in range(5)}
    if kv_dtype:  # without guidance, all are in one pool
        scripts = {seed: [(parts, each | dict(guidance=1.0)) for parts, each in scripts[seed][:3]] for seed in scripts}
    alone, batch = (talk_through(first, scripts, together) for together in (False, True))
    for seed, talk in alone.items():
        np.testing.assert_array_equal(talk.tokens, batch[seed].tokens)
        assert talk.turns == batch[seed].turns and talk.prefilled == batch[seed].prefilled
        kept, other = talk._kept["", ""], batch[seed]._kept["", ""]
        assert len(kept.tokens) == len(talk.tokens) - 1
        for one, two in zip(jax.tree.leaves(kept.cache), jax.tree.leaves(other.cache), strict=True):
            n = len(kept.tokens)
            np.testing.assert_array_equal(np.asarray(one)[:, :, :n], np.asarray(two)[:, :, :n])
    assert len({talk.tokens.tobytes() for talk in alone.values()}) == 5


@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_a_turn_goes_on_as_a_prompt_of_all_turns_is_written(kind):
    grammar = grammar_of(kind)
    talk = Conversation(SimpleNamespace(grammar=grammar), [Turn("system", (TextPart("ab"),))])
    said = *talk.turns, Turn("user", (TextPart("b"),)), Turn("assistant", (TextPart("c"),))
    asked = Turn("user", (TextPart("ab"),))
    np.testing.assert_array_equal(talk._prompt(Request("a", said[1].parts)), grammar.prompt(said[:2]))
    talk.tokens = grammar.history(said)
    np.testing.assert_array_equal(talk._prompt(Request("a", asked.parts)), grammar.prompt([*said, asked]))


def test_a_stop_is_not_said(params):
    grammar = GRAMMARS["grid"]
    ask = dict(mode="text", max_tokens=40)
    text = Conversation(talking(grammar, params)).say((TextPart("h"),), **ask).document.parts[0].text
    talk = Conversation(talking(grammar, params))
    sample = talk.say((TextPart("h"),), stop=(text[7:9],), **ask)
    assert sample.finish_reason == "stop" and sample.request.turns == talk.turns[:1]
    np.testing.assert_array_equal(talk.tokens, grammar.encode(Document(talk.turns)).tokens)
    before = len(talk.tokens)
    talk.say((TextPart("b"),), **ask)
    assert talk.prefilled == (
        before - (before - 1) + 2,
    )  # 1 for the <eos> in place of the stop, 2 for the turn and its end


def test_what_cannot_be_served_leaves_the_conversation_as_it_was(params):
    first = talking(GRAMMARS["grid"], params)
    talk, other = Conversation(first), Conversation(first)
    talk.say((TextPart("abc"),), mode="image")
    turns, tokens = talk.turns, talk.tokens
    for parts, settings, words in [
        ((TextPart("a" * 180),), dict(mode="image"), "raise max_length, or begin another conversation"),
        ((TextPart("a" * 180),), dict(mode="text"), "begin another conversation"),
        ((TextPart("a"),), dict(n=2), "adds one answer"),
        ((image(first.grammar, size=(9, 9)),), {}, "2 x 3"),
        ((TextPart("a"),), dict(guidance=float("nan")), "guidance"),
    ]:
        bad, good = say_all([(talk, Request("a", parts, **settings)), (other, Request("b", (), mode="image"))])
        assert words in bad.error and not good.error
        with pytest.raises(RequestError, match=words):
            talk.say(parts, **settings)
    assert talk.turns == turns and talk.tokens is tokens
    with pytest.raises(ValueError, match="different conversations"):
        say_all([(talk, Request("a", ())), (talk, Request("b", ()))])
    first.params = jax.tree.map(lambda p: p * np.nan, params)  # with other weights nothing is kept
    with pytest.raises(RequestError, match="NaN"):
        talk.say((TextPart("a"),), mode="image")
    assert talk.prefilled[0] == len(tokens) + 3 and talk.tokens is tokens
    first.params = params
    talk.say((TextPart("a"),), mode="image")
    assert talk.prefilled[0] == 4
