"""The least time that decoding can take: every step reads the weights once, and the cache of each row.

This follows "How to Scale Your Model" (jax-ml/scaling-book, inference): memory bandwidth limits decoding up to hundreds
of rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.model.cache import default_dtype
from ar_unified.sampling.engine import Engine


class MemoryTime:
    """Adds up the time, in seconds, to read the weights and cache for an engine's samples at `rate` bytes a second.

    The bound is a little low, because prompts are left out.
    """

    def __init__(self, engine: Engine, rate: float):
        config = engine.config
        element = 1 if engine.kv_dtype == "int8" else jnp.dtype(engine.kv_dtype or default_dtype(config)).itemsize
        self._position = 2 * config.n_layers * config.n_kv_heads * config.head_dim * element
        # A step reads the weights, in the compute dtype or in fewer bits, once for all samples that are decoded
        # together.
        width = jnp.dtype(config.dtype).itemsize
        weights = sum(leaf.size * min(leaf.dtype.itemsize, width) for leaf in jax.tree.leaves(engine.params))
        self._token = weights / engine.batch_size
        self._rate = rate
        self.seconds = 0.0

    def add(self, tokens: int, contexts: int) -> None:
        """Adds a sample of `tokens` tokens, decoded in `contexts` contexts."""
        self.seconds += (tokens * self._token + contexts * tokens * (tokens + 1) / 2 * self._position) / self._rate
