"""Decodes several positions of an image at once, and gives the same tokens as decoding one by one.

Noise depends only on (seed, sample, position), so a token is a function of the tokens before it. A step guesses the
next w - 1 tokens of a row. One forward pass reads the known token and these guesses, and the step draws at each of the
w positions. The first draw is right; each further draw is right if all guesses before it equal the tokens that were
drawn there. (This is Jacobi iteration as in "Accelerating Auto-regressive Text-to-Image Generation with Training-free
Speculative Jacobi Decoding", arXiv 2410.01699; here all draws at a position have the same noise, so a guess is either
right or wrong and no distribution changes.) So a step gives between 1 and w tokens. In exact arithmetic, they equal the
tokens of `steps.step`.

A step also draws tokens after its first wrong guess. The next step uses these draws as guesses. For other positions,
`pairs.py` looks up the code before and the code above: the guess is the code that last followed the same pair in
earlier images. If the table has no such code, the guess is the code above. Tokens that the grammar forces or a canvas
gives are known, so they need no guess. Text is not guessed: if all rows are in text, `steps.step` takes the step.
The guesses of a row end where one of its contexts would not write to the next place, such as after an image.

Wrong guesses leave entries in the cache after the row's end. They are overwritten before anything reads them.

Axes: R slots, C contexts, w positions (the window), n = w - 1 guesses, D model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_unified.language.grammar import Grammar
from ar_unified.model.config import TransformerConfig
from ar_unified.model.transformer import Transformer
from ar_unified.sampling import decoding, guidance, pairs, steps
from ar_unified.sampling.drafts import Drafts
from ar_unified.sampling.head import Weights, code_logits, text_logits
from ar_unified.sampling.steps import CHUNK, State


def decode_chunk(
    config: TransformerConfig,
    grammar: Grammar,
    width: int,
    weights: Weights,
    state: State,
    halted: Array,
    count: Array,
    learned: Array,
) -> tuple[State, Array]:
    """Takes `count` (at most CHUNK) more steps of every row, with 1 to `width` tokens each. It stops early once all
    rows have ended.

    Arguments and results are those of `steps.decode_chunk`, but the tokens are int32 [R, CHUNK * width]. The drafts of
    `state` must have this width. learned: the table of `pairs.Pairs`.
    """
    machine, R = grammar.automaton, len(halted)
    state = state._replace(automaton=machine.halt(state.automaton, halted))
    keys = decoding.row_keys(state.rows.seed, state.rows.sample)
    tokens = jnp.full((R, CHUNK * width), grammar.vocabulary.pad, jnp.int32)

    def going(carry: Any) -> Array:
        i, state, *_ = carry
        return (i < count) & ~jnp.all(machine.done(state.automaton))

    def guessing(carry: Any) -> Array:
        state = carry[1]
        image = machine.in_image(state.automaton) | (steps.known(grammar, state.automaton, state.rows.canvas) >= 0)
        return jnp.any(image & ~machine.done(state.automaton))

    def written(carry: Any, new: Array, state: State, many: Array) -> Any:
        i, before, tokens, begin, taken = carry
        k = jnp.arange(new.shape[1])
        at = jnp.where(k < many[:, None], begin[:, None] + k, tokens.shape[1])
        tokens = tokens.at[jnp.arange(R)[:, None], at].set(new, mode="drop")
        return i + 1, state, tokens, begin + many, taken + ~machine.done(before.automaton)

    def several(carry: Any) -> Any:
        return written(carry, *step(config, grammar, width, weights, carry[1], keys, learned))

    def one(carry: Any) -> Any:
        token, state = steps.step(config, grammar, weights, carry[1], keys)
        return written(carry, token[:, None], state, jnp.ones(R, jnp.int32))

    def both(carry: Any) -> Any:
        carry = jax.lax.while_loop(lambda carry: going(carry) & guessing(carry), several, carry)
        return jax.lax.while_loop(lambda carry: going(carry) & ~guessing(carry), one, carry)

    zeros = jnp.zeros(R, jnp.int32)
    _, state, tokens, _, taken = jax.lax.while_loop(going, both, (jnp.int32(0), state, tokens, zeros, zeros))
    return steps.placed(state), steps.packed(grammar, state, tokens, taken)


def step(
    config: TransformerConfig,
    grammar: Grammar,
    width: int,
    weights: Weights,
    state: State,
    keys: Array,
    learned: Array,
) -> tuple[Array, State, Array]:
    """Takes a step of every row. Returns tokens int32 [R, w], the state, and how many of the tokens count, int32
    [R]."""
    machine, rows = grammar.automaton, state.rows
    assert state.drafts is not None
    drafts, n = state.drafts, width - 1
    R, C = state.position.shape
    every = jnp.arange(R)

    def behind(first: Array, more: Array) -> Array:
        return jnp.concatenate([first[:, None], more], axis=1)

    machines = jax.tree.map(behind, state.automaton, drafts.automaton)
    positions, guesses = behind(state.position, drafts.position), drafts.tokens
    hidden = behind(state.hidden, drafts.hidden).reshape(R, C, width, -1)
    token, broken, image = draw(grammar, weights, state, machines, positions, guesses, hidden, keys)

    # A draw is right if all guesses before it equal what was drawn. A draw from broken logits ends the row.
    right = (token[:, :n] == guesses) & ~broken[:, :n]
    last = jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)

    def at_last(x: Array) -> Array:
        return x[every, last]

    before, final, bad = jax.tree.map(at_last, machines), at_last(token), at_last(broken)
    after = machine.halt(machine.advance(before, final), bad)
    event = machine.event(before, final)
    writes, position = guidance.advance(event, at_last(positions), rows.start, rows.resets)
    done = machine.done(after)

    counts = jnp.arange(width) <= last[:, None]
    where = jnp.where(counts & machine.in_image(machines), machine.code(machines), drafts.codes.shape[1])
    codes = drafts.codes.at[every[:, None], where].set(token - grammar.vocabulary.image_offset, mode="drop")
    # The draws at positions after the last known token, in order.
    place = last[:, None] + 1 + jnp.arange(n)
    inside = jnp.minimum(place, n)
    again = jnp.where((place <= n) & jnp.take_along_axis(image, inside, 1), jnp.take_along_axis(token, inside, 1), -1)
    drafts = guess(grammar, state, after, position, writes, again, codes, learned)

    model = Transformer.bind(config, weights.layers)
    fed = jnp.concatenate([final[:, None], jnp.maximum(drafts.tokens, 0)], axis=1)
    start = jnp.where(done[:, None], 0, writes).reshape(-1)
    read, cache = model.extend(jnp.repeat(fed, C, axis=0), state.cache, start, rows.adapters)
    piece = jnp.where(counts & (token < grammar.vocabulary.text_size), token, state.seen.shape[1])
    return (
        token,
        State(
            rows=rows,
            automaton=after,
            position=jnp.where(done[:, None], 0, position),
            hidden=read[:, 0],
            cache=cache,
            seen=state.seen.at[every[:, None], piece].set(True, mode="drop"),
            broken=state.broken | bad,
            drafts=drafts._replace(hidden=read[:, 1:]),
        ),
        last + 1,
    )


def draw(
    grammar: Grammar,
    weights: Weights,
    state: State,
    machines: Any,
    positions: Array,
    guesses: Array,
    hidden: Array,
    keys: Array,
) -> tuple[Array, Array, Array]:
    """Draws at each position of the window as `steps.draw` does, on the assumption that the guesses before it are
    right.

    Args:
        machines: automata [R, w].
        positions: int32 [R, w, C].
        guesses: int32 [R, n], -1 from the first missing guess on.
        hidden: [R, C, w, D].

    Returns:
        Tokens int32 [R, w], whether their logits were NaN, and whether they were drawn as codes, bool [R, w] each.
    """
    machine, vocabulary, rows = grammar.automaton, grammar.vocabulary, state.rows
    R, C, width, _ = hidden.shape
    flat = jax.tree.map(lambda x: x.reshape(-1), machines)
    there = jnp.concatenate([jnp.ones((R, 1), bool), guesses >= 0], axis=1)

    def repeated(x: Array) -> Array:
        return jnp.repeat(x, width, axis=0)

    forced = steps.known(grammar, flat, repeated(rows.canvas)).reshape(R, width)
    drawn = (forced < 0) & there
    image = machine.in_image(flat).reshape(R, width)

    def codes() -> tuple[Array, Array]:
        states = jnp.swapaxes(hidden, 1, 2).reshape(R * width, C, -1)
        logits = code_logits(grammar, weights, states, repeated(rows.adapter))
        logits = guidance.mix(logits, repeated(rows.weights))
        filters = jax.tree.map(repeated, rows.filters.at(jnp.ones(R, bool)))
        active, at = (drawn & image).reshape(-1), positions[..., 0].reshape(-1)
        token, broken = decoding.choose(logits, None, active, filters, repeated(keys), at)
        return vocabulary.image_offset + token.reshape(R, width), broken.reshape(R, width)

    # A row draws at most one text piece in the window, because text is not guessed. The known tokens before it may be
    # text pieces, too.
    word_at = jnp.argmax(drawn & ~image, axis=1)
    at_word = jnp.arange(R), word_at

    def words() -> tuple[Array, Array]:
        said = (jnp.arange(width - 1) < word_at[:, None]) & (guesses >= 0) & (guesses < vocabulary.text_size)
        pieces = jnp.where(said, guesses, state.seen.shape[1])
        seen = state.seen.at[jnp.arange(R)[:, None], pieces].set(True, mode="drop")
        logits = text_logits(weights, jnp.swapaxes(hidden, 1, 2)[at_word][:, 0], rows.adapter)
        logits = decoding.penalize(logits, seen, rows.penalty)
        allowed = machine.allowed(jax.tree.map(lambda x: x[at_word], machines), logits.shape[1])
        filters = rows.filters.at(jnp.zeros(R, bool))
        active = jnp.any(drawn & ~image, axis=1)
        token, broken = decoding.choose(logits, allowed, active, filters, keys, positions[at_word][:, 0])
        empty = jnp.zeros((R, width), jnp.int32)
        return empty.at[at_word].set(token), empty.astype(bool).at[at_word].set(broken)

    def where_any(needed: Array, function: Any) -> tuple[Array, Array]:
        nothing = jnp.zeros((R, width), jnp.int32), jnp.zeros((R, width), bool)
        return jax.lax.cond(jnp.any(needed), function, lambda: nothing)

    with jax.named_scope("words"):
        word, bad_word = where_any(drawn & ~image, words)
    with jax.named_scope("codes"):
        code, bad_code = where_any(drawn & image, codes)
    token = jnp.where(drawn, jnp.where(image, code, word), forced)
    return token, bad_code | bad_word, drawn & image


def guess(
    grammar: Grammar,
    state: State,
    after: Any,
    position: Array,
    writes: Array,
    again: Array,
    codes: Array,
    learned: Array,
) -> Drafts:
    """The guesses for the next positions; the model has not read them yet.

    Args:
        after: the automaton's state after the known tokens, [R] each.
        position, writes: int32 [R, C], from `guidance.advance`.
        again: int32 [R, n], the tokens that the last step drew at these positions; -1: none.
        codes: as in `Drafts`.
        learned: the table of `pairs.Pairs`.
    """
    machine, rows, offset = grammar.automaton, state.rows, grammar.vocabulary.image_offset
    every = jnp.arange(len(writes))

    def one(carry: Any, drawn: Array) -> Any:
        at, position, codes, writes, going = carry
        forced, image = steps.known(grammar, at, rows.canvas), machine.in_image(at)
        place = machine.code(at)
        near = jnp.stack([place - 1, place - machine.columns(at)], axis=1)  # the places of the codes before and above
        near = jnp.where(near >= 0, jnp.take_along_axis(codes, near, axis=1, mode="clip"), -1)
        code = pairs.likely(learned[pairs.place(near[:, 0], near[:, 1])], near[:, 0], near[:, 1], jnp)
        token = jnp.where(forced >= 0, forced, jnp.where(drawn >= 0, drawn, offset + code))
        going &= ~machine.done(at) & ((forced >= 0) | image)
        written, behind = guidance.advance(machine.event(at, token), position, rows.start, rows.resets)
        going &= jnp.all(written == writes + 1, axis=1)
        codes = codes.at[every, jnp.where(image, place, codes.shape[1])].set(token - offset, mode="drop")
        at = machine.advance(at, token)
        token = jnp.where(going, token, -1)
        return (at, behind, codes, written, going), (token, at, behind)

    begin = after, position, codes, writes, jnp.ones(len(writes), bool)
    found = jax.lax.scan(one, begin, again.T)[1]
    tokens, machines, positions = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)
    nothing = jnp.zeros((0, 0, 0))  # `step` fills in the hidden states
    return Drafts(tokens, nothing, machines, positions, codes)
