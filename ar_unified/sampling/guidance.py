"""Classifier-free guidance: an image's logits are a weighted sum over the C contexts of its request.

Context 0 is the request itself. The others are unconditional contexts to compare with. Each has a prefix and then only
images. A context "resets" if each new image starts again from the prefix. The context "image_only" does not reset: it
keeps the earlier images. Only image codes are guided: text, sizes and control tokens come from the request's own
logits. After its prefix, an unconditional context never reads text.

All contexts of a request run in one forward, as rows side by side: [R * C]. So mixing is a reshape, and all contexts of
a request are on one device, no matter how rows are split over devices.

    C = 2   own | unconditional                   weights [s, 1 - s]
    C = 3   own | unconditional | images only     weights [s, 1 - s_i, s_i - s]

Axes: R requests, C contexts, V vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ar_unified.language.automaton import Event


def weights(scale: float, image_scale: float, contexts: int) -> list[float]:
    """The weights of the contexts, which add up to 1. image_scale is the scale of the third context.

    Let c be the logits of context 0, u those of context 1 and i those of context 2. Then C = 2 is Ho &
    Salimans' u + s (c - u), and C = 3 is InstructPix2Pix's u + s_i (i - u) + s (c - i). The weights may be applied to
    logits or to log-probabilities, because the two differ by a constant per row.
    """
    if contexts == 1:
        return [1.0]
    if contexts == 2:
        return [scale, 1 - scale]
    return [scale, 1 - image_scale, image_scale - scale]


def mix(logits: Array, weights: Array) -> Array:
    """Mixes logits f32 [R, C, V] with weights f32 [R, C]; returns f32 [R, V].

    Rows that give their unconditional contexts weight 0 keep their own logits bit for bit.
    """
    if weights.shape[1] == 1:
        return logits[:, 0]
    mixed = sum(weights[:, c, None] * logits[:, c] for c in range(weights.shape[1]))
    return jnp.where(jnp.any(weights[:, 1:] != 0, axis=1)[:, None], mixed, logits[:, 0])


def advance(event: Event, position: Array, start: Array, resets: Array) -> tuple[Array, Array]:
    """Returns the place where each context writes a token, and the place of its next token, int32 [R, C] each.

    Args:
        event: three arrays, bool [R]: whether each row's token begins an image, belongs to one, or ends one.
        position: int32 [R, C], the place after everything that each context has read so far.
        start: int32 [R, C], the place after each context's prefix.
        resets: bool [R, C]; False for context 0.

    An unconditional context does not read text. It writes all text tokens to one place: after its last image or, if it
    resets, after its prefix. The next <boi> overwrites that place.
    """
    begins, image, ends = (x[:, None] for x in event)
    writes = jnp.where(begins & resets, start, position)
    reads = image | (jnp.arange(position.shape[1]) == 0)
    behind = jnp.where(reads, writes + 1, writes)
    return writes, jnp.where(resets & (ends | ~image), start, behind)
