"""A conversation that keeps its KV cache from turn to turn, so that each turn reads only what is new.

    talk = Conversation(engine)
    talk.say((TextPart("Draw a circle."),), mode="image", guidance=3.0)
    talk.say((TextPart("What colour is it?"),), mode="text")

`Engine.generate` reads the whole prompt of each request, so that a sample is a function of weights, request, seed and
index, bit for bit. A conversation keeps the keys and values that were computed while an answer was drawn. A prefill
would round them differently. So the answers of a conversation depend on all its turns and their requests, but not on
the other conversations of a batch (`say_all`).

A conversation remembers which tokens each context has read. A turn's plan says what each context must read. The
beginning that the cache already contains is not read again.

Axes: R slots, C contexts, rows side by side [R * C]; W as in `steps`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ar_unified.language.document import Part, TokensPart, Turn
from ar_unified.language.grammar import Grammar
from ar_unified.language.reading import GrammarError
from ar_unified.model.cache import Cache
from ar_unified.model.config import TransformerConfig
from ar_unified.sampling import steps
from ar_unified.sampling.engine import Engine, bucket
from ar_unified.sampling.plan import Plan, cache_length, without_text
from ar_unified.sampling.request import Request, RequestError, Sample, TooLong
from ar_unified.sampling.slots import Job, row_arrays
from ar_unified.sampling.steps import CHUNK, Shape, State

_BEFORE = (Turn("user"), Turn("assistant"))  # stands for all earlier turns


class _Kept(NamedTuple):
    """The tokens that a context has read, int32 [n], and the context's row of the cache. The first n slots of this row
    belong to these tokens.
    """

    tokens: np.ndarray
    cache: Cache


class Conversation:
    """A conversation with one model. `say_all` serves several conversations at once.

    Args:
        engine: its max_length limits the whole conversation, and the kept cache has its kv_dtype.
        history: turns to begin with, such as a system turn.

    Attributes:
        turns: all turns so far.
        tokens: int32 [n], the tokens of all turns, with the answers as they were drawn.
        prefilled: how many tokens each context of the last turn read before the answer, the request's own context
            first.
    """

    def __init__(self, engine: Engine, history: Sequence[Turn] = ()):
        self.engine = engine
        self.turns: tuple[Turn, ...] = tuple(history)
        self.tokens = np.zeros(0, np.int32)
        self.prefilled: tuple[int, ...] = ()
        self._kept: dict[
            tuple[str, str], _Kept
        ] = {}  # keys: adapter and context; contexts that reset at each image are not kept
        self._params: Any = None  # the parameters that computed the caches

    def say(self, parts: Sequence[Part], **settings: object) -> Sample:
        """The answer to the user's next turn.

        settings: settings of the Request. All turns may have the same seed, because draws also depend on the position.

        Raises RequestError that says what to change, if the turn cannot be served. The conversation is then unchanged.
        """
        request = Request(**{"id": f"turn {len(self.turns)}", "parts": tuple(parts)} | settings)  # type: ignore[arg-type]
        (sample,) = say_all([(self, request)])
        if sample.error:
            raise RequestError(sample.error)
        return sample

    def plan(self, request: Request) -> Plan:
        """The plan of the next turn. Raises RequestError or GrammarError if it cannot be served."""
        if request.history or not request.turn or request.n != 1:
            raise RequestError(
                "history, turn, n: expected no history, turn true and n 1, because a conversation adds one answer; "
                f"found {len(request.history)} turns, {request.turn} and {request.n}"
            )
        said = replace(request, history=self.turns)
        said.check()
        served = replace(said, history=(), parts=(TokensPart(tuple(self._prompt(request).tolist())),))
        try:
            return replace(self.engine.plan(served), request=said)
        except TooLong as error:
            raise RequestError(
                f"{error}, or begin another conversation, because the prompt contains all turns so far"
            ) from None

    def _prompt(self, request: Request) -> np.ndarray:
        """All tokens before the answer, int32 [n]."""
        grammar, asked = self.engine.grammar, request.turns[-1]
        if not len(self.tokens):
            return grammar.prompt([*self.turns, asked])
        new = grammar.prompt([*_BEFORE, asked])[len(grammar.history(_BEFORE)) :]
        return np.concatenate([self.tokens, new])

    def kept(self, context: tuple[str, str], prefix: np.ndarray) -> tuple[int, Cache | None]:
        """Returns how many tokens of `prefix` the context's cache already contains, and this cache. The last token is
        always read again."""
        found = self._kept.get(context)
        if found is None or self._params is not self.engine.params:
            return 0, None
        most = min(len(found.tokens), len(prefix) - 1)
        other = np.flatnonzero(found.tokens[:most] != prefix[:most])
        return int(other[0]) if len(other) else most, found.cache

    def answered(self, plan: Plan, sample: Sample, caches: Sequence[Cache]) -> None:
        """Adds an answer. `caches` has the cache row of each context; rows of contexts that reset are not kept."""
        assert sample.document is not None
        grammar = self.engine.grammar
        # The last token of an answer is drawn, but no context reads it.
        read = np.concatenate([plan.prompt, sample.tokens[:-1]])
        if self._params is not self.engine.params:
            self._kept, self._params = {}, self.engine.params
        for c, (context, cache) in enumerate(zip(_contexts(plan), caches, strict=True)):
            if not plan.resets[c]:
                self._kept[context] = _Kept(without_text(grammar, read) if c else read, cache)
        self.tokens = np.concatenate([plan.prompt, _ended(grammar, sample)])
        asked = plan.request.turns[-1]
        self.turns = (*self.turns, asked, Turn("assistant", sample.document.parts))


def say_all(asked: Sequence[tuple[Conversation, Request]]) -> list[Sample]:
    """Answers the next turn of each of several conversations of one engine. The answers are in the order of `asked`.

    A request contains only the user's turn and asks for one sample. The answer's `request.history` has all earlier
    turns. A request that cannot be served gives an `error` and leaves its conversation unchanged.

    Raises ValueError if a conversation is given twice, or the engines differ.
    """
    if len({id(each) for each, _ in asked}) < len(asked) or len({id(each.engine) for each, _ in asked}) > 1:
        raise ValueError("say_all: expected different conversations of one engine")
    samples: dict[int, Sample] = {}
    pools: dict[int, list[tuple[int, Conversation, Plan]]] = {}  # key: the number of contexts
    for i, (conversation, request) in enumerate(asked):
        try:
            plan = conversation.plan(request)
        except (RequestError, GrammarError) as error:
            samples[i] = Sample(request, 0, np.zeros(0, np.int32), None, "error", str(error))
            continue
        pools.setdefault(len(plan.prefixes), []).append((i, conversation, plan))
    for pool in pools.values():
        slots = asked[0][0].engine.batch_size
        for at in range(0, len(pool), slots):
            group = pool[at : at + slots]
            found = _serve(group[0][1].engine, [(conversation, plan) for _, conversation, plan in group])
            samples |= {i: sample for (i, _, _), sample in zip(group, found, strict=True)}
    return [samples[i] for i in range(len(asked))]


class _Programs(NamedTuple):
    """The compiled functions that only conversations need; see `steps`."""

    put: Any
    begin: Any
    read_on: Any
    first_slots: Any
    take: Any


@functools.lru_cache(maxsize=16)
def _programs(config: TransformerConfig, grammar: Grammar, mesh: Mesh | None) -> _Programs:
    return _Programs(
        put=jax.jit(steps.put, donate_argnums=(0,)),
        begin=jax.jit(functools.partial(steps.begin, grammar), donate_argnums=(0,)),
        read_on=jax.jit(functools.partial(steps.read_on, config), donate_argnums=(1,)),
        first_slots=jax.jit(steps.first_slots, static_argnums=0),
        take=jax.jit(steps.take),
    )


def _serve(engine: Engine, group: Sequence[tuple[Conversation, Plan]]) -> list[Sample]:
    """Serves one turn of each of at most R conversations. All their plans have the same number of contexts."""
    R, C = engine.batch_size, len(group[0][1].prefixes)
    own = _programs(engine.config, engine.grammar, engine.mesh)
    jobs = {i: Job(plan, 0, None) for i, (_, plan) in enumerate(group)}
    shape = Shape(C, cache_length(engine.max_length))

    state = engine.empty(shape)
    seen = np.zeros((R, state.seen.shape[1]), bool)
    new: dict[int, tuple[int, np.ndarray]] = {}  # by row: the place of the first token to read, and the tokens
    for i, (conversation, plan) in enumerate(group):
        pieces = plan.prefixes[0]
        seen[i, pieces[pieces < engine.grammar.vocabulary.text_size]] = True
        for c, (context, prefix) in enumerate(zip(_contexts(plan), plan.prefixes, strict=True)):
            start, cache = conversation.kept(context, prefix)
            if cache is not None:
                state = engine.call(own.put, state, cache, np.int32(i * C + c))
            new[i * C + c] = start, prefix[start:]
        conversation.prefilled = tuple(len(new[i * C + c][1]) for c in range(C))
    rows, start, position = row_arrays(engine.grammar.layout, shape, R, jobs, engine.adapters)
    state = engine.call(own.begin, state, rows, start, position, seen)
    state = _read(engine, own, state, new)

    first = engine.call(own.first_slots, engine.widest, state)
    samples: dict[int, Sample] = {}
    while len(samples) < len(group):
        owners = [None if i in samples else jobs.get(i) for i in range(R)]
        free = np.array([owner is None for owner in owners])
        state, packed, _ = engine.decode(shape, state, free, CHUNK)
        for sample, job in engine.read(shape, packed, owners):
            samples[owners.index(job)] = sample
    for i, (conversation, plan) in enumerate(group):
        if not samples[i].error:
            caches = [engine.call(own.take, state, first, np.int32(i * C + c)) for c in range(C)]
            conversation.answered(plan, samples[i], caches)
    return [samples[i] for i in range(len(group))]


def _read(engine: Engine, own: _Programs, state: State, new: dict[int, tuple[int, np.ndarray]]) -> State:
    """The state after each row has read its new tokens. A row's result depends on its own length, not on the other
    rows.
    """
    count = len(state.hidden)
    for size in sorted({bucket(len(tokens)) for _, tokens in new.values()}):
        tokens = np.full((count, size), engine.grammar.vocabulary.pad, np.int32)
        starts, lengths = np.zeros(count, np.int32), np.zeros(count, np.int32)
        for row, (begin, ids) in new.items():
            if bucket(len(ids)) == size:
                tokens[row, : len(ids)], starts[row], lengths[row] = ids, begin, len(ids)
        state = engine.call(own.read_on, engine.weights, state, tokens, starts, lengths)
    return state


def _contexts(plan: Plan) -> list[tuple[str, str]]:
    """Keys for a plan's contexts: (adapter, name of the context). The name is "" for the conversation itself."""
    names = ["", plan.request.context, "image_only"][: len(plan.prefixes)]
    return [(plan.request.adapter, name) for name in names]


def _ended(grammar: Grammar, sample: Sample) -> np.ndarray:
    """The ids of an answer as the next turn sees them, int32 [n], without the stop that ended it."""
    if sample.finish_reason != "stop" or sample.document is None:
        return sample.tokens
    try:
        said = grammar.parts(sample.document.parts)
    except GrammarError:  # the text tokenizer cannot encode the cut text, so the ids stay as drawn
        said = sample.tokens
    return np.append(said, grammar.syntax.end).astype(np.int32)
