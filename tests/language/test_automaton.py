"""The automaton allows exactly what the grammar can still parse within the budget, from any legal prompt.

Axes: `B` rows, `T` steps, `V` vocabulary.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.language.automaton import BODY, DONE, FREE, HEIGHT, IMAGE, PARTS, TEXT, WIDTH, Automaton, Opened, Wanted
from ar_unified.language.document import CodesPart, Document, TextPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.layouts import LAYOUTS, WITH_IMAGES
from ar_unified.language.syntax import TEXT_ALONE, fixed_grid, sized_rows
from ar_unified.language.vocabulary import Role, Vocabulary
from tests.language.small import Pieces, counted, every, grammar_of, image, sides

LETTERS = Pieces(*"abcde")
GRID = Grammar(Vocabulary(5, 3), fixed_grid(1, 2), LETTERS)
ROWS = Grammar(Vocabulary(5, 6, size_tokens=3), sized_rows(2, 3), LETTERS)


def padded(rows, pad):
    """int32 [B, P] of rows of ids."""
    out = np.full((len(rows), max(map(len, rows))), pad, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def opened(grammar, prompts):
    """The state at the end of each prompt, int32 [B] each."""
    return Opened(*np.array([grammar.breaks_off(np.asarray(prompt)).opened for prompt in prompts], np.int32).T)


def resumed(automaton, opened, wanted):
    """`automaton.resume` as one program; without jit it would be thirty."""
    return jax.jit(automaton.resume)(opened, wanted)


def fit(automaton, state, min_images):
    return jax.jit(automaton.fits)(state, min_images)


# ---- exactness: against the language, written out ----------------------------------------------

# (kind, height, width, depth, pieces, words that stand for all others), so small that every string can be listed.
TALE = Pieces("a", "<vision>", "</vision>")
HALVES = Pieces("a", "<vi", "sion>", "</vision>")
NUMBERS = Pieces("a", *"0123456789*")
WRITTEN = {
    "grid": ("grid", 1, 2, 1, LETTERS, [0]),
    "rows": ("rows", 2, 3, 1, LETTERS, [0]),
    "rows of two codes a place": ("rows", 2, 4, 2, LETTERS, [0]),
    "chameleon": ("chameleon", 1, 2, 1, LETTERS, [0]),
    "units of two": ("lumina_mgpt", 4, 4, 1, LETTERS, [0]),
    "units of four, not all of them used": ("lumina_mgpt_2", 5, 11, 1, LETTERS, [0]),
    "decimals": ("emu3", 3, 2, 1, NUMBERS, [0]),
    "decimals of two digits": ("emu3", 1, 12, 1, NUMBERS, [0]),
    "tall decimals": ("emu3", 11, 1, 1, NUMBERS, [0]),
    "row ends between": ("emu3_5", 2, 2, 1, NUMBERS, [0]),
    "spelled with one piece": ("lwm", 1, 2, 1, TALE, [0]),
    "spelled with two": ("lwm", 1, 1, 1, HALVES, [0, 1, 2]),
}


def language(grammar, words, budget, mode, least, most, height, width):
    """Every continuation of an empty prompt that fits. Code 0 stands for all codes, and the words for all words."""
    syntax, layout = grammar.syntax, grammar.layout
    tall, wide = (range(a, b + 1, unit) for a, b, unit in sides(layout))
    sizes = [(h, w) for h, w in itertools.product(tall, wide)]
    if layout.sized:
        rows, columns = layout.units
        sizes = [(h, w) for h, w in sizes if height * rows in (0, h) and width * columns in (0, w)]
    blocks = [syntax.write(np.zeros(size, np.int32))[0].tolist() for size in sizes if mode != TEXT]
    words = words if mode != IMAGE else []
    found, least = [], max(least, 1) if mode == IMAGE else least

    def extend(tokens, images):
        if images >= least and len(tokens) < budget:
            found.append((*tokens, grammar.syntax.end))
        for word in words:
            said = [*tokens, word]
            if len(said) < budget and tuple(said[-len(syntax.open) :]) != syntax.open:
                extend(said, images)
        for block in blocks:
            if images < most and len(tokens) + len(block) < budget:
                extend(tokens + block, images + 1)

    extend([], 0)
    return found


later = [pytest.mark.slow, pytest.mark.exhaustive]
LONG = ("chameleon", "rows of two codes a place", "units of two", "decimals of two digits", "tall decimals")
MORE = {"decimals": pytest.mark.slow}


@pytest.mark.parametrize("case", [pytest.param(c, marks=later if c in LONG else MORE.get(c, ())) for c in WRITTEN])
def test_allowed_is_exactly_what_can_still_be_finished(case):
    kind, height, width, depth, codec, words = WRITTEN[case]
    grammar = grammar_of(kind, height, width // depth, depth, codec, codebook=3)
    v, automaton, layout = grammar.vocabulary, grammar.automaton, grammar.layout
    rows, requests, expected = [], [], []
    block = grammar.image_tokens(*(least for least, *_ in sides(layout)))
    budgets: tuple[int, ...] = (1, 2, block, block + 1, block + 3, 2 * block + 1, 2 * block + 2)
    wanted = [(0, 0)]
    if layout.sized:
        wanted += [(0, min(2, layout.most[1])), (min(2, layout.most[0]), 0), layout.most]
        budgets += (
            grammar.image_tokens(*(unit * most for unit, most in zip(layout.units, layout.most, strict=True))) + 1,
        )
    for budget, mode, (least, most), (height, width) in itertools.product(
        [budget for budget in budgets if budget < (11 if len(words) > 1 else 40)],
        (TEXT, IMAGE, FREE),
        ((0, 2), (1, 1), (0, 0), (2, 3)),
        wanted,
    ):
        strings = language(grammar, words, budget, mode, least, most, height, width)
        nexts = {}
        for string in strings:
            for i in range(len(string)):
                nexts.setdefault(string[:i], set()).add(string[i])
        rows += strings
        requests += [(budget, mode, least, most, height, width)] * len(strings)
        expected += [[nexts[string[:i]] for i in range(len(string))] for string in strings]
    assert 100 < len(rows) < 40_000

    tokens = padded(rows, v.pad)
    start = resumed(automaton, Opened(), Wanted(*np.array(requests, np.int32).T))
    assert np.all(fit(automaton, start, np.array(requests)[:, 2]))

    @jax.jit
    def walk(state, tokens):  # tokens [T, B]
        def step(s, t):
            return automaton.advance(s, t), (automaton.allowed(s), automaton.forced(s))

        return jax.lax.scan(step, state, tokens)

    state, (allowed, forced) = walk(start, tokens.T)
    assert np.all(automaton.done(state))
    allowed, forced = np.asarray(allowed).transpose(1, 0, 2), np.asarray(forced).T
    syntax, lengths = grammar.syntax, np.array([len(row) for row in rows])
    want = np.zeros(allowed.shape, bool)
    for row, sets in enumerate(expected):
        for i, ids in enumerate(sets):
            want[row, i, list(ids)] = True
    worded = want[..., :1] & (np.array(requests)[:, 1] != IMAGE)[:, None, None]
    others = np.setdiff1d(np.arange(v.text_size), [*words, *(syntax.open if syntax.spelled else ())])
    want[..., others] |= worded
    want[..., v.image_offset : v.rest_offset] = want[..., v.image_offset, None]
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    only = np.where(allowed.sum(-1) == 1, allowed.argmax(-1), -1)
    np.testing.assert_array_equal(forced[inside], only[inside])
    assert not (allowed & ~want)[inside].any()
    missing = (want & ~allowed) & inside[..., None]
    # Inside the spelled beginning of an image, the spelling's first id may be missing if no other word fits.
    if len(syntax.open) > 1:
        missing[..., syntax.open[0]] &= ~np.isin(np.roll(tokens, 1, axis=1), syntax.open[:-1])
    assert not missing.any(), [(requests[row], rows[row][:i], id) for row, i, id in np.argwhere(missing)[:3]]


# ---- random logits: everything emitted parses --------------------------------------------------


def prompts(grammar, rng, rows):
    """Prompts that end at any legal position, also inside an image or its size."""
    out = []
    for _ in range(rows):
        size = [unit * rng.integers(-(-a // unit), b // unit + 1) for a, b, unit in sides(grammar.layout)]
        codes = image(size[0], size[1], rng.integers(5))
        parts = [TextPart("abc"), codes, codes, TextPart("ba")][rng.integers(3) :]
        tokens = grammar.encode(Document.of(tuple(parts), prompt=[None, 0, 1][rng.integers(3)])).tokens
        out.append(tokens[: rng.integers(1, len(tokens) - len(grammar.tail))])
    return out


def asked(grammar, rng, rows, steps):
    """Requests of all kinds, including one that asks for more than its budget allows."""
    least = rng.integers(0, 3, rows)
    most = least + rng.integers(0, 2, rows)
    height, width = (
        np.where(rng.random(rows) < 0.5, rng.integers(1, side + 1, rows), 0) for side in grammar.layout.most
    )
    return Wanted(rng.integers(1, steps - 2, rows), rng.integers(0, 3, rows), least, most, height, width)


def tasted(grammar, rng, rows):
    """Logits of rows that prefer to begin images, to stop, or neither."""
    taste = np.zeros((rows, grammar.vocabulary.size), np.float32)
    for id in dict.fromkeys(grammar.syntax.open):
        taste[:, id] = rng.normal(len(grammar.syntax.open) > 1, 4, rows)
    taste[:, grammar.syntax.end] = rng.normal(0, 4, rows)
    return taste


def sampler(automaton, fast=False):
    """(state, races [T, B, V]) -> (the last state, records of each step). The records are [T, B]: tokens, whether all
    checks held, whether needed ids were allowed, states before. fast: optimise, whatever the tests' settings are."""

    def step(state, races):
        allowed, forced = automaton.allowed(state), automaton.forced(state)
        drawn = jnp.argmin(jnp.where(allowed, races, jnp.inf), axis=-1)
        token = jnp.where(forced >= 0, forced, drawn)
        count, v = allowed.sum(-1), automaton.syntax.vocabulary
        right = jnp.where(count == 1, drawn, -1) == forced
        right &= (count >= 1) & ~allowed[:, v.bos] & (allowed[:, v.pad] == automaton.done(state))
        right &= automaton.in_image(state) == (v.role(token) == Role.IMAGE)
        return automaton.advance(state, token), (token, right, automaton.needed(state) <= state.remaining, state)

    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False} if fast else None
    return jax.jit(lambda state, races: jax.lax.scan(step, state, races), compiler_options=options)


