"""The automaton allows exactly what the grammar can still parse within the budget, from any legal prompt.

Axes: `B` rows, `P` prompt positions, `T` steps, `V` vocabulary.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.language.automaton import FREE, IMAGE, TEXT, Automaton
from ar_unified.language.document import CodesPart, Document, TextPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import TEXT_ALONE, fixed_grid, sized_rows
from ar_unified.language.vocabulary import Role, Vocabulary


class Letters:
    """Five letters, one id each."""

    def encode(self, text):
        return ["abcde".index(letter) for letter in text]

    def decode(self, ids):
        return "".join("abcde"[i] for i in ids)


GRID = Grammar(Vocabulary(5, 3), fixed_grid(1, 2), Letters())
ROWS = Grammar(Vocabulary(5, 3, size_tokens=3), sized_rows(2, 3), Letters())
both = pytest.mark.parametrize("grammar", [GRID, ROWS], ids=["grid", "rows"])


def padded(rows, pad):
    """int32 [B, P] and lengths [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    out = np.full((len(rows), lengths.max()), pad, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, lengths


# ---- exactness: against the language, written out ----------------------------------------------


def language(grammar, budget, mode, least, most, height, width):
    """Every continuation of an empty prompt that fits; text piece 0 and code 0 stand for all of theirs."""
    v, layout = grammar.vocabulary, grammar.layout
    sizes = itertools.product(range(1, layout.height + 1), range(1, layout.width + 1))
    sizes = [(h, w) for h, w in sizes if height in (0, h) and width in (0, w)] if layout.sized else [(1, 2)]
    blocks = [
        grammar.encode(Document.of((CodesPart(np.zeros(size, np.int32)),)))[1:-1].tolist()
        for size in sizes
        if mode != TEXT
    ]
    words = [[0]] if mode != IMAGE else []
    found, least = [], max(least, 1) if mode == IMAGE else least

    def extend(tokens, images):
        if images >= least and len(tokens) < budget:
            found.append((*tokens, v.eos))
        for word in words:
            if len(tokens) + 2 <= budget:
                extend(tokens + word, images)
        for block in blocks:
            if images < most and len(tokens) + len(block) < budget:
                extend(tokens + block, images + 1)

    extend([], 0)
    return found


@both
def test_allowed_is_exactly_what_can_still_be_finished(grammar):
    v, automaton = grammar.vocabulary, grammar.automaton
    rows, requests, expected = [], [], []
    block = grammar.image_tokens(1, 2)
    for budget, mode, (least, most), (height, width) in itertools.product(
        (1, 2, block, block + 1, block + 3, 2 * block + 1, 2 * block + 2),
        (TEXT, IMAGE, FREE),
        ((0, 2), (1, 1), (0, 0), (2, 3)),
        ((0, 0), (0, 2), (2, 0), (1, 2)) if grammar.layout.sized else ((0, 0),),
    ):
        strings = language(grammar, budget, mode, least, most, height, width)
        nexts = {}
        for string in strings:
            for i in range(len(string)):
                nexts.setdefault(string[:i], set()).add(string[i])
        rows += strings
        requests += [(budget, mode, least, most, height, width)] * len(strings)
        expected += [[nexts[string[:i]] for i in range(len(string))] for string in strings]
    assert len(rows) > 100

    tokens, lengths = padded(rows, v.pad)
    prompt = np.tile(grammar.unconditional, (len(rows), 1))
    start = automaton.init(prompt, np.full(len(rows), 2), *np.array(requests, np.int32).T)
    assert np.all(automaton.fits(start, np.array(requests)[:, 2]))

    @jax.jit
    def walk(state, tokens):  # tokens [T, B]
        return jax.lax.scan(lambda s, t: (automaton.advance(s, t), automaton.allowed(s)), state, tokens)

    state, allowed = walk(start, tokens.T)
    assert np.all(automaton.done(state))
    allowed = np.asarray(allowed).transpose(1, 0, 2)
    for row, sets in enumerate(expected):
        for i, ids in enumerate(sets):
            want = np.zeros(v.size, bool)
            want[list(ids)] = True
            want[: v.text_size] = 0 in ids
            want[v.image_offset : v.image_offset + v.codebook_size] = v.image_offset in ids
            found = np.flatnonzero(allowed[row, i])
            assert found.tolist() == np.flatnonzero(want).tolist(), (requests[row], rows[row][:i])


# ---- random logits: everything emitted parses --------------------------------------------------


def prompts(grammar, rng, rows):
    """Prompts that end anywhere legal, in the middle of a picture included."""
    layout = grammar.layout
    out = []
    for _ in range(rows):
        sides = [rng.integers(1 if layout.sized else n, n + 1) for n in (layout.height, layout.width)]
        codes = CodesPart(rng.integers(0, 3, sides).astype(np.int32))
        parts = [TextPart("abc"), codes, codes, TextPart("de")][rng.integers(3) :]
        tokens = grammar.encode(Document.of(tuple(parts), prompt=[None, 0, 1][rng.integers(3)]))
        out.append(tokens[: rng.integers(1, len(tokens))])
    return out


@both
def test_random_logits_parse_and_end_within_the_budget(grammar):
    v, automaton, rng = grammar.vocabulary, grammar.automaton, np.random.default_rng(0)
    B, T = 2000, 48
    given = prompts(grammar, rng, B)
    tokens, lengths = padded(given, v.pad)
    remaining, mode = rng.integers(1, T - 2, B), rng.integers(0, 3, B)
    least = rng.integers(0, 3, B)
    most = least + rng.integers(0, 2, B)
    height, width = rng.integers(0, 3, B), rng.integers(0, 4, B)
    start = jax.jit(automaton.init)(tokens, lengths, remaining, mode, least, most, height, width)
    # Rows that like to begin pictures, to stop, or neither.
    taste = np.zeros((B, v.size), np.float32)
    taste[:, v.boi], taste[:, v.eos] = rng.normal(0, 4, (2, B))

    def step(state, key):
        allowed, forced = automaton.allowed(state), automaton.forced(state)
        noise = jax.random.gumbel(key, allowed.shape) + taste
        token = jnp.where(forced >= 0, forced, jnp.argmax(jnp.where(allowed, noise, -jnp.inf), axis=-1))
        facts = (token, allowed, forced, automaton.in_image(state), automaton.needed(state), state)
        return automaton.advance(state, token), facts

    end, (out, allowed, forced, in_image, needed, states) = jax.jit(
        lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(0), T))
    )(start)
    out, allowed, forced = np.asarray(out), np.asarray(allowed), np.asarray(forced)

    # At every step, forced is the only choice or there are several; PAD comes after the end and only there.
    count = allowed.sum(axis=-1)
    np.testing.assert_array_equal(np.where(count == 1, allowed.argmax(axis=-1), -1), forced)
    assert np.all(count >= 1) and not allowed[..., [v.bos, v.eot]].any()
    done = np.asarray(automaton.done(states))
    assert np.all(automaton.done(end))
    np.testing.assert_array_equal(out == v.pad, done)
    np.testing.assert_array_equal(allowed[..., v.pad], done)
    np.testing.assert_array_equal(in_image, v.role(out) == Role.IMAGE)
    possible = np.asarray(needed[0]) <= remaining
    assert possible.mean() > 0.8
    assert np.all(np.asarray(needed <= states.remaining)[:, possible])

    fits, start_images = np.asarray(automaton.fits(start, least)), np.asarray(start.images)
    assert 0.2 < fits.mean() < 0.95
    for b in np.flatnonzero(possible):
        new = out[:, b][out[:, b] != v.pad]
        assert len(new) <= remaining[b]
        grammar.parse(np.concatenate([given[b], new]))
        images = int((new == v.boi).sum()) + start_images[b]
        assert images <= max(most[b], start_images[b])
        assert images >= least[b] or not fits[b]
        if mode[b] == TEXT:
            assert v.boi not in new
        if mode[b] == IMAGE:
            assert not (v.role(new) == Role.TEXT).any()
        if grammar.layout.sized:
            sides = np.flatnonzero(new == v.boi)
            for want, at in ((height[b], sides + 1), (width[b], sides + 2)):
                assert want == 0 or (new[at] - v.size_offset + 1 == want).all()

    # A prompt that is what was sampled so far leads to the same place.
    cut = rng.integers(0, T, B)
    rows = np.arange(B)
    so_far = [np.concatenate([g, o[:k][o[:k] != v.pad]]) for g, o, k in zip(given, out.T, cut, strict=True)]
    tokens, lengths = padded(so_far, v.pad)
    again = jax.jit(automaton.init)(tokens, lengths, np.full(B, T), mode, least, most, height, width)
    at = jax.tree.map(lambda field: np.asarray(field)[cut, rows], states)
    np.testing.assert_array_equal(np.asarray(again.phase)[possible], at.phase[possible])
    inside = possible & np.asarray(again.images == 1) & ~np.asarray(automaton.done(again))
    assert inside.sum() > 50
    for field in ("written", "height", "width"):
        np.testing.assert_array_equal(np.asarray(getattr(again, field))[inside], getattr(at, field)[inside])


