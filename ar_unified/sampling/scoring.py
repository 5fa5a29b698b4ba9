"""How likely given parts are behind a prompt: the teacher-forced forward, nothing drawn.

Axes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_unified.document import Part
from ar_unified.grammar import GrammarError
from ar_unified.model.config import TransformerConfig
from ar_unified.model.transformer import Transformer
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.plan import prompt_tokens
from ar_unified.sampling.request import Request, RequestError, TokensPart

_SMALLEST = 32  # tokens of the smallest bucket
_AHEAD = 8  # batches that are sorted by length together
_ROWS = 8  # read at once: float32 [B, T, V] lies in memory


@dataclass(frozen=True)
class Score:
    """What a model thinks of given parts behind the prompt of `request`.

    Attributes:
        tokens: int32 [n], theirs. logprobs: f32 [n], in nats, each behind all before it, over the whole vocabulary.
        greedy: bool [n], whether it is the most likely token. error: why there is none of this, or "".
    """

    request: Request
    tokens: np.ndarray
    logprobs: np.ndarray
    greedy: np.ndarray
    error: str = ""


def score(engine: Engine, pairs: Iterable[tuple[Request, Sequence[Part | TokensPart]]]) -> Iterator[Score]:
    """One Score for each (request, parts that answer or continue its prompt), in order.

    What the request says of drawing does not matter. <eos> is not scored.
    """
    pairs = iter(pairs)
    while window := list(islice(pairs, _AHEAD * _ROWS)):
        scores: dict[int, Score] = {}
        rows: list[tuple[int, np.ndarray, int]] = []  # place in the window, all tokens, where the scored ones begin
        for i, (request, parts) in enumerate(window):
            try:
                prompt, given = _tokens(engine, request, parts)
                rows.append((i, np.concatenate([prompt, given]), len(prompt)))
            except (RequestError, GrammarError) as error:
                nothing = np.zeros(0, np.float32)
                scores[i] = Score(request, nothing.astype(np.int32), nothing, nothing.astype(bool), str(error))
        rows.sort(key=lambda row: len(row[1]))
        for start in range(0, len(rows), _ROWS):
            batch = rows[start : start + _ROWS]
            length = min(max(_SMALLEST, 1 << (len(batch[-1][1]) - 1).bit_length()), engine.max_length)
            tokens: np.ndarray = np.full((_ROWS, length), engine.grammar.vocabulary.pad, np.int32)
            for row, (_, ids, _) in zip(tokens, batch, strict=False):
                row[: len(ids)] = ids
            logprobs, greedy = jax.device_get(engine.call(_program(engine.config), engine.params, tokens))
            for row, (i, ids, begin) in enumerate(batch):
                where = slice(begin - 1, len(ids) - 1)
                scores[i] = Score(window[i][0], ids[begin:], logprobs[row, where], greedy[row, where])
        yield from (scores[i] for i in range(len(window)))


def _tokens(engine: Engine, request: Request, parts: Sequence[Part | TokensPart]) -> tuple[np.ndarray, np.ndarray]:
    prompt = prompt_tokens(engine.grammar, request)
    given = prompt_tokens(engine.grammar, Request(request.id, tuple(parts), turn=False))[1:]  # without <bos>
    if not len(given):
        raise RequestError("expected parts to score, found none")
    if len(prompt) + len(given) > engine.max_length:
        raise RequestError(
            f"prompt and parts have {len(prompt)} + {len(given)} tokens, but the engine's max_length is "
            f"{engine.max_length}: shorten them or raise max_length"
        )
    return prompt, given


@lru_cache(maxsize=16)
def _program(config: TransformerConfig) -> Any:
    return jax.jit(partial(_forward, config))


def _forward(config: TransformerConfig, params: Any, tokens: Array) -> tuple[Array, Array]:
    """f32 [B, T - 1] and bool [B, T - 1]: of each token but the first. Padding stands behind all that is scored."""
    model = Transformer.bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = model.logits(model(tokens, positions, jnp.zeros_like(tokens))[:, :-1])
    following = tokens[:, 1:, None]
    found = jnp.take_along_axis(logits, following, axis=-1)[..., 0]
    return found - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == following[..., 0]