def races(rng, taste, steps):
    """float32 [T, B, V]: an arrival time for each id. The first id to arrive is distributed as a softmax of `taste`,
    and exponential numbers take a fortieth of the time of `jax.random.gumbel`."""
    return rng.standard_exponential((steps, *taste.shape), np.float32) * np.exp(-taste)


QUICK = ("rows", "emu3_5", "lwm")
# A layout takes seconds of compiling and parsing. Layouts whose parts other layouts also have are in the slow tests.
quick = [
    pytest.param(kind, depth, marks={"grid": pytest.mark.slow}.get(kind, () if kind in QUICK else later))
    for kind, depth in zip(WITH_IMAGES, itertools.cycle([1, 2]), strict=False)
]


@pytest.mark.parametrize("kind, depth", quick)
def test_random_logits_parse_and_end_within_the_budget(kind, depth):
    grammar = grammar_of(kind, depth=depth)
    automaton, rng = grammar.automaton, np.random.default_rng(0)
    B, T = 500, 96
    given = prompts(grammar, rng, B)
    wanted, begun = asked(grammar, rng, B, T), opened(grammar, given)
    start = resumed(automaton, begun, wanted)
    end, (out, right, within, states) = sampler(automaton)(start, races(rng, tasted(grammar, rng, B), T))
    assert np.all(right) and np.all(automaton.done(end))
    out, states = np.asarray(out), jax.tree.map(np.asarray, states)
    done = np.concatenate([states.phase[1:], np.asarray(end.phase)[None]]) == DONE
    possible, fits = np.asarray(within)[0], np.asarray(fit(automaton, start, wanted.min_images))
    assert possible.mean() > 0.6 and 0.1 < fits.mean() < 0.95
    assert np.all(np.asarray(within)[:, possible])

    images, inside = np.asarray(end.images), np.isin(begun.phase, (HEIGHT, WIDTH, BODY))
    free = inside & (begun.phase != BODY)  # a prompt that has begun a size may finish it
    rows, columns = grammar.layout.units
    for b in np.flatnonzero(possible):
        new = out[: done[:, b].argmax() + 1, b]
        assert len(new) <= wanted.remaining[b] and new[-1] == grammar.syntax.end
        document = grammar.parse(np.concatenate([given[b], new, grammar.tail]))
        shapes = [part.codes.shape for part in document.parts if isinstance(part, CodesPart)]
        begins = int(images[b] - inside[b])
        assert images[b] <= max(wanted.max_images[b], inside[b])
        assert images[b] >= wanted.min_images[b] or not fits[b]
        if wanted.mode[b] == TEXT:
            assert not begins
        if wanted.mode[b] == IMAGE:
            assert all(id in grammar.syntax.open for id in new[(states.phase[: len(new), b] == PARTS)][:-1])
        if grammar.layout.sized and not free[b]:
            for h, w in shapes[len(shapes) - begins :]:
                assert wanted.height[b] * rows in (0, h) and wanted.width[b] * columns in (0, w)
    assert images[possible].sum() > 0.15 * B

    # A prompt of the tokens sampled so far gives the same state.
    cut = rng.integers(0, T, B)
    for b in np.flatnonzero(possible)[:150]:
        so_far = out[: min(cut[b], done[:, b].argmax() + 1), b]
        at = type(end)(*(field[min(cut[b], len(field) - 1), b] for field in states))
        again = grammar.breaks_off(np.concatenate([given[b], so_far])).opened
        asked_next = at.phase == DONE and counted(kind)  # an answer may follow its end
        assert again.phase == (PARTS if asked_next else at.phase)
        if again.phase in (HEIGHT, WIDTH, BODY):
            assert again == at[:4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, N",
    [("emu3_5", 10_000), *(pytest.param(kind, 100_000, marks=pytest.mark.exhaustive) for kind in WITH_IMAGES)],
)
def test_a_hundred_thousand_random_sequences_parse(kind, N):
    """From the empty prompt, in all modes, with and without requested sizes."""
    grammar = grammar_of(kind, width=3 if LAYOUTS[kind].size is None else 8)
    automaton, rng = grammar.automaton, np.random.default_rng(0)
    B, T = 2000, 64
    resume, draw = jax.jit(automaton.resume), sampler(automaton, fast=True)
    begin, parsed, images = np.array([grammar.vocabulary.bos]), 0, 0
    while parsed < N:
        start = resume(Opened(), asked(grammar, rng, B, T))
        end, (out, right, within, _) = draw(start, races(rng, tasted(grammar, rng, B), T))
        assert np.all(right) and np.all(within) and np.all(automaton.done(end))
        for row in np.asarray(out).T:
            tokens = row[: np.argmax(row == grammar.syntax.end) + 1]
            document = grammar.parse(np.concatenate([begin, tokens, grammar.tail]))
            images += any(isinstance(part, CodesPart) for part in document.parts)
            parsed += 1
    assert parsed == N and 0.1 * N < images < 0.95 * N


