"""Finds which ids could have been drawn for each token of a sample. It runs the tokens of all samples through the
automaton again, in parallel.

A trainer needs this to compute the probability with which a token was drawn, because the grammar allowed only some ids.
If it allowed only one id, nothing was drawn.

Axes: B samples, n tokens of a sample, K ranges.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.language.grammar import Grammar
from ar_unified.language.spans import spans
from ar_unified.sampling.plan import Plan
from ar_unified.sampling.request import Sample
from ar_unified.sampling.steps import Start


def replay(grammar: Grammar, served: Sequence[tuple[Plan, Sample]], length: int) -> tuple[np.ndarray, ...]:
    """Finds which ids were allowed when each token was drawn. `served` has samples with their plans.

    Args:
        length: n, an upper bound on the tokens of a sample.

    Returns:
        drawn, bool [B, n]: whether there was a choice, so False for given and forced tokens. spans, int32 [B, n, K, 2]:
        the ids that were allowed (`language.spans`). image, bool [B, n]: whether the token is an image code. After the
        end of a sample, all are False or empty.
    """
    tokens = np.full((len(served), length), -1, np.int32)
    for row, (plan, sample) in zip(tokens, served, strict=True):
        later = sample.tokens[len(plan.given) :]
        row[: len(later)] = later
    starts = [plan.start for plan, _ in served]
    start = jax.tree.map(lambda *values: np.array(values, np.int32), *starts)
    found = jax.device_get(_replayed(grammar, start, tokens))
    out = tuple(np.zeros_like(each) for each in found)
    for at, (plan, sample) in enumerate(served):
        given, n = len(plan.given), len(sample.tokens)
        for of, to in zip(found, out, strict=True):
            to[at, given:n] = of[at, : n - given]
    return out


@functools.partial(jax.jit, static_argnums=0)
def _replayed(grammar: Grammar, start: Start, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    machine = grammar.automaton

    def step(state, token):
        there = (token >= 0) & ~machine.done(state)
        drawn = there & (machine.forced(state) < 0)
        after = machine.advance(state, jnp.maximum(token, 0))
        after = jax.tree.map(lambda new, old: jnp.where(there, new, old), after, state)
        return after, (drawn, spans(machine, state), drawn & machine.in_image(state))

    found = jax.lax.scan(step, machine.resume(*start), tokens.T)[1]
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
