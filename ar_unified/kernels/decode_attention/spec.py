"""The arguments of decode attention in the form that its implementations take."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """A cache and the slots that queries see. In row b, queries see the slots begin[b] <= s < end[b]; there may be
    none.

    Attributes:
      k, v: [B, K, S, H].
      scales: the factors of keys and of values, float32 [B, K, 1, S] each; None: no factors.
      begin, end: int32 [B], 0 <= begin < end <= S or both 0.
    """

    k: jax.Array
    v: jax.Array
    scales: tuple[jax.Array, jax.Array] | None
    begin: jax.Array
    end: jax.Array

    @property
    def seen(self) -> jax.Array:
        """Whether queries see each slot, bool [B, S]."""
        s = jnp.arange(self.k.shape[2], dtype=jnp.int32)
        return (self.begin[:, None] <= s) & (s < self.end[:, None])

    def before(self, n: int) -> Cache:
        """The same cache for queries that are n positions earlier. `self.end` may lie beyond the cache."""
        end = jnp.clip(self.end - n, 0, self.k.shape[2])
        return self._replace(begin=jnp.maximum(self.begin - n, 0), end=end)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The settings that a kernel is compiled for, besides shapes.

    Attributes:
      scale: factor of the scores.
      soft_cap: scores become soft_cap * tanh(score / soft_cap); None: no change.
      interpret: emulate the kernel on a CPU.
    """

    scale: float
    soft_cap: float | None = None
    interpret: bool = False
