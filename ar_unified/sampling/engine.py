"""Many requests in, many samples out: ragged prompts, one KV cache, one compiled loop on the device to the end.

Requests are grouped by what their arrays look like: contexts (1, or 2 where guidance is on), prompt bucket, cache
length. All three follow from the request alone, so a sample never depends on its batch mates; a short batch is filled
up with copies. For each group two programs are compiled, prefill and decode, and no request ever adds another: its
temperature, guidance, size, seed and budget are arrays.

Axes: C contexts, R requests in a batch, B = C * R rows (context-major), P prompt bucket, S cache length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_unified import automaton
from ar_unified.document import Document, Part, TextPart
from ar_unified.grammar import Grammar, GrammarError
from ar_unified.model.config import TransformerConfig
from ar_unified.model.transformer import Transformer, init_cache
from ar_unified.sampling import decoding, guidance
from ar_unified.sampling.decoding import Filter, Filters

MODES = {"text": automaton.TEXT, "image": automaton.IMAGE, "free": automaton.FREE}
_SMALLEST = 16  # tokens of the smallest bucket
_MANY = 1 << 20  # more pictures than any budget holds


class RequestError(ValueError):
    """What is wrong with one request; the rest of the job goes on."""


@dataclass(frozen=True)
class Request:
    """What to continue, and how.

    Attributes:
        id: names the request in samples and messages.
        parts: the prompt: text, and pictures as codes of the image tokenizer.
        turn: True: answer the prompt; False: go on writing the document it begins.
        mode: "text": no pictures; "image": only pictures; "free": both, as the model likes.
        n: how many samples. seed: 0 <= seed < 2**32; sample i of a request is the same however many are drawn.
        max_tokens: budget of a sample, <eos> included; None: what its pictures need ("image"), else what fits.
        min_images, max_images: pictures in a sample; None: exactly one in mode "image", any number in "free".
        image_size: (height, width) of every picture in codes; None: the fixed grid's, or as the model likes.
        guidance: scale of classifier-free guidance on image codes; 1: none, and then it costs nothing.
        text, image: how text (and control) tokens and image codes are drawn.
        meta: travels along.
    """

    id: str
    parts: tuple[Part, ...]
    turn: bool = True
    mode: Literal["text", "image", "free"] = "free"
    n: int = 1
    seed: int = 0
    max_tokens: int | None = None
    min_images: int | None = None
    max_images: int | None = None
    image_size: tuple[int, int] | None = None
    guidance: float = 1.0
    text: Filter = Filter()
    image: Filter = Filter()
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def check(self) -> None:
        """Raises RequestError naming the first field that no engine could serve."""
        if self.mode not in MODES:
            raise RequestError(f"mode: expected one of {', '.join(MODES)}, found {self.mode!r}")
        if self.n < 1:
            raise RequestError(f"n: expected at least 1 sample, found {self.n}")
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"seed: expected 0 <= seed < 2**32, found {self.seed}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens: expected at least 1, found {self.max_tokens}")
        if not math.isfinite(self.guidance):
            raise RequestError(f"guidance: expected a finite number, found {self.guidance}")
        least, most = self.images
        if not 0 <= least <= most or (self.mode == "image" and most < 1):
            raise RequestError(f"min_images, max_images: expected 0 <= min <= max, found {least} and {most}")
        if self.mode == "text" and least:
            raise RequestError(f'min_images: mode "text" makes no pictures, found {least}')
        try:
            self.text.check("text")
            self.image.check("image")
        except ValueError as error:
            raise RequestError(str(error)) from None

    @property
    def images(self) -> tuple[int, int]:
        """Fewest and most pictures of a sample."""
        if self.mode == "text":
            return self.min_images or 0, self.max_images or 0
        least = self.min_images if self.min_images is not None else int(self.mode == "image")
        most = self.max_images if self.max_images is not None else max(least, 1) if self.mode == "image" else _MANY
        return least, most


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        request, index: sample `index` of `request`.
        tokens: int32 [n], generated, <eos> included.
        document: what they say: the parts behind the prompt, pictures as codes. None if there was an error.
        finish_reason: "eos": the model ended it; "length": the budget did; "error".
        error: what went wrong, in words; "" if nothing.
    """

    request: Request
    index: int
    tokens: np.ndarray
    document: Document | None
    finish_reason: Literal["eos", "length", "error"]
    error: str = ""


