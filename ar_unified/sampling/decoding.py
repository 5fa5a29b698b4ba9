"""Draws one token per row from logits: temperature, top-k and top-p per row and modality, then Gumbel-argmax.

Nothing is sorted. A row's top-k or top-p set is {values >= t} for one threshold t, and a search finds t, as in T5X and
tpu-inference. This search runs on the bits of the floats, so the set is exact, except that all ties are kept. Noise
depends only on (seed, sample, position), so a row draws the same token in any slot of any batch.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ar_unified.kernels.row_max import row_max
from ar_unified.sampling.threshold import ranked, threshold

_FLOOR = -1e30  # replaces NaN and -inf of allowed tokens: below every finite logit, above every forbidden one


@dataclass(frozen=True)
class Filter:
    """How to draw a token. Temperature 0 takes the most likely token. top_k is applied before top_p. top_k 0 and
    top_p 1 mean no filter.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self, name: str) -> None:
        """Raises ValueError that names `name` and the first invalid field."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"{name}.temperature: expected a finite number >= 0, found {self.temperature}")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"{name}.top_k: expected a whole number >= 0 (0: off), found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{name}.top_p: expected 0 < top_p <= 1 (1: off), found {self.top_p}")


class Filters(NamedTuple):
    """The filters of B rows as arrays [B, 2]; column 0 is for text and control tokens, column 1 for image codes."""

    temperature: Array  # f32
    top_k: Array  # i32
    top_p: Array  # f32

    @classmethod
    def of(cls, pairs: Sequence[tuple[Filter, Filter]]) -> Filters:
        """Makes the arrays from one (text, image) pair of filters per row."""
        columns = [[[getattr(f, name) for f in pair] for pair in pairs] for name in cls._fields]
        types = (jnp.float32, jnp.int32, jnp.float32)
        return cls(*(jnp.asarray(column, t) for column, t in zip(columns, types, strict=True)))

    def at(self, image: Array) -> Filters:
        """The filter of each row, arrays [B]. image: bool [B], whether the row's next token is an image code."""
        return Filters(*(jnp.where(image, column[:, 1], column[:, 0]) for column in self))


def row_keys(seed: Array, sample: Array) -> Array:
    """The random key of each row, [B], from its seed, uint32 [B], and its sample's index, int32 [B]. The code names the
    random generator, so that a change of jax's default changes nothing.
    """
    return jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s, impl="threefry2x32"), i))(seed, sample)


def choose(
    logits: Array, allowed: Array | None, active: Array, filters: Filters, keys: Array, position: Array
) -> tuple[Array, Array]:
    """Draws the next token of every row, int32 [B], an index into the logits. Also returns whether the row's logits had
    a NaN, bool [B].

    Args:
        logits: f32 [B, V], guidance already mixed in. NaN and -inf count as the least likely.
        allowed: bool [B, V]; only allowed tokens are ever returned, whatever the logits are. None: all are allowed.
        active: bool [B], the rows that need a token; all other rows get an arbitrary token at no cost.
        filters: one filter per row, arrays [B] (`Filters.at`).
        keys: [B] from `row_keys`.
        position: int32 [B], the token's position in its sequence, prompt included.
    """
    drawn = active & (filters.temperature > 0)  # these rows need noise; for the others, argmax is enough
    nan = jnp.isnan(logits)
    broken = active & jnp.any(nan, axis=-1)
    logits = jnp.clip(jnp.where(nan, _FLOOR, logits), _FLOOR, -_FLOOR)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)

    def draw(logits: Array) -> Array:
        temperature = jnp.where(drawn, filters.temperature, 1.0)[:, None]
        scaled = (logits - row_max(logits)) / temperature
        scaled = jnp.maximum(scaled, _FLOOR)
        if allowed is not None:
            scaled = jnp.where(allowed, scaled, -jnp.inf)
        keep = nucleus(scaled, jnp.where(drawn, filters.top_k, 0), jnp.where(drawn, filters.top_p, 1.0))
        noise = jax.vmap(lambda key, p: jax.random.gumbel(jax.random.fold_in(key, p), logits.shape[-1:]))
        noisy = jnp.where(keep, scaled + noise(keys, position), -jnp.inf)
        return jnp.where(drawn[:, None], noisy, logits)

    logits = jax.lax.cond(jnp.any(drawn), draw, lambda logits: logits, logits)
    return _argmax(logits), broken


def log_probability(logits: Array, allowed: Array | None, filters: Filters, token: Array) -> Array:
    """Returns the log-probability, f32 [B], with which `choose` draws `token`, int32 [B]. It is 0 at temperature 0. The
    other arguments are those of `choose`. The result is arbitrary for an id outside the logits."""
    drawn = filters.temperature > 0
    scaled = jnp.clip(logits, _FLOOR, -_FLOOR) / jnp.where(drawn, filters.temperature, 1.0)[:, None]
    if allowed is not None:
        scaled = jnp.where(allowed, scaled, -jnp.inf)
    kept = jnp.where(nucleus(scaled, filters.top_k, filters.top_p), scaled, -jnp.inf)
    own = jnp.take_along_axis(scaled, token[:, None], axis=1, mode="clip")[:, 0]
    return jnp.where(drawn, own - jax.nn.logsumexp(kept, axis=-1), 0.0)


def penalize(logits: Array, seen: Array, penalty: Array) -> Array:
    """Returns the logits, f32 [B, V], with a penalty on the tokens in `seen`, bool [B, V]. Their logits are divided by
    `penalty` [B] if they are above 0, and multiplied by it otherwise."""

    def penalized(logits: Array) -> Array:
        factor = penalty[:, None]
        return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)

    return jax.lax.cond(jnp.any(penalty != 1), penalized, lambda logits: logits, logits)


def nucleus(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Returns which tokens stay, bool [B, V]. top_k keeps the k most likely tokens of a row. Of these, top_p keeps the
    smallest set with a total probability of top_p or more.

    logits f32 [B, V] (-inf: not allowed), top_k i32 [B] (0: off), top_p f32 [B] (1: off; probabilities are renormalised
    after top_k). If logits tie at the threshold, all of them stay. A filter that no row uses costs nothing.
    """
    ranks, floor = ranked(logits), jnp.zeros(logits.shape[:1], jnp.uint32)
    least, used = top_k.astype(jnp.float32), (top_k > 0) & (top_k < logits.shape[-1])

    def most_likely(floor: Array) -> Array:
        return jnp.where(used, threshold(ranks, None, least, used), floor)

    floor = jax.lax.cond(jnp.any(used), most_likely, lambda floor: floor, floor)

    def probable(floor: Array) -> Array:
        kept = jnp.where(ranks >= floor[:, None], logits, -jnp.inf)
        p = jnp.exp(kept - row_max(kept))
        p = jax.lax.optimization_barrier(p / jnp.sum(p, axis=-1, keepdims=True))
        return jnp.where(top_p < 1, jnp.maximum(threshold(ranks, p, top_p, top_p < 1), floor), floor)

    floor = jax.lax.cond(jnp.any(top_p < 1), probable, lambda floor: floor, floor)
    return (ranks >= floor[:, None]) & (logits > -jnp.inf)


def _argmax(x: Array) -> Array:
    """jnp.argmax(x, -1) for x [B, V] without NaN, int32 [B]. XLA on CPUs does not vectorise jnp.argmax, but it
    vectorises the two reductions used here. The barrier stops XLA from computing the noise again for each reduction.
    """
    x = jax.lax.optimization_barrier(x)
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(x == row_max(x), index, x.shape[-1] - 1), axis=-1)
