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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ar_unified.kernels.row_max import row_max

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
    drawn = active & (filters.temperature > 0)  # these rows need noise; the others are done by argmax
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
    """f32 [B]: the log-probability with which `choose` draws `token`, int32 [B]; 0 at temperature 0. The other
    arguments are those of `choose`. The result is arbitrary for an id outside the logits."""
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
    """Which tokens stay, bool [B, V]: the top_k of a row, and of these the smallest set with probability top_p or more.

    logits f32 [B, V] (-inf: not allowed), top_k i32 [B] (0: off), top_p f32 [B] (1: off; probabilities are renormalised
    after top_k). If logits tie at the threshold, all of them stay. A filter that no row uses costs nothing.
    """
    ranks = _ranks(logits)
    used = jnp.stack([(top_k > 0) & (top_k < logits.shape[-1]), top_p < 1])
    least = jnp.where(used, jnp.stack([top_k.astype(jnp.float32), top_p]), 0)

    def cut(i: Array, floor: Array) -> Array:
        """The threshold of a row's top_k (i = 0), where each token has weight 1, or of its top_p (i = 1), where
        the weight of a token is its probability."""
        kept = jnp.where(ranks >= floor[:, None], logits, -jnp.inf)
        p = jnp.exp(kept - row_max(kept))
        weight = jnp.where(i == 0, 1.0, p / jnp.sum(p, axis=-1, keepdims=True))
        found = _threshold(ranks, jax.lax.optimization_barrier(weight), least[i], used[i])
        return jnp.where(used[i], jnp.maximum(found, floor), floor)

    def cut_if_used(i: Array, floor: Array) -> Array:
        return jax.lax.cond(jnp.any(used[i]), cut, lambda i, floor: floor, i, floor)

    floor = jax.lax.fori_loop(0, 2, cut_if_used, jnp.zeros(logits.shape[:1], jnp.uint32))
    return (ranks >= floor[:, None]) & (logits > -jnp.inf)


def _argmax(x: Array) -> Array:
    """jnp.argmax(x, -1) for x [B, V] without NaN, int32 [B]. XLA on CPUs does not vectorise jnp.argmax, but it
    vectorises the two reductions used here. The barrier stops XLA from computing the noise again for each reduction.
    """
    x = jax.lax.optimization_barrier(x)
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(x == row_max(x), index, x.shape[-1] - 1), axis=-1)


def _ranks(x: Array) -> Array:
    """Maps floats to uint32 in the same order: flips all bits of a negative float, and the sign bit of a positive
    one.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(ranks: Array, weight: Array, least: Array, used: Array) -> Array:
    """For each row that is `used`: a threshold t, uint32 [B], such that {rank >= t} is the smallest set of this form
    with weight `least` or more.

    Args:
        ranks: uint32 [B, V].
        weight: f32 [B, V], >= 0.
        least: f32 [B], less than the weight of the whole row.

    The search narrows a bracket around t, by interpolation and bisection in turn. A row is done as soon as its bracket
    contains a single token. This takes 6 to 12 passes over the logits, and never more than 64.
    """

    def measure(t: Array) -> tuple[Array, Array]:
        inside = ranks >= t[:, None]
        return jnp.sum(jnp.where(inside, weight, 0), axis=-1), jnp.sum(inside, axis=-1, dtype=jnp.int32)

    def unsettled(low: Array, high: Array, at_low: Any, at_high: Any) -> Array:
        alone = (at_low[1] - at_high[1] <= 1) | (at_low[0] == least)
        return used & (high - low > 1) & ~alone

    def body(carry: Any) -> Any:
        i, low, high, at_low, at_high = carry
        width = high - low
        share = (at_low[0] - least) / jnp.maximum(at_low[0] - at_high[0], 1e-30)
        share = jnp.where(i % 2 == 0, jnp.clip(share, 0.02, 0.98), 0.5)
        t = low + jnp.clip((width.astype(jnp.float32) * share).astype(jnp.uint32), 1, jnp.maximum(width, 2) - 1)
        found = measure(t)
        going, enough = unsettled(low, high, at_low, at_high), found[0] >= least

        def pick(rows: Array, new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(rows, a, b), new, old)

        low, at_low = pick(going & enough, (t, found), (low, at_low))
        high, at_high = pick(going & ~enough, (t, found), (high, at_high))
        return i + 1, low, high, at_low, at_high

    low = jnp.min(ranks, axis=-1)
    nothing = jnp.zeros(low.shape, jnp.float32), jnp.zeros(low.shape, jnp.int32)
    everything = jnp.sum(weight, axis=-1), jnp.full(low.shape, ranks.shape[-1], jnp.int32)
    carry = (jnp.int32(0), low, jnp.max(ranks, axis=-1) + 1, everything, nothing)
    return jax.lax.while_loop(lambda carry: jnp.any(unsettled(*carry[1:])), body, carry)[1]