class Rows(NamedTuple):
    """What the requests of a batch say, as arrays [R, ...]. Constant while decoding."""

    tokens: Array  # i32 [R, P], padded on the right
    lengths: Array  # i32 [R]
    remaining: Array
    mode: Array
    min_images: Array
    max_images: Array
    height: Array  # 0: free
    width: Array
    seed: Array  # u32 [R]
    sample: Array
    scale: Array  # f32 [R]
    filters: Filters  # [R, 2] each


class State(NamedTuple):
    """What decoding changes."""

    step: Array  # i32, tokens generated by every row that is not done
    logits: Array  # f32 [B, V], for the next token, of every context
    cache: Any  # of B rows
    companion: Array  # i32 [R], cache slot of a companion's last token
    automaton: automaton.State  # [R]
    tokens: Array  # i32 [R, S], generated; PAD behind the end
    broken: Array  # bool [R], the model's logits were NaN


@dataclass(frozen=True)
class _Job:
    """One sample to draw, and the shapes it needs."""

    request: Request
    index: int
    prompt: np.ndarray
    budget: int
    smallest: int  # tokens of the smallest picture it may make
    contexts: int
    bucket: int
    length: int

    @property
    def group(self) -> tuple[int, int, int]:
        return self.contexts, self.bucket, self.length


