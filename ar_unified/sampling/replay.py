"""Which ids could have been drawn for each token of a sample: runs the tokens through the automaton again, all samples
at once.

A trainer needs it to compute the probability with which a token was drawn: only some ids were allowed, and if there was
only one, nothing was drawn.

Axes: B samples, n their tokens, K ranges.
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
    """For samples and their plans: which ids each token was drawn from.

    Args:
        length: n, tokens of the longest sample at most.

    Returns:
        drawn, bool [B, n]: there was a choice; not what was given or forced. spans, int32 [B, n, K, 2], the ids that
        were allowed (`language.spans`). image, bool [B, n]: it is an image code. All are False or empty behind the end.
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