@pytest.mark.slow
@both
def test_a_hundred_thousand_random_sequences_parse(grammar):
    """From the empty prompt, in all modes, with sizes asked for and not."""
    v, automaton, rng = grammar.vocabulary, grammar.automaton, np.random.default_rng(0)
    B, T = 100_000, 40
    start = np.column_stack(
        [np.full(B, -1), *np.zeros((2, B)), rng.integers(1, T + 1, B), rng.integers(0, 3, B), rng.integers(0, 3, B),
         np.full(B, 5), rng.integers(0, 3, B), rng.integers(0, 4, B)]
    ).astype(np.int32)  # fmt: skip
    taste = jnp.zeros((B, v.size)).at[:, jnp.array([v.boi, v.eos])].set(rng.normal(0, 4, (B, 2)))

    @jax.jit
    def draw(state):
        def step(state, key):
            logits = jax.random.uniform(key, taste.shape) * 9 + taste
            forced = automaton.forced(state)
            token = jnp.argmax(jnp.where(automaton.allowed(state), logits, -jnp.inf), axis=-1)
            token = jnp.where(forced >= 0, forced, token).astype(jnp.int32)
            return automaton.advance(state, token), token

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(0), T))

    end, tokens = draw(automaton.resume(*start.T))
    assert np.all(automaton.done(end))
    pictures = 0
    for row in np.asarray(tokens).T:
        document = grammar.parse(np.concatenate([grammar.unconditional, row[row != v.pad]]))
        pictures += any(isinstance(part, CodesPart) for part in document.parts)
    assert 0.3 * B < pictures < 0.9 * B


