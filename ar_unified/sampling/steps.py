"""The compiled part of the sampler: the functions prefill, insert and decode_chunk.

A pool of R slots decodes R samples at once. Its shapes are static (`Shape`, the batch, the cache length); all settings
of a request are arrays, so requests of all kinds run in one program. The host fills free slots between chunks.

Each step first asks the automaton what to draw. A forced token needs no logits. An image code needs the head's
image-code rows, for all contexts; text needs the other rows, for the request's own context. So the state keeps hidden
states, and each part of the head is computed only if some row needs it.

Axes: R slots, C contexts, rows side by side [R * C]; b prompts of a prefill, P their padded length; S cache length; D
model; W ids of text pieces, control tokens and size tokens; K KV heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from ar_unified.language import automaton
from ar_unified.language.automaton import Opened, Wanted
from ar_unified.language.grammar import Grammar
from ar_unified.model.cache import AXES as CACHE_AXES
from ar_unified.model.cache import Cache, init_cache, slots_of, with_rows, with_slots
from ar_unified.model.config import TransformerConfig
from ar_unified.model.decoded import unstacked
from ar_unified.model.transformer import Params, Transformer, logical_axes
from ar_unified.parallel import rules
from ar_unified.sampling import decoding, guidance
from ar_unified.sampling.decoding import Filters
from ar_unified.sampling.drafts import Drafts, forgotten, no_drafts
from ar_unified.sampling.head import Weights, code_logits, head_parts, text_ids, text_logits, with_head

CHUNK = 64  # the most steps of a chunk
FACTS = 3  # columns after the tokens in the packed result of a chunk
PIECE = 1024  # tokens of a long prompt that are read at once


class Shape(NamedTuple):
    """The sizes C and S of a pool. Its programs are compiled for these sizes and for the sizes of the engine."""

    contexts: int
    length: int


class Start(NamedTuple):
    """The state from which the automaton of a sample starts; ints, or i32 [R] each."""

    opened: Opened = Opened()
    wanted: Wanted = Wanted()


class Rows(NamedTuple):
    """The requests' settings, which are constant while a row is decoded. Each array is [R, ...]."""

    seed: Array  # u32 [R]
    sample: Array  # i32 [R]
    weights: Array  # f32 [R, C]
    start: Array  # i32 [R, C], the place after each context's prefix
    resets: Array  # bool [R, C]
    filters: Filters  # [R, 2] each
    penalty: Array  # f32 [R]
    canvas: Array  # i32 [R, codes of the largest image], the codes of the first image; -1: to be drawn
    adapter: Array  # i32 [R], number of the adapter; 0: none

    @property
    def adapters(self) -> Array:
        """The adapter of each context, i32 [R * C]."""
        return jnp.repeat(self.adapter, self.weights.shape[1])


class State(NamedTuple):
    """The state of a pool. Each array is [R, ...] or [R * C, ...]."""

    rows: Rows
    automaton: automaton.State
    position: Array  # i32 [R, C], where the next token of each context goes
    hidden: Array  # [R * C, D], from which the next token is drawn
    cache: Cache
    seen: Array  # bool [R, W], text pieces in the row's prompt or answer
    broken: Array  # bool [R], the model's logits were NaN
    drafts: Drafts | None = None  # None: one token a step


class Prefix(NamedTuple):
    """Prompts that were read: their tokens [b, P], the hidden state of each prompt's last token [b, D], and a cache of
    length P."""

    tokens: Array
    hidden: Array
    cache: Cache


def prepare(config: TransformerConfig, grammar: Grammar, weights_dtype: str | None, params: Params) -> Weights:
    """Converts training parameters to the form that `decode_chunk` reads: matrices in the compute dtype or
    `weights_dtype`."""
    layers = unstacked(config, params, weights_dtype)
    weights = with_head(layers, *head_parts(config, grammar, params))
    mesh = jax.sharding.get_abstract_mesh()
    return weights if mesh.empty else jax.lax.with_sharding_constraint(weights, weight_specs(mesh, weights))


