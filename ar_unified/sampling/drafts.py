"""The guesses that a pool keeps between two steps of `window.py`.

Axes: R slots, C contexts, n guesses, D model.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ar_unified.language import automaton
from ar_unified.language.automaton import Opened, Wanted
from ar_unified.language.grammar import Grammar
from ar_unified.model.config import TransformerConfig


class Drafts(NamedTuple):
    """n guesses for each row: the tokens that may follow its next token. `window.py` makes, reads and checks them."""

    tokens: Array  # i32 [R, n]; -1: no guess here or at any later place
    hidden: Array  # [R * C, n, D], the hidden state after each guess
    automaton: automaton.State  # [R, n] each, the state after each guess
    position: Array  # i32 [R, n, C], the positions after each guess
    codes: Array  # i32 [R, codes of the largest image], the codes of the current image


def no_drafts(config: TransformerConfig, grammar: Grammar, slots: int, contexts: int, width: int) -> Drafts | None:
    """Returns empty drafts for a pool that begins to draw `width` positions at once, or None if `width` is 1."""
    if width == 1:
        return None
    n, machine = width - 1, grammar.automaton.resume(Opened(jnp.zeros(slots, jnp.int32)), Wanted())
    return Drafts(
        jnp.full((slots, n), -1, jnp.int32),
        jnp.zeros((slots * contexts, n, config.d_model), config.dtype),
        jax.tree.map(lambda x: jnp.zeros((slots, n), x.dtype), machine),
        jnp.zeros((slots, n, contexts), jnp.int32),
        jnp.zeros((slots, grammar.layout.height * grammar.layout.width), jnp.int32),
    )


def forgotten(drafts: Drafts | None, rows: Array | bool = True) -> Drafts | None:
    """Removes the drafts of `rows`, bool [R], because they no longer fit the next tokens of these rows."""
    if drafts is None:
        return None
    gone = jnp.broadcast_to(rows, drafts.tokens.shape[:1])[:, None]
    return drafts._replace(tokens=jnp.where(gone, -1, drafts.tokens))