# ---- requests that cannot be met ---------------------------------------------------------------


def begin(grammar, prompt, **request):
    request = dict(remaining=50, mode=FREE, min_images=0, max_images=9, height=0, width=0) | request
    tokens = np.asarray(prompt, np.int32)[None]
    columns = {name: np.array([value]) for name, value in request.items()}
    return grammar.automaton.init(tokens, np.array([tokens.size]), **columns)


def test_what_does_not_fit_is_told_before_it_starts():
    def fits(grammar, prompt, **request):
        state = begin(grammar, prompt, **request)
        return bool(grammar.automaton.fits(state, np.array([request["min_images"]]))[0])

    start, block = GRID.unconditional, GRID.image_tokens(1, 2)
    assert fits(GRID, start, min_images=2, remaining=2 * block + 1)
    assert not fits(GRID, start, min_images=2, remaining=2 * block)
    assert not fits(GRID, start, min_images=2, max_images=1)
    assert not fits(GRID, start, min_images=1, mode=TEXT)
    half = [*ROWS.unconditional, ROWS.vocabulary.boi, ROWS.vocabulary.size_offset + 1]  # of height 2
    assert fits(ROWS, half, min_images=1, remaining=7)
    assert not fits(ROWS, half, min_images=1, remaining=6)
    assert not fits(ROWS, ROWS.unconditional, min_images=1, height=3)
    tall = begin(ROWS, ROWS.unconditional, min_images=1, height=3)
    assert not ROWS.automaton.allowed(tall)[0, ROWS.vocabulary.boi]


def test_without_image_codes_no_picture_is_begun_and_one_that_is_asked_for_does_not_fit():
    grammar = Grammar(Vocabulary(5, 0), TEXT_ALONE, Letters())
    v, automaton = grammar.vocabulary, grammar.automaton
    tokens = np.full((3, 1), v.bos, np.int32)
    asked = np.array([0, 1, 1])
    state = automaton.init(
        tokens, np.ones(3), np.full(3, 9), np.array([FREE, FREE, IMAGE]), asked, asked + 5, 0 * asked, 0 * asked
    )
    assert automaton.fits(state, asked).tolist() == [True, False, False]
    allowed = np.asarray(automaton.allowed(state))
    assert not allowed[:, v.boi].any() and allowed[:, v.eos].all()
    assert np.flatnonzero(allowed[0]).tolist() == [0, 1, 2, 3, 4, v.eos]


def test_a_finished_prompt_stays_finished():
    v = GRID.vocabulary
    state = begin(GRID, GRID.encode(Document.of((TextPart("a"),))))
    assert GRID.automaton.done(state) and GRID.automaton.forced(state)[0] == v.pad
    assert GRID.automaton.done(GRID.automaton.advance(state, np.array([v.pad])))
    assert GRID.automaton.done(begin(GRID, GRID.unconditional, remaining=0))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    tokens, lengths = padded(prompts(ROWS, np.random.default_rng(1), 8), ROWS.vocabulary.pad)
    request = [np.full(8, n) for n in (30, FREE, 1, 2, 0, 2)]

    def allowed(automaton, *args):
        return automaton.allowed(automaton.init(*args))

    batch = jax.jit(allowed, static_argnums=0)(ROWS.automaton, tokens, lengths, *request)
    same = Automaton(ROWS.vocabulary, ROWS.layout)
    for i in range(8):
        alone = allowed(same, *(array[i : i + 1] for array in (tokens, lengths, *request)))
        np.testing.assert_array_equal(alone[0], batch[i])