def placed(tree: Any) -> Any:
    """Splits a state or a prefix over the mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, row_specs(mesh, tree))


def weight_specs(mesh: Mesh | AbstractMesh, weights: Weights) -> Any:
    """The sharding of the weights, the same as in training."""
    axes: Any = Weights(logical_axes(weights.layers), ("vocab", "embed"), ("vocab", "embed"))  # type: ignore[arg-type]
    return rules.specs(mesh, axes, weights)


def row_specs(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """The sharding of a state or of other arrays of rows: rows by the batch axes, a cache's heads by the tensor
    axis."""
    axes: dict[int, tuple[str | None, ...]] = {1: ("batch",), 2: ("batch", None), 3: ("batch", None, None)}
    axes[4] = CACHE_AXES
    return jax.tree.map(lambda x: rules.spec(mesh, axes[x.ndim], x.shape, "sampler state"), tree)


def empty(
    config: TransformerConfig, grammar: Grammar, shape: Shape, slots: int, kv_dtype: str | None, width: int = 1
) -> State:
    """A pool in which every slot is free. width: the most positions of a row that are drawn at once."""
    R, C = slots, shape.contexts

    def full(value: Any, dtype: DTypeLike, *more: int) -> Array:
        return jnp.full((R, *more), value, dtype)

    rows = Rows(
        seed=full(0, jnp.uint32),
        sample=full(0, jnp.int32),
        weights=full(0, jnp.float32, C),
        start=full(0, jnp.int32, C),
        resets=full(False, bool, C),
        filters=Filters(full(0, jnp.float32, 2), full(0, jnp.int32, 2), full(1, jnp.float32, 2)),
        penalty=full(1, jnp.float32),
        canvas=full(-1, jnp.int32, grammar.layout.height * grammar.layout.width),
        adapter=full(0, jnp.int32),
    )
    machine = grammar.automaton.resume(Opened(jnp.zeros(R, jnp.int32)), Wanted())
    return placed(
        State(
            rows=rows,
            automaton=jax.tree.map(jnp.array, machine),
            position=full(0, jnp.int32, C),
            hidden=jnp.zeros((R * C, config.d_model), config.dtype),
            cache=init_cache(config, R * C, shape.length, kv_dtype),
            seen=full(False, bool, text_ids(grammar)),
            broken=full(False, bool),
            drafts=no_drafts(config, grammar, R, C, width),
        )
    )


def prefill(
    config: TransformerConfig, weights: Weights, tokens: Array, lengths: Array, adapter: Array | None = None
) -> Prefix:
    """Reads prompts: tokens int32 [b, P], padded on the right, lengths int32 [b] (0: an empty prompt), and the adapter
    of each, int32 [b].

    Long prompts are read piece by piece, so that memory other than the cache does not grow with P.
    """
    b, P = tokens.shape
    width = PIECE if P % PIECE == 0 else P
    last = jnp.maximum(lengths - 1, 0)

    def read(carry: tuple[Cache, Array], begin: Array) -> tuple[tuple[Cache, Array], None]:
        cache, hidden = carry
        piece = jax.lax.dynamic_slice_in_dim(tokens, begin, width, 1)
        start = jnp.full(b, begin, jnp.int32)
        states, cache = Transformer.bind(config, weights.layers).extend(piece, cache, start, adapter)
        at = last - begin
        here = states[jnp.arange(b), jnp.clip(at, 0, width - 1)]
        return (cache, jnp.where(((0 <= at) & (at < width))[:, None], here, hidden)), None

    carry = init_cache(config, b, P, config.dtype), jnp.zeros((b, config.d_model), config.dtype)
    if width == P:
        (cache, hidden), _ = read(carry, jnp.int32(0))
    else:
        (cache, hidden), _ = jax.lax.scan(read, carry, jnp.arange(0, P, width, dtype=jnp.int32))
    return placed(Prefix(tokens, hidden, cache))


def insert(
    grammar: Grammar,
    state: State,
    prefix: Prefix,
    source: Array,
    slots: Array,
    fresh: Array,
    rows: Rows,
    start: Start,
    position: Array,
) -> State:
    """Starts samples in slots.

    Args:
        prefix: the prompts.
        source: int32 [M], rows of `prefix`.
        slots: int32 [M], the rows of the pool, out of [R * C], that these prompts go to. One prompt may go to several
            rows; a number beyond the last row is ignored.
        fresh: bool [R], the slots whose sample is new. These slots get their part of `rows` and `position`, [R, ...]
            each, and their automaton resumes from `start`, i32 [R] each.
    """
    C, v = position.shape[1], grammar.vocabulary
    length = min(state.cache[0][0].shape[2], prefix.cache[0][0].shape[2])
    cache = tuple(
        with_rows(layer, slots, keys[source, :, :length], values[source, :, :length])
        for layer, (keys, values) in zip(state.cache, prefix.cache, strict=True)
    )

    def take(new: Array, old: Array) -> Array:
        return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    # The first context of each request reads the prompt, and the prompt's text pieces count for the repetition penalty.
    # `seen` changes only for prompts of this call, because another call may bring the prompts of other fresh slots.
    mine = jnp.where(slots % C == 0, slots // C, len(fresh))
    tokens = prefix.tokens[source]
    pieces = jnp.where(tokens < v.text_size, tokens, state.seen.shape[1])
    seen = state.seen.at[mine].set(False, mode="drop").at[mine[:, None], pieces].set(True, mode="drop")
    return placed(
        State(
            rows=jax.tree.map(take, rows, state.rows),
            automaton=jax.tree.map(take, grammar.automaton.resume(*start), state.automaton),
            position=take(position, state.position),
            hidden=state.hidden.at[slots].set(prefix.hidden[source], mode="drop"),
            cache=cache,
            seen=seen,
            broken=state.broken & ~fresh,
            drafts=forgotten(state.drafts, fresh),
        )
    )


def put(state: State, kept: Cache, row: Array) -> State:
    """Replaces one row of the state's cache by `kept`, a cache of one row with the same length and dtype."""
    cache = jax.tree.map(lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one, row, 0), state.cache, kept)
    return placed(state._replace(cache=cache))


