"""Logits -> one token per row: temperature, top-k and top-p per row and modality, then Gumbel-argmax.

No sort: a row's top-k or top-p set is {values >= t} for one threshold t, and t is found bit by bit, 32 passes over the
row whatever k is (the binary search of T5X and tpu-inference, here on the bits themselves, so it is exact up to ties,
which are all kept). Noise belongs to (seed, sample, position) and to nothing else, so a row draws the same token in
any slot of any batch.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_FLOOR = -1e30  # where NaN and -inf of an allowed token go: below everything real, above everything forbidden


@dataclass(frozen=True)
class Filter:
    """How to draw a token. temperature 0: the most likely one. top_k 0, top_p 1: off. top_k first, then top_p."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self, name: str) -> None:
        """Raises ValueError naming `name` and the first field no token could be drawn with."""
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
        """One (text, image) pair per row."""
        columns = [[[getattr(f, name) for f in pair] for pair in pairs] for name in cls._fields]
        types = (jnp.float32, jnp.int32, jnp.float32)
        return cls(*(jnp.asarray(column, t) for column, t in zip(columns, types, strict=True)))

    def at(self, image: Array) -> Filters:
        """The column for each row, [B]: `image` bool [B] says whether its next token is an image code."""
        return Filters(*(jnp.where(image, column[:, 1], column[:, 0]) for column in self))


def row_keys(seed: Array, sample: Array) -> Array:
    """uint32 [B], int32 [B] -> keys [B]. The generator is named, so that a change of jax's default changes nothing."""
    return jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s, impl="threefry2x32"), i))(seed, sample)


def choose(logits: Array, allowed: Array, forced: Array, filters: Filters, keys: Array, position: Array) -> Array:
    """The next token of every row, int32 [B].

    Args:
        logits: f32 [B, V], guidance already mixed in. NaN and -inf count as the least likely.
        allowed: bool [B, V]; nothing outside it is ever returned, whatever the logits are.
        forced: int32 [B]; a token that needs no drawing, or -1.
        filters: [B] each (`Filters.at`).
        keys: [B] from `row_keys`. position: int32 [B], of the token in its sequence, prompt included.
    """
    drawn = (forced < 0) & (filters.temperature > 0)  # these rows need noise; the others are done by argmax
    logits = jnp.clip(jnp.nan_to_num(logits, nan=_FLOOR), _FLOOR, -_FLOOR)
    logits = jnp.where(allowed, logits, -jnp.inf)

    def draw(logits: Array) -> Array:
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = scaled / jnp.where(drawn, filters.temperature, 1.0)[:, None]
        scaled = jnp.where(allowed, jnp.maximum(scaled, _FLOOR), -jnp.inf)
        keep = nucleus(scaled, jnp.where(drawn, filters.top_k, 0), jnp.where(drawn, filters.top_p, 1.0))
        noise = jax.vmap(lambda key, p: jax.random.gumbel(jax.random.fold_in(key, p), logits.shape[-1:]))
        noisy = jnp.where(keep, scaled + noise(keys, position), -jnp.inf)
        return jnp.where(drawn[:, None], noisy, logits)

    logits = jax.lax.cond(jnp.any(drawn), draw, lambda logits: logits, logits)
    return jnp.where(forced >= 0, forced, jnp.argmax(logits, axis=-1).astype(jnp.int32))


def nucleus(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Which tokens stay, bool [B, V]: the top_k of a row, and of these the fewest whose probability reaches top_p.

    logits f32 [B, V] (-inf: not there), top_k i32 [B] (0: off), top_p f32 [B] (1: off; probabilities are renormalised
    after top_k). Of equal logits at the border all stay. A filter that no row uses costs nothing.
    """
    ranks = _ranks(logits)

    def by_count(floor: Array) -> Array:
        k = jnp.where(top_k > 0, top_k, logits.shape[-1])
        return _largest(lambda t: jnp.sum(ranks >= t[:, None], axis=-1) >= k, floor)

    def by_mass(floor: Array) -> Array:
        p = jax.nn.softmax(jnp.where(ranks >= floor[:, None], logits, -jnp.inf), axis=-1)
        found = _largest(lambda t: jnp.sum(jnp.where(ranks >= t[:, None], p, 0), axis=-1) >= top_p, floor)
        return jnp.where(top_p < 1, jnp.maximum(found, floor), floor)

    floor = jnp.zeros(logits.shape[:1], jnp.uint32)
    floor = jax.lax.cond(jnp.any(top_k > 0), by_count, lambda floor: floor, floor)
    floor = jax.lax.cond(jnp.any(top_p < 1), by_mass, lambda floor: floor, floor)
    return (ranks >= floor[:, None]) & (logits > -jnp.inf)


def _ranks(x: Array) -> Array:
    """uint32 in the order of the floats: flip every bit of a negative one, the sign bit of a positive one."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[Array], Array], like: Array) -> Array:
    """The largest uint32 t per row for which `holds(t)`, given that it holds up to some t and for none beyond."""

    def bit(i: Array, t: Array) -> Array:
        higher = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(higher), higher, t)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(like))
