"""Turns many requests into many samples by continuous batching.

Requests are served in pools (`steps.Shape`). The pool depends on the number of contexts of a request and on the cache
length that it needs. Both follow from the request alone, and no row depends on another. So a sample does not depend on
the rest of its batch, on its slot, or on the time when it is drawn. For each pool, three programs are compiled.
Temperature, guidance, size, seed and budget are arrays, so no request makes the engine compile another program.

Steps run in chunks. The host is one chunk behind: it starts chunk k + 1 before it reads chunk k. For images of a given
size, the host knows how many tokens a sample takes. So it knows in advance when the sample's slot becomes free, ends
the chunk there, and starts the next sample at once.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ar_unified.interop.peft import Adapter
from ar_unified.language.document import CodesPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.reading import GrammarError
from ar_unified.model.config import TransformerConfig
from ar_unified.sampling import head, logprobs, steps, window
from ar_unified.sampling import score as scoring
from ar_unified.sampling.answer import finished, stopped
from ar_unified.sampling.drafts import no_drafts
from ar_unified.sampling.head import Weights
from ar_unified.sampling.low_rank import beside, number, rows_beside
from ar_unified.sampling.pace import Pace
from ar_unified.sampling.pairs import Pairs
from ar_unified.sampling.plan import Plan, plan
from ar_unified.sampling.prompts import Prompts, bucket, prefill_rows
from ar_unified.sampling.request import Request, RequestError, Sample
from ar_unified.sampling.score import Score, Scored
from ar_unified.sampling.slots import Job, row_arrays
from ar_unified.sampling.steps import CHUNK, Prefix, Shape, State
from ar_unified.sampling.weights import check_weights_dtype

KV_DTYPES = (None, "int8", "float8_e4m3fn", "bfloat16", "float32")
_AHEAD = 4  # samples planned ahead, as a multiple of the slots
_SHORT = 16  # steps of a chunk while samples wait and it is unknown when a slot becomes free
_SHORTEST = 8  # the fewest steps of any other chunk that is cut short


class Programs(NamedTuple):
    """The compiled functions; see `steps`."""

    prepare: Any
    head_parts: Any
    empty: Any
    prefill: Any
    insert: Any
    decode: Any
    told: Any
    several: Any
    drafts: Any
    score: Any


@functools.lru_cache(maxsize=16)
def programs(config: TransformerConfig, grammar: Grammar, mesh: Mesh | None) -> Programs:
    """One set of programs for all engines of a model; `mesh` is an argument only because each mesh needs its own
    programs."""
    return Programs(
        prepare=jax.jit(functools.partial(steps.prepare, config, grammar), static_argnums=0),
        head_parts=jax.jit(functools.partial(head.head_parts, config, grammar)),
        empty=jax.jit(functools.partial(steps.empty, config, grammar), static_argnums=(0, 1, 2, 3)),
        prefill=jax.jit(functools.partial(steps.prefill, config)),
        insert=jax.jit(functools.partial(steps.insert, grammar), donate_argnums=(0,)),
        decode=jax.jit(functools.partial(steps.decode_chunk, config, grammar), donate_argnums=(1,)),
        told=jax.jit(functools.partial(logprobs.decode_chunk, config, grammar), donate_argnums=(1,)),
        several=jax.jit(functools.partial(window.decode_chunk, config, grammar), static_argnums=0, donate_argnums=(2,)),
        drafts=jax.jit(functools.partial(no_drafts, config, grammar), static_argnums=(0, 1, 2)),
        score=jax.jit(functools.partial(scoring.forward, config, grammar.vocabulary.used), static_argnums=0),
    )


def ways_of(batch_size: int, mesh: Mesh | None) -> int:
    """The number of devices over which the mesh splits an engine's rows. Raises ValueError unless this number
    divides the rows."""
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(f"batch_size: expected a multiple of the mesh's {ways} data devices, found {batch_size}")
    return ways


class Engine:
    """Draws samples from one model.

    Args:
        config, params: the transformer and its parameters, from training or from `sampling.weights.settled`. Parameters
            of the same shapes may replace them between calls. Training parameters stay in memory together with the
            sampler's converted copy.
        grammar: the grammar of documents, and its vocabulary.
        batch_size: R, the number of samples decoded at once (with guidance, each takes two or three rows).
        max_length: the most tokens of prompt and answer together, and so the length of the longest KV cache.
        kv_dtype: the dtype of the KV cache, one of KV_DTYPES; None: `model.cache.default_dtype`. int8 has a scale for
            each vector.
        weights_dtype: the dtype of the layers' matrices, one of sampling.weights.WEIGHT_DTYPES; None: the compute
            dtype.
        window: how many positions of an image are drawn at once (`window.py`), one of sampling.pace.WINDOWS.
        mesh: devices to decode on; its data axes split the samples and its tensor axis splits the heads (`parallel`).
        softmax: one of `language.syntax.SOFTMAXES`, the softmax that the model was trained with; `score` uses it.
        adapters: the adapters by the names that requests use (`low_rank`); a request without a name uses the model
            alone.
        logprobs: whether samples have log-probabilities; not possible with a window.

    Raises:
        ValueError: if the model's vocabulary differs from the grammar's, a size is not positive or the mesh does not
            divide it, kv_dtype, weights_dtype, window or softmax is unknown, or logprobs are combined with a window.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: Any,
        grammar: Grammar,
        *,
        batch_size: int,
        max_length: int,
        kv_dtype: str | None = None,
        weights_dtype: str | None = None,
        window: int | str = 1,
        mesh: Mesh | None = None,
        softmax: str = "joint",
        adapters: Mapping[str, Adapter] | None = None,
        logprobs: bool = False,
    ):
        if config.vocab_size != grammar.vocabulary.size:
            raise ValueError(
                f"the model's vocabulary has {config.vocab_size} ids, the grammar's {grammar.vocabulary.size}: "
                "use the checkpoint and the tokenizers of one run"
            )
        if batch_size < 1 or max_length < 2:
            raise ValueError(f"expected batch_size >= 1 and max_length >= 2, found {batch_size} and {max_length}")
        if kv_dtype not in KV_DTYPES:
            expected = ", ".join(str(name) for name in KV_DTYPES)
            raise ValueError(f"kv_dtype: expected one of {expected}; found {kv_dtype!r}")
        check_weights_dtype(weights_dtype)
        if logprobs and str(window) != "1":
            raise ValueError(f"window: expected 1 with logprobs, found {window!r}")
        ways = ways_of(batch_size, mesh)
        self.weights_dtype = weights_dtype
        self.config, self.params, self.grammar = config, params, grammar
        self.adapters = {name: number for number, name in enumerate(["", *(adapters or {})])}  # the number of each name
        self.adapter_hashes = {name: adapter.hash for name, adapter in (adapters or {}).items()}
        if adapters:
            loaded = list(adapters.values())
            more = rows_beside(params, grammar, loaded, mesh)
            self.params = params | {"adapters": beside(config, params, loaded, mesh)} | more
        self.batch_size, self.max_length, self.kv_dtype, self.mesh = batch_size, max_length, kv_dtype, mesh
        self._prefill_rows = prefill_rows(batch_size, ways)
        self._split = grammar.layout.split(grammar.vocabulary, softmax)
        self._programs = programs(config, grammar, mesh)
        self._prepared: tuple[Any, Any] = (None, None)
        of = config, grammar, mesh, batch_size, kv_dtype, weights_dtype, tuple(self.adapters)
        self._pace, self._pairs, self._logprobs = Pace(window, of), Pairs(), logprobs
        self._slot_steps = np.zeros(2, np.int64)  # slots at work and all slots, summed over the steps
        self._drawn = np.zeros(2, np.int64)  # tokens, and steps that samples took for them

    def generate(self, requests: Iterable[Request | Plan]) -> Iterator[Sample]:
        """Yields all samples of all requests as they finish, which is not the order of the requests.

        A request that cannot be served gives one sample with an `error`, and the other requests go on. `requests` is
        read as slots become free, so it may be endless. A Plan (from `plan`) in it is served as it is.
        """
        counted = ((asked, asked.request.n if isinstance(asked, Plan) else asked.n) for asked in requests)
        return self.draw((asked, index) for asked, n in counted for index in range(max(n, 1)))

    def draw(self, samples: Iterable[tuple[Request | Plan, int]]) -> Iterator[Sample]:
        """Like `generate`, for chosen samples given as pairs (request, index)."""
        waiting = _Waiting(self, samples)
        prompts = Prompts(self.prefill, self._prefill_rows, self.grammar.vocabulary.pad)
        while (shape := waiting.shape()) is not None or waiting.refused:
            yield from waiting.pop_refused()
            if shape is not None:
                yield from self._serve(shape, waiting, prompts)

    def score(self, items: Iterable[Scored]) -> list[Score]:
        """Log-likelihoods of the items. Returns one Score for each item, in the same order.

        An item is a document, or a pair of a request and the parts of a possible answer. The last answer of a document
        is scored; a document without turns is scored as a whole. Log-probabilities are over all ids of the softmax,
        without grammar, temperature or filters.

        Raises GrammarError or RequestError for the first item that cannot be tokenized, or has more than max_length
        tokens.
        """
        found: dict[int, Score] = {}
        width, items = self._prefill_rows, list(items)
        for size, group in scoring.batches(enumerate(map(self._pieces, items)), width, bucket):
            tokens, adapter = np.full((width, size), self.grammar.vocabulary.pad, np.int32), np.zeros(width, np.int32)
            adapter[: len(group)] = [self.number(scoring.adapter_of(items[index])) for index, _ in group]
            for row, (_, parts) in zip(tokens, group, strict=False):
                row[: sum(map(len, parts))] = np.concatenate(parts)
            arrays = self.call(self._programs.score, self._split, self.params, tokens, adapter)
            rows = scoring.scores([parts for _, parts in group], *map(np.asarray, arrays))
            found |= {index: score for (index, _), score in zip(group, rows, strict=True)}
        return [found[i] for i in range(len(found))]

    def _pieces(self, item: Scored) -> list[np.ndarray]:
        parts = scoring.pieces(self.grammar, item)
        if (n := sum(map(len, parts))) > self.max_length:
            raise RequestError(f"{n} tokens to score, but max_length is {self.max_length}: raise max_length")
        return parts

    @property
    def occupancy(self) -> float:
        """The share of the slots that were at work, over all steps so far."""
        return float(self._slot_steps[0] / max(self._slot_steps[1], 1))

    @property
    def widest(self) -> int:
        """The largest number of positions of a row that are drawn at once."""
        return self._pace.most

    @property
    def tokens_a_step(self) -> float:
        """The mean number of tokens that a sample got from a step, over all steps so far: 1 without a window."""
        return float(max(self._drawn[0], 1) / max(self._drawn[1], 1))

    def plan(self, request: Request) -> Plan:
        """The request's plan. Raises RequestError or GrammarError that says what to change, if it cannot be served."""
        self.number(request.adapter)
        return plan(self.grammar, request, self.max_length)

    def number(self, adapter: str) -> int:
        """The number of the adapter with this name; 0 for "", which means no adapter. Raises RequestError if the engine
        does not have it.
        """
        return number(self.adapters, adapter)

    # ---- one pool ------------------------------------------------------------------------------------------------

    def _serve(self, shape: Shape, waiting: _Waiting, prompts: Prompts) -> Iterator[Sample]:
        """Serves samples of one shape until no more of them wait."""
        state = self.empty(shape)
        slots: list[Job | None] = [None] * self.batch_size
        behind: tuple[Any, list[Job | None]] | None = None  # the chunk before: its result, and the jobs in its slots
        begun = ended = 0
        while True:
            fresh = {i: job for i, slot in enumerate(slots) if slot is None and (job := waiting.next(shape))}
            yield from waiting.pop_refused()
            if fresh:
                state = self._insert(state, shape, fresh, prompts)
                for i, job in fresh.items():
                    slots[i] = job
                begun += len(fresh)
            now = None
            if any(slots):
                free = np.array([slot is None for slot in slots])
                count = _chunk(slots, waiting.any(shape), self._pace.expected(shape))
                state, packed, count = self.decode(shape, state, free, count)
                packed.copy_to_host_async()
                self._slot_steps += sum(not empty for empty in free) * count, len(slots) * count
                now = packed, list(slots)
                for i, slot in enumerate(slots):
                    if slot is not None and slot.left is not None:
                        slot.left -= count
                        if slot.left <= 0:
                            slots[i] = None
            if behind is not None:
                for sample, job in self.read(shape, *behind):
                    slots = [None if slot is job else slot for slot in slots]
                    ended += 1
                    yield sample
            behind = now
            if behind is None and not any(slots) and not waiting.any(shape):
                if begun != ended:
                    raise RuntimeError(f"{begun - ended} of {begun} samples never ended: a bug in ar_unified")
                return

    def _insert(self, state: State, shape: Shape, fresh: dict[int, Job], prompts: Prompts) -> State:
        """The state with new samples in its slots."""
        R, C = self.batch_size, shape.contexts
        where = [
            (i * C + c, (self.adapters[job.plan.request.adapter], prefix))
            for i, job in fresh.items()
            for c, prefix in enumerate(job.plan.prefixes)
        ]
        batches = prompts.read([prefix for _, prefix in where])
        arrays = row_arrays(self.grammar.layout, shape, R, fresh, self.adapters)
        new = np.isin(np.arange(R), list(fresh))
        for batch, rows in batches:  # the row in `batch` of each prefix; -1: the prefix is in another batch
            there = [(slot, row) for (slot, _), row in zip(where, rows, strict=True) if row >= 0]
            slots, source = np.full(R * C, R * C, np.int32), np.zeros(R * C, np.int32)
            slots[: len(there)], source[: len(there)] = zip(*there, strict=True)
            state = self.call(self._programs.insert, state, batch, source, slots, new, *arrays)
        return state

    def read(self, shape: Shape, packed: Any, owners: Sequence[Job | None]) -> Iterator[tuple[Sample, Job]]:
        """Adds the tokens of a chunk of a pool to its samples, and yields the finished ones."""
        rows, many = np.asarray(packed), np.zeros(3, np.int64)
        for row, job in zip(rows, owners, strict=True):
            if job is None or job.finished:
                continue
            told, (taken, done, broken) = row[: CHUNK if self._logprobs else 0], row[-steps.FACTS :]
            drawn = row[len(told) : -steps.FACTS]
            there = drawn != self.grammar.vocabulary.pad
            job.tokens.append(drawn[there])
            if self._logprobs:
                job.logprobs.append(told.view(np.float32)[there])
            many += len(job.tokens[-1]), taken, taken > 0
            self._drawn += len(job.tokens[-1]), taken
            if job.left is not None:
                job.left -= len(job.tokens[-1]) - taken
            sample = stopped(self.grammar, job.plan, job.index, job.drawn()) if job.plan.request.stop else None
            if sample is None and done:
                sample = finished(self.grammar, job.plan, job.index, job.drawn(), bool(broken))
            if sample is not None:
                if self._logprobs:
                    sample = replace(sample, logprobs=job.drawn_logprobs()[: len(sample.tokens)])
                job.finished = True
                self._learn(shape, sample)
                yield sample, job
        self._pace.drew(shape, rows.shape[1] // CHUNK, *many)

    def _learn(self, shape: Shape, sample: Sample) -> None:
        """Tells `_pace` which codes of a sample `_pairs` would have guessed, and adds the codes to `_pairs`."""
        if sample.document is not None and self._pace.asks(shape):
            images = [part.codes for part in sample.document.parts if isinstance(part, CodesPart)]
            self._pace.saw(shape, len(sample.tokens), [self._pairs.learn(codes) for codes in images])

    # ---- the device ----------------------------------------------------------------------------------------------

    def empty(self, shape: Shape) -> State:
        """A pool without samples."""
        self._pace.begins()
        return self._made(self._programs.empty, shape, self.batch_size, self.kv_dtype, self._pace.first)

    def decode(self, shape: Shape, state: State, halted: np.ndarray, count: int) -> tuple[State, Any, int]:
        """Calls `steps.decode_chunk` or its variant with a window. Also returns how many steps it asked for, at most
        `count`."""
        width, count, timed = self._pace.next(shape, count)
        drafts = state.drafts
        if width != (1 if drafts is None else 1 + drafts.tokens.shape[1]):
            drafts = self._made(self._programs.drafts, self.batch_size, shape.contexts, width)
            state = state._replace(drafts=drafts)
        program, learned = self._programs.told if self._logprobs else self._programs.decode, list[np.ndarray]()
        if width > 1:
            program, learned = functools.partial(self._programs.several, width), [self._pairs.table]
        if timed:
            jax.block_until_ready(state)
        began = time.monotonic()
        state, packed = self.call(program, self.weights, state, halted, np.int32(count), *learned)
        self._pace.called(shape, width, time.monotonic() - began)
        if timed:
            rows = np.asarray(jax.block_until_ready(packed))
            tokens, taken = np.sum(rows[:, : -steps.FACTS] != self.grammar.vocabulary.pad), rows[:, -steps.FACTS]
            self._pace.took(shape, time.monotonic() - began, tokens / max(taken.sum(), 1), taken.max())
        return state, packed, count

    def prefill(self, tokens: np.ndarray, lengths: np.ndarray, adapter: np.ndarray) -> Prefix:
        """`steps.prefill` of a batch of prompts."""
        return self.call(self._programs.prefill, self.weights, tokens, lengths, adapter)

    @property
    def weights(self) -> Weights:
        """`params` in the form that the steps read, made when first needed."""
        if self._prepared[0] is not self.params:
            if isinstance(self.params["layers"], list):
                made = head.with_head(self.params, *self.call(self._programs.head_parts, self.params))
            else:
                made = self.call(self._programs.prepare, self.weights_dtype, self.params)
            self._prepared = self.params, made
        return self._prepared[1]

    def _made(self, program: Any, *args: Any) -> Any:
        """The arrays from a program without inputs. They are committed to a device if the weights are, like all arrays
        that are computed from the weights. For uncommitted arrays, JAX would compile each program again.
        """
        made, leaf = self.call(program, *args), jax.tree.leaves(self.weights)[0]
        if self.mesh is None and getattr(leaf, "committed", False) and len(leaf.devices()) == 1:
            return jax.device_put(made, *leaf.devices())
        return made

    def call(self, function: Any, *args: Any) -> Any:
        """function(*args) with the mesh in scope."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return function(*args)


class _Waiting:
    """Samples that wait for a slot, planned a little ahead and sorted by the pool that they need."""

    def __init__(self, engine: Engine, samples: Iterable[tuple[Request | Plan, int]]):
        self._engine, self._samples = engine, iter(samples)
        self._queues: dict[Shape, deque[Job]] = {}
        self._plan: tuple[Request | None, Plan | None] = (None, None)  # the last plan: samples of a request share it
        self.refused: list[Sample] = []

    def shape(self) -> Shape | None:
        """The pool for which most samples wait."""
        self._fill()
        return max(self._queues, key=lambda shape: len(self._queues[shape]), default=None)

    def any(self, shape: Shape) -> bool:
        return shape in self._queues

    def next(self, shape: Shape) -> Job | None:
        """The first job that waits for this pool, or None."""
        self._fill()
        if (queue := self._queues.get(shape)) is None:
            return None
        job = queue.popleft()
        if not queue:
            del self._queues[shape]
            self._fill()
        return job

    def pop_refused(self) -> Iterator[Sample]:
        while self.refused:
            yield self.refused.pop(0)

    def _fill(self) -> None:
        most = _AHEAD * self._engine.batch_size
        while sum(map(len, self._queues.values())) < most and (pair := next(self._samples, None)) is not None:
            request, index = pair
            if isinstance(request, Plan):
                self._plan = request.request, request
            elif self._plan[0] is not request:
                try:
                    self._plan = request, self._engine.plan(request)
                except (RequestError, GrammarError) as error:
                    self._plan = request, None
                    self.refused.append(Sample(request, index, np.zeros(0, np.int32), None, "error", str(error)))
            if (found := self._plan[1]) is not None:
                self._queues.setdefault(found.shape, deque()).append(Job(found, index, found.steps))


def _chunk(slots: Sequence[Job | None], waiting: bool, tokens_a_step: float) -> int:
    """How many steps to take: up to the next known end of a sample, if another sample waits for a slot."""
    if not waiting:
        return CHUNK
    if len(slots) == 1:
        tokens_a_step = 1.0  # the only slot: when its sample ends, the chunk stops by itself
    left = [None if slot.left is None else math.ceil(slot.left / tokens_a_step) for slot in slots if slot is not None]
    ends = [n for n in left if n is not None] + [CHUNK if None not in left else _SHORT]
    return max(min(ends), min(_SHORTEST, max(ends)))