def begin(grammar: Grammar, state: State, rows: Rows, start: Start, position: Array, seen: Array) -> State:
    """The state with a new sample in each slot; `read_on` then reads the prompts. The arguments are those of `insert`.

    seen: bool [R, W].
    """
    machine = grammar.automaton.resume(*start)
    drafts = forgotten(state.drafts)
    return placed(state._replace(rows=rows, automaton=machine, position=position, seen=seen, drafts=drafts))


def read_on(
    config: TransformerConfig, weights: Weights, state: State, tokens: Array, start: Array, lengths: Array
) -> State:
    """Reads prompts after the tokens that the rows of the cache already contain.

    Args:
        tokens: int32 [R * C, P], padded on the right.
        start: int32 [R * C], the place of each row's first new token.
        lengths: int32 [R * C], the number of each row's new tokens; a row with 0 stays as it is.
    """
    model = Transformer.bind(config, weights.layers)
    reads, beyond = lengths > 0, state.cache[0][0].shape[2]
    start = jnp.where(reads, start, beyond)  # a place past the end: nothing is written
    hidden, cache = model.extend(tokens, state.cache, start, state.rows.adapters)
    last = hidden[jnp.arange(len(lengths)), jnp.maximum(lengths - 1, 0)]
    return placed(state._replace(hidden=jnp.where(reads[:, None], last, state.hidden), cache=cache))


def first_slots(width: int, state: State) -> Cache:
    """The content of the first slots of each cache row, which decoding overwrites after the row has ended. width: the
    most positions of a row that are drawn at once.
    """
    return tuple(slots_of(layer, slice(width)) for layer in state.cache)


def take(state: State, first: Cache, row: Array) -> Cache:
    """Returns one row of the cache in the form that `put` takes. Its first slots are restored from `first`."""
    kept, first = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), (state.cache, first))
    width = first[0][0].shape[2]
    return tuple(with_slots(layer, slice(width), slots) for layer, slots in zip(kept, first, strict=True))


def decode_chunk(
    config: TransformerConfig, grammar: Grammar, weights: Weights, state: State, halted: Array, steps: Array
) -> tuple[State, Array]:
    """Decodes up to `steps` (at most CHUNK) more tokens of every row. It stops early once all rows have ended.

    halted: bool [R], rows that end before the first step. Returns the state, and the results packed for one copy to the
    host, int32 [R, CHUNK + 3]: the tokens (PAD after the end of a row), the number of steps, whether the row has ended,
    and whether it is broken.
    """
    state = state._replace(automaton=grammar.automaton.halt(state.automaton, halted))
    keys = decoding.row_keys(state.rows.seed, state.rows.sample)
    tokens = jnp.full((len(halted), CHUNK), grammar.vocabulary.pad, jnp.int32)

    def going(carry: Any) -> Array:
        i, state, _ = carry
        return (i < steps) & ~jnp.all(grammar.automaton.done(state.automaton))

    def body(carry: Any) -> Any:
        i, state, tokens = carry
        token, state = step(config, grammar, weights, state, keys)
        return i + 1, state, jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i))

    _, state, tokens = jax.lax.while_loop(going, body, (jnp.int32(0), state, tokens))
    return placed(state), packed(grammar, state, tokens, jnp.sum(tokens != grammar.vocabulary.pad, axis=1))


