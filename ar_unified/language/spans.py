"""What may come next, as ranges of ids. These are a few numbers per position, while a mask would have one number per
id.

Axes: B rows, K ranges.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_unified.language.automaton import Automaton, State


def spans(automaton: Automaton, state: State) -> jax.Array:
    """int32 [B, K, 2]: the ids that `Automaton.allowed` allows, as ranges [first id, one past the last]. Empty ranges
    allow nothing; ranges may overlap.
    """
    found = automaton.choices(state)

    def one(id: jax.Array, there: jax.Array) -> list[jax.Array]:
        return [id, id + there.astype(jnp.int32)]

    # If the forbidden id is inside the range, the two ranges around it result; otherwise the range and an empty one.
    inside = (found.never >= found.low) & (found.never < found.high)
    between = jnp.where(inside, found.never, found.high)
    ranges = [[found.low, between], [jnp.where(inside, found.never + 1, found.high), found.high]]
    ranges.append(one(found.also, found.has_also))
    ranges.append(one(jnp.full_like(found.low, automaton.syntax.end), found.end))
    if found.digits is not None:
        for digit, id in enumerate(automaton.syntax.digits):
            ranges.append(one(jnp.full_like(found.low, id), found.digits[:, digit]))
    return jnp.stack([jnp.stack(each, axis=-1) for each in ranges], axis=-2).astype(jnp.int32)
