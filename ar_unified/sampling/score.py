"""Log-likelihoods of given parts under a model, by teacher forcing.

Axes: b rows of a batch, P their padded length, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_unified.language.document import Document, Part, TokensPart
from ar_unified.language.grammar import Grammar
from ar_unified.model.config import TransformerConfig
from ar_unified.model.loss import in_softmax
from ar_unified.model.transformer import Transformer
from ar_unified.sampling.plan import part_tokens, prompt_tokens
from ar_unified.sampling.request import Request

_POSITIONS = 64  # number of positions whose logits, [b, 64, V], are in memory at once


@dataclass(frozen=True)
class PartScore:
    """The score of one part: its log-likelihood in nats given everything before it, its number of tokens, and whether
    every token was the likeliest at its position.
    """

    log_likelihood: float
    tokens: int
    greedy: bool


@dataclass(frozen=True)
class Score:
    """The score of an answer: the scores of its parts, and the score of the <eos> after them."""

    parts: tuple[PartScore, ...]
    eos: PartScore

    @property
    def log_likelihood(self) -> float:
        """The sum over all parts, in nats, without <eos>."""
        return sum(part.log_likelihood for part in self.parts)

    @property
    def tokens(self) -> int:
        """The number of tokens of all parts, without <eos>."""
        return sum(part.tokens for part in self.parts)


Scored = Document | tuple[Request, Sequence[Part | TokensPart]]


def pieces(grammar: Grammar, item: Scored) -> list[np.ndarray]:
    """The token ids of the prompt, of each part to be scored, and of <eos>. Raises GrammarError or RequestError.

    For a Document, the prompt is everything before its last answer; if it has no turns, all parts are scored. For a
    pair of a request and an answer, the prompt is the request's. If the request's `turn` is False, the answer continues
    the prompt's text.
    """
    if isinstance(item, Document):
        grammar.encode(item)  # an error here names a wrong part by its index in the document
        request = Request.asking(item)
        answer: Sequence[Part | TokensPart] = item.answer
    else:
        request, answer = item
    alone = [part_tokens(grammar, part) for part in answer]
    return [prompt_tokens(grammar, request), *alone, np.array([grammar.syntax.end], np.int32)]


def forward(
    config: TransformerConfig, used: int, split: int | None, params: Any, tokens: Array, adapter: Array
) -> tuple[Array, Array]:
    """Returns two values for each token after the first of its row: its log-probability given the tokens before it,
    f32 [b, P - 1], and whether it was the likeliest id, bool [b, P - 1].

    tokens: int32 [b, P]. `used` and `split` are arguments of `token_losses`. adapter: the number of each row's adapter,
    int32 [b].
    """
    model = Transformer.bind(config, params)
    b, P = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (b, P))
    hidden = model(tokens, positions, jnp.zeros_like(tokens), adapter=adapter)
    chunk = min(_POSITIONS, P)

    def one(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, target = piece
        logits = in_softmax(model.logits(hidden, adapter), jnp.arange(config.vocab_size), target, used, split)
        own = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return own - jax.nn.logsumexp(logits, axis=-1), own >= jnp.max(logits, axis=-1)

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(b, P // chunk, chunk, *x.shape[2:]), 1, 0)

    found = jax.lax.map(one, (cut(hidden), cut(jnp.roll(tokens, -1, axis=1))))
    log_likelihood, greedy = (jnp.moveaxis(x, 0, 1).reshape(b, P)[:, :-1] for x in found)
    return log_likelihood, greedy


def scores(items: Sequence[list[np.ndarray]], log_likelihood: np.ndarray, greedy: np.ndarray) -> Iterator[Score]:
    """The Score of each row's `pieces`, from the results of `forward` for that row."""
    for row, parts in enumerate(items):
        found, at = [], len(parts[0]) - 1
        for part in parts[1:]:
            span = slice(at, at + len(part))
            total = float(log_likelihood[row, span].astype(np.float64).sum())
            found.append(PartScore(total, len(part), bool(greedy[row, span].all())))
            at += len(part)
        yield Score(tuple(found[:-1]), found[-1])


def adapter_of(item: Scored) -> str:
    """The name of the adapter that an item is scored with."""
    return "" if isinstance(item, Document) else item[0].adapter


def batches(items: Iterable[tuple[int, list[np.ndarray]]], width: int, bucket: Any) -> Iterator[tuple[int, list[Any]]]:
    """Groups items by their padded length (`bucket`). Yields pairs of a padded length and up to `width` items."""
    waiting: dict[int, list[Any]] = {}
    for item in items:
        size = bucket(sum(map(len, item[1])))
        group = waiting.setdefault(size, [])
        group.append(item)
        if len(group) == width:
            yield size, waiting.pop(size)
    yield from waiting.items()