def packed(grammar: Grammar, state: State, tokens: Array, taken: Array) -> Array:
    """Packs the result of a chunk for the host: tokens int32 [R, any], then the last columns of `decode_chunk`'s
    result.
    """
    facts = jnp.stack([taken, grammar.automaton.done(state.automaton), state.broken], axis=1)
    return jnp.concatenate([tokens, facts.astype(jnp.int32)], axis=1)


def step(
    config: TransformerConfig, grammar: Grammar, weights: Weights, state: State, keys: Array
) -> tuple[Array, State]:
    """Draws the next token of every row, int32 [R], unless it is `known`. Then feeds it to all contexts of the row."""
    machine, rows = grammar.automaton, state.rows
    token, broken = placed(draw(grammar, weights, state, keys))
    after = machine.halt(machine.advance(state.automaton, token), broken)
    writes, position = guidance.advance(machine.event(state.automaton, token), state.position, rows.start, rows.resets)
    done = machine.done(after)[:, None]

    model = Transformer.bind(config, weights.layers)
    # A row that has ended reads only its first slot, so a free slot costs almost nothing.
    fed = jnp.repeat(token, position.shape[1])[:, None]
    hidden, cache = model.extend(fed, state.cache, jnp.where(done, 0, writes).reshape(-1), rows.adapters)
    piece = jnp.where(token < grammar.vocabulary.text_size, token, state.seen.shape[1])  # past the end: ignored
    return token, State(
        rows=rows,
        automaton=after,
        position=jnp.where(done, 0, position),
        hidden=hidden[:, 0],
        cache=cache,
        seen=state.seen.at[jnp.arange(len(token)), piece].set(True, mode="drop"),
        broken=state.broken | broken,
        drafts=forgotten(state.drafts),
    )


def known(grammar: Grammar, state: automaton.State, canvas: Array) -> Array:
    """Returns the next token of every row, int32 [R], or -1 if the token must be drawn.

    A token is known if the grammar allows only one id, or if the row's canvas, int32 [R, codes], gives the code.
    """
    machine = grammar.automaton
    given = jnp.take_along_axis(canvas, machine.code(state)[:, None], axis=1, mode="clip")[:, 0]
    given = jnp.where(machine.in_image(state) & (state.images == 1), given, -1)
    return jnp.where(given >= 0, grammar.vocabulary.image_offset + given, machine.forced(state))


def draw(grammar: Grammar, weights: Weights, state: State, keys: Array) -> tuple[Array, Array]:
    """The next token of every row, int32 [R], and whether its logits were NaN, bool [R]."""
    machine, vocabulary, rows = grammar.automaton, grammar.vocabulary, state.rows
    R, C = state.position.shape
    hidden = state.hidden.reshape(R, C, -1)
    image, forced = machine.in_image(state.automaton), known(grammar, state.automaton, rows.canvas)
    drawn, own = forced < 0, state.position[:, 0]

    def codes() -> tuple[Array, Array]:
        logits = guidance.mix(code_logits(grammar, weights, hidden, rows.adapter), rows.weights)
        token, broken = decoding.choose(logits, None, drawn & image, rows.filters.at(image), keys, own)
        return vocabulary.image_offset + token, broken

    def words() -> tuple[Array, Array]:
        logits = text_logits(weights, hidden[:, 0], rows.adapter)
        logits = decoding.penalize(logits, state.seen, rows.penalty)
        allowed = machine.allowed(state.automaton, logits.shape[1])
        return decoding.choose(logits, allowed, drawn & ~image, rows.filters.at(image), keys, own)

    def where_any(needed: Array, function: Callable[[], tuple[Array, Array]]) -> tuple[Array, Array]:
        nothing = jnp.zeros(R, jnp.int32), jnp.zeros(R, bool)
        return jax.lax.cond(jnp.any(needed), function, lambda: nothing)

    with jax.named_scope("words"):  # names that `planning` looks for in the compiled program
        word, bad_word = where_any(drawn & ~image, words)
    if not vocabulary.codebook_size:
        return jnp.where(drawn, word, forced), bad_word
    with jax.named_scope("codes"):
        code, bad_code = where_any(drawn & image, codes)
    token = jnp.where(drawn, jnp.where(image, code, word), forced)
    return token, bad_code | bad_word
