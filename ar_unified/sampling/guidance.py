"""Classifier-free guidance: a picture's logits as a weighted sum over C contexts of the same row.

Context 0 is the request itself; context 1, the companion, is what the picture is compared with: the grammar's one
`unconditional` prefix followed by the current picture's tokens alone. Rows are laid out context-major, [C * B] =
[request rows | companion rows], so mixing is a reshape and both contexts run in one forward. In text a companion waits
at the end of its prefix; at every <boi> it starts again from there. Only image codes are guided: text, sizes and
control tokens come from the request's own logits.

A third context (Chameleon's and InstructPix2Pix's "pictures only", weights [s_t, s_i - s_t, 1 - s_i]) is one more
block of rows and one more weight.

Axes: C contexts, B rows, V vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ar_unified.vocabulary import Role, Vocabulary


def weights(scale: Array, contexts: int) -> Array:
    """f32 [C, B]: what each context counts for at guidance `scale` [B]; they add up to 1.

    C = 2 is Ho & Salimans' u + s (c - u). On logits or on log-probabilities: the two differ by a constant per row.
    """
    if contexts == 1:
        return jnp.ones((1, *scale.shape), jnp.float32)
    if contexts == 2:
        return jnp.stack([scale, 1 - scale]).astype(jnp.float32)
    raise ValueError(f"contexts: expected 1 (no guidance) or 2 (guided by one scale), found {contexts}")


def mix(logits: Array, weights: Array, guided: Array) -> Array:
    """f32 [B, V] from logits f32 [C * B, V], weights [C, B] and guided bool [B] (the next token is an image code).

    Rows that are not guided, and rows whose companions weigh nothing, keep their own logits bit for bit.
    """
    contexts, rows = weights.shape
    logits = logits.reshape(contexts, rows, -1)
    if contexts == 1:
        return logits[0]
    guided = guided & jnp.any(weights[1:] != 0, axis=0)
    return jnp.where(guided[:, None], jnp.sum(weights[:, :, None] * logits, axis=0), logits[0])


def companion_position(vocabulary: Vocabulary, token: Array, position: Array, start: int) -> Array:
    """Where a companion row writes `token`: int32, any shape.

    <boi> and everything outside a picture goes to slot `start`, right behind the unconditional prefix, where the next
    <boi> overwrites it; a picture's tokens follow its <boi>. `position`: where the token before went.
    """
    role = vocabulary.role(token)
    inside = (role == Role.IMAGE) | (role == Role.SIZE) | (token == vocabulary.eol)
    return jnp.where(inside, position + 1, start)