@every
def test_a_prompt_cut_anywhere_leads_where_token_by_token_does(kind):
    """Prompts end in the middle of digits, of a spelled beginning and of rows. One batch has images of many sizes."""
    grammar, rng = grammar_of(kind, width=3 if LAYOUTS[kind].size is None else 130, height=12), np.random.default_rng(0)
    if not grammar.layout.sized:
        grammar = grammar_of(kind)
    documents = []
    for h, w in itertools.product((1, 2, 9, 10, 12), (1, 3, 10, 99, 100, 121)):
        h, w = (min(unit * n, b) for n, (_, b, unit) in zip((h, w), sides(grammar.layout), strict=True))
        size = tuple(side // unit * unit for side, unit in zip((h, w), grammar.layout.units, strict=True))
        if not grammar.layout.sized:
            size = grammar.layout.height, grammar.layout.width
        documents.append(grammar.encode(Document.of((TextPart("a<b<vi"), image(*size), image(*size)))).tokens)
    tokens = padded(documents, grammar.vocabulary.pad)

    @jax.jit
    def walk(state, tokens):
        return jax.lax.scan(lambda s, t: (grammar.automaton.advance(s, t), s[:4]), state, tokens)

    start = resumed(grammar.automaton, Opened(np.zeros(len(documents))), Wanted(10**5, FREE, 0, 9))
    _, fields = walk(start, tokens[:, 1:].T)
    for row, document in enumerate(documents):
        at = [tuple(field[row]) for field in np.asarray(fields).transpose(0, 2, 1)]
        at = list(zip(*at, strict=True))
        header = len(grammar.syntax.open) + 8
        near = {n + k for n in np.flatnonzero(document[:-1] == grammar.syntax.open[-1]) for k in range(header)}
        for n in sorted({*range(1, 12), *near, *rng.integers(1, len(document), 8).tolist(), len(document) - 1}):
            if 1 <= n < len(document):
                found = grammar.breaks_off(document[:n]).opened
                assert found.phase == at[n - 1][0] and found.written == at[n - 1][1], (document[:n], found, at[n - 1])
                assert found.phase in (PARTS, DONE) or found == at[n - 1]


# ---- requests that cannot be met ---------------------------------------------------------------


def begin(grammar, prompt, **request):
    request = dict(remaining=50, mode=FREE, min_images=0, max_images=9, height=0, width=0) | request
    return resumed(grammar.automaton, opened(grammar, [prompt]), Wanted(**request))


def test_what_does_not_fit_is_told_before_it_starts():
    def fits(grammar, prompt, **request):
        state = begin(grammar, prompt, **request)
        return bool(fit(grammar.automaton, state, np.array([request["min_images"]]))[0])

    start, block = GRID.unconditional.tokens, GRID.image_tokens(1, 2)
    assert fits(GRID, start, min_images=2, remaining=2 * block + 1)
    assert not fits(GRID, start, min_images=2, remaining=2 * block)
    assert not fits(GRID, start, min_images=2, max_images=1)
    assert not fits(GRID, start, min_images=1, mode=TEXT)
    start, boi = ROWS.unconditional.tokens, ROWS.vocabulary.control("boi")
    half = [*start, boi, ROWS.vocabulary.size_offset + 1]  # an image of height 2
    assert fits(ROWS, half, min_images=1, remaining=7)
    assert not fits(ROWS, half, min_images=1, remaining=6)
    assert not fits(ROWS, start, min_images=1, height=3)
    tall = begin(ROWS, start, min_images=1, height=3)
    assert not ROWS.automaton.allowed(tall)[0, boi]
    # 1 0 * 1 img (code eol)*10 eof eoi eos; the prompt already has "1".
    emu = grammar_of("emu3", 12, 1)
    half = [emu.vocabulary.bos, emu.syntax.open[0], emu.syntax.digits[1]]
    assert fits(emu, half, min_images=1, height=10, remaining=27)
    assert not fits(emu, half, min_images=1, height=10, remaining=26)
    assert fits(emu, half, min_images=1, height=2, remaining=8)  # a height that begins with 1 cannot become 2
    assert not fits(emu, half, min_images=1, remaining=7)


def test_without_image_codes_no_image_is_begun_and_one_that_is_asked_for_does_not_fit():
    for kind in ("grid", "emu3", "lwm"):
        layout = grammar_of(kind).layout if kind != "grid" else TEXT_ALONE
        controls = layout.record.controls
        grammar = Grammar(Vocabulary(5, 0, controls=controls), layout, LETTERS)
        v, automaton = grammar.vocabulary, grammar.automaton
        asks = np.array([0, 1, 1])
        state = resumed(automaton, Opened(), Wanted(9, np.array([FREE, FREE, IMAGE]), asks, asks + 5))
        assert fit(automaton, state, asks).tolist() == [True, False, False]
        allowed = np.asarray(automaton.allowed(state))
        assert allowed[:, v.eos].all()
        assert np.flatnonzero(allowed[0]).tolist() == [0, 1, 2, 3, 4, v.eos]
        assert not allowed[2, :5].any()


def test_a_finished_prompt_stays_finished():
    for grammar in (GRID, grammar_of("emu3")):
        v, automaton = grammar.vocabulary, grammar.automaton
        state = begin(grammar, grammar.encode(Document.of((TextPart("a"),))).tokens, min_images=1)
        assert automaton.done(state) and automaton.forced(state)[0] == v.pad and state.images[0] == 0
        assert automaton.done(automaton.advance(state, np.array([v.pad])))
        assert automaton.done(begin(grammar, [v.bos], remaining=0))
        assert automaton.done(automaton.halt(begin(grammar, [v.bos]), np.array([True])))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    for grammar in (ROWS, grammar_of("emu3_5", 3, 11)):
        start = opened(grammar, prompts(grammar, np.random.default_rng(1), 8))

        def allowed(automaton, opened):
            return automaton.allowed(automaton.resume(opened, Wanted(40, FREE, 1, 2, 0, 2)))

        batch = jax.jit(allowed, static_argnums=0)(grammar.automaton, start)
        for i in range(8):
            alone = allowed(Automaton(grammar.syntax), Opened(*(field[i : i + 1] for field in start)))
            np.testing.assert_array_equal(alone[0], batch[i])