class Engine:
    """Draws samples from one model.

    Args:
        config, params: the transformer; `params` may be replaced between calls by others of the same shapes.
        grammar: what may be written, and the vocabulary it is written in.
        batch_size: requests decoded at once (twice as many rows where guidance is on).
        max_length: tokens of prompt and answer together; the longest KV cache.

    Raises:
        ValueError: the model's vocabulary is not the grammar's, or a size is not positive.
    """

    def __init__(self, config: TransformerConfig, params: Any, grammar: Grammar, *, batch_size: int, max_length: int):
        if config.vocab_size != grammar.vocabulary.size:
            raise ValueError(
                f"the model's vocabulary has {config.vocab_size} ids, the grammar's {grammar.vocabulary.size}: "
                "use the checkpoint and the tokenizers of one run"
            )
        if batch_size < 1 or max_length < 2:
            raise ValueError(f"expected batch_size >= 1 and max_length >= 2, found {batch_size} and {max_length}")
        self.config, self.params, self.grammar = config, params, grammar
        self.batch_size, self.max_length = batch_size, max_length
        self._prefill = jax.jit(partial(prefill, config, grammar), static_argnames=("contexts", "length"))
        self._decode = jax.jit(partial(decode, config, grammar), donate_argnums=(1,))

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """All samples of all requests, batch by batch as they finish, which is not the order of the requests.

        A request that cannot be served gives one sample with an `error`, first; the others are not touched by it.
        """
        return self.draw((request, index) for request in requests for index in range(max(request.n, 1)))

    def draw(self, samples: Iterable[tuple[Request, int]]) -> Iterator[Sample]:
        """Like `generate` for chosen samples, (request, index) each. Leaving some out keeps the order of the rest."""
        samples = list(samples)
        plans: dict[int, _Job | None] = {}  # by request: its samples share a plan, or an error
        jobs: list[_Job] = []
        for request, index in samples:
            if id(request) not in plans:
                try:
                    plans[id(request)] = self._plan(request)
                except (RequestError, GrammarError) as error:
                    plans[id(request)] = None
                    yield Sample(request, index, np.zeros(0, np.int32), None, "error", str(error))
            if (plan := plans[id(request)]) is not None:
                jobs.append(replace(plan, index=index))
        groups: dict[tuple[int, int, int], list[_Job]] = {}
        for job in jobs:
            groups.setdefault(job.group, []).append(job)
        for _, group in sorted(groups.items()):
            group.sort(key=lambda job: job.budget)  # rows that end together decode together
            for start in range(0, len(group), self.batch_size):
                yield from self._run(group[start : start + self.batch_size])

    def check(self, request: Request) -> None:
        """Raises RequestError or GrammarError, saying what to change, if the request cannot be served."""
        self._plan(request)

    def _plan(self, request: Request) -> _Job:
        request.check()
        layout = self.grammar.layout
        height, width = request.image_size or (layout.height, layout.width)
        block = self.grammar.image_tokens(height, width)
        prompt = self.grammar.prompt_tokens(request.parts, turn=request.turn)
        room = self.max_length - len(prompt)
        least, most = request.images
        smallest = block if request.image_size or not layout.sized else self.grammar.image_tokens(1, 1)
        needed = least * smallest + 1
        if room < needed:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and {least} pictures with <eos> need {needed} more, "
                f"but the engine's max_length is {self.max_length}: shorten the prompt or raise max_length"
            )
        budget = request.max_tokens or min(room, most * block + 1 if request.mode == "image" else room)
        if budget > room:
            raise RequestError(
                f"max_tokens: the prompt has {len(prompt)} tokens and the engine's max_length is {self.max_length}, "
                f"so at most {room} fit, found {budget}"
            )
        if budget < needed:
            raise RequestError(f"max_tokens: {least} pictures with <eos> need {needed}, found {budget}")
        contexts = 1 if request.guidance == 1 or request.mode == "text" else 2
        length = min(_bucket(len(prompt) + budget), self.max_length)
        return _Job(request, 0, prompt, budget, smallest, contexts, min(_power(len(prompt)), length), length)

    def _run(self, jobs: list[_Job]) -> Iterator[Sample]:
        contexts, bucket, length = jobs[0].group
        rows = _rows(jobs + jobs[-1:] * (self.batch_size - len(jobs)), bucket, self.grammar.vocabulary.pad)
        state = self._prefill(self.params, rows, contexts=contexts, length=length)
        state = self._decode(self.params, state, rows)
        tokens, broken = jax.device_get((state.tokens, state.broken))
        for job, row, bad in zip(jobs, tokens, broken, strict=False):
            yield self._sample(job, row[row != self.grammar.vocabulary.pad], bool(bad))

    def _sample(self, job: _Job, tokens: np.ndarray, broken: bool) -> Sample:
        request = job.request
        if broken:
            reason = "the model's logits were NaN: the weights are broken, or overflow in the compute dtype"
            return Sample(request, job.index, tokens, None, "error", reason)
        try:
            document = Document(self._answer(job, tokens), id=request.id, meta=request.meta)
        except GrammarError as error:
            return Sample(request, job.index, tokens, None, "error", str(error))
        # Ended by the budget: something more was allowed, but nothing of that kind would have fitted.
        left = job.budget - len(tokens)
        if request.mode == "image":
            pictures = sum(not isinstance(part, TextPart) for part in document.parts)
            cut = pictures < request.images[1] and left < job.smallest
        else:
            cut = left == 0
        return Sample(request, job.index, tokens, document, "length" if cut else "eos")

    def _answer(self, job: _Job, tokens: np.ndarray) -> tuple[Part, ...]:
        """The parts behind the prompt. Text that goes on where the prompt's text ends is a part of its own."""
        parts = self.grammar.parse(np.concatenate([job.prompt, tokens])).parts
        given = job.request.parts
        answer = parts[len(given) :]
        if given and not job.request.turn and isinstance(given[-1], TextPart):
            said = parts[len(given) - 1]
            assert isinstance(said, TextPart)
            if said.text != given[-1].text:
                answer = (TextPart(said.text.removeprefix(given[-1].text)), *answer)
        return answer


# ---- the compiled part ------------------------------------------------------------------------------------------


def prefill(
    config: TransformerConfig, grammar: Grammar, params: Any, rows: Rows, *, contexts: int, length: int
) -> State:
    """The state behind the prompts: R rows of `rows.tokens` and, per further context, R rows of the empty prompt."""
    model = Transformer.bind(config, params)
    R = len(rows.tokens)
    hidden, cache = model.extend(rows.tokens, init_cache(config, R, length), jnp.zeros(R, jnp.int32))
    logits = model.logits(hidden[jnp.arange(R), rows.lengths - 1])
    unconditional = jnp.asarray(grammar.unconditional)[None]
    if contexts > 1:  # all companions begin alike: one row is read, and copied
        _, empty = model.extend(unconditional, init_cache(config, 1, length), jnp.zeros(1, jnp.int32))
        cache = jax.tree.map(
            lambda own, other: jnp.concatenate([own, *[jnp.repeat(other, R, axis=0)] * (contexts - 1)]), cache, empty
        )
        logits = jnp.tile(logits, (contexts, 1))  # never mixed: a picture's first code is behind its <boi>
    state = grammar.automaton.init(
        rows.tokens, rows.lengths, rows.remaining, rows.mode, rows.min_images, rows.max_images, rows.height, rows.width
    )
    return State(
        step=jnp.int32(0),
        logits=logits,
        cache=cache,
        companion=jnp.full(R, unconditional.shape[1], jnp.int32),
        automaton=state,
        tokens=jnp.full((R, length), grammar.vocabulary.pad, jnp.int32),
        broken=jnp.zeros(R, bool),
    )


def decode(config: TransformerConfig, grammar: Grammar, params: Any, state: State, rows: Rows) -> State:
    """Steps until every row is done. All of the state is returned, so that all of it can be donated."""
    keys = decoding.row_keys(rows.seed, rows.sample)

    def going(state: State) -> Array:
        return ~jnp.all(grammar.automaton.done(state.automaton))

    def body(state: State) -> State:
        return step(config, grammar, params, state, rows, keys)

    return jax.lax.while_loop(going, body, state)


def step(config: TransformerConfig, grammar: Grammar, params: Any, state: State, rows: Rows, keys: Array) -> State:
    """One token for every row: mix the contexts, mask, draw, then feed the token to all contexts of its row."""
    machine, vocabulary = grammar.automaton, grammar.vocabulary
    R, S = state.tokens.shape
    contexts = state.logits.shape[0] // R

    image = machine.in_image(state.automaton)
    done = machine.done(state.automaton)
    logits = guidance.mix(state.logits, guidance.weights(rows.scale, contexts), image)
    broken = state.broken | (~done & jnp.any(jnp.isnan(logits), axis=-1))
    position = jnp.minimum(rows.lengths + state.step, S - 1)  # a row that is done stays within its cache
    token = decoding.choose(
        logits,
        machine.allowed(state.automaton),
        machine.forced(state.automaton),
        rows.filters.at(image),
        keys,
        position,
    )

    companion = guidance.companion_position(vocabulary, token, state.companion, len(grammar.unconditional))
    model = Transformer.bind(config, params)
    hidden, cache = model.extend(
        jnp.tile(token, contexts)[:, None],
        state.cache,
        jnp.concatenate([position, *[companion] * (contexts - 1)]),
    )
    return State(
        step=state.step + 1,
        logits=model.logits(hidden[:, 0]),
        cache=cache,
        companion=companion,
        automaton=machine.advance(state.automaton, token),
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        broken=broken,
    )


def _rows(jobs: list[_Job], bucket: int, pad: int) -> Rows:
    tokens: Any = np.full((len(jobs), bucket), pad, np.int32)
    for row, job in zip(tokens, jobs, strict=True):
        row[: len(job.prompt)] = job.prompt
    requests = [job.request for job in jobs]
    sizes = [request.image_size or (0, 0) for request in requests]

    def column(values: Iterable[Any], dtype: Any = np.int32) -> Any:
        return np.array(list(values), dtype)

    return Rows(
        tokens=tokens,
        lengths=column(len(job.prompt) for job in jobs),
        remaining=column(job.budget for job in jobs),
        mode=column(MODES[request.mode] for request in requests),
        min_images=column(request.images[0] for request in requests),
        max_images=column(request.images[1] for request in requests),
        height=column(height for height, _ in sizes),
        width=column(width for _, width in sizes),
        seed=column((request.seed for request in requests), np.uint32),
        sample=column(job.index for job in jobs),
        scale=column((request.guidance for request in requests), np.float32),
        filters=Filters.of([(request.text, request.image) for request in requests]),
    )


def _power(n: int) -> int:
    """The smallest of 16, 32, 64, ... that holds n tokens."""
    return max(_SMALLEST, 1 << (n - 1).bit_length())


def _bucket(n: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds n tokens: every step of decoding reads all of it."""
    power = _power(n)
    return power * 3 // 4 if n <= power * 3 // 4 and power > _SMALLEST else power
