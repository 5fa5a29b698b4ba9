"""Random numbers as functions of a stream and a counter. Element i is the same for every caller and in any order.

A stream is named by `key(seed, source, epoch, ...)`. Nothing here has state, so the batch, permutation or choice of any
step can be computed without the steps before it. The numbers never change between versions, so training continues in
the same order after an update.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def key(*parts: int | str) -> np.uint64:
    """One number that depends on all parts and their order. It names a stream of random numbers."""
    text = "\0".join(f"{'s' if isinstance(part, str) else 'i'}{part}" for part in parts)
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def hash64(stream: np.uint64, counter: Any) -> np.ndarray:
    """Random uint64 of the shape of `counter`. Element i depends only on `stream` and counter[i] (splitmix64)."""
    with np.errstate(over="ignore"):
        z = stream + (np.asarray(counter).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(stream: np.uint64, counter: Any) -> np.ndarray:
    """Like `hash64`, but float64 in [0, 1)."""
    return (hash64(stream, counter) >> np.uint64(11)) * 2.0**-53


def permute(index: Any, size: Any, stream: Any) -> np.ndarray:
    """Returns the place, int64, to which a random permutation of 0..size-1 moves each element of `index`. The
    permutation is never stored.

    A Feistel network permutes the numbers below the next power of four. It is repeated until the result is below
    `size`. `index`, `size` and `stream` (uint64) are broadcast. Every size has its own permutation. Each call has many
    small steps, so make few calls with large arrays.
    """
    given = (np.asarray(each, dtype) for each, dtype in ((index, np.int64), (size, np.int64), (stream, np.uint64)))
    index, size, stream = np.broadcast_arrays(*given)
    half = np.maximum(1, (np.frexp(np.maximum(size - 1, 1).astype(np.float64))[1] + 1) // 2).astype(np.uint64)
    out, facts = (
        index.astype(np.uint64).reshape(-1),
        [each.reshape(-1) for each in (half, size.astype(np.uint64), stream)],
    )
    outside = np.arange(out.size)
    while outside.size:
        half, size, stream = (each[outside] for each in facts)
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = out[outside] >> half, out[outside] & mask
        for turn in range(4):
            mixed = hash64(stream ^ np.uint64(turn << 60), right ^ (size << np.uint64(20)))
            left, right = right, left ^ (mixed & mask)
        out[outside] = (left << half) | right
        outside = outside[out[outside] >= size]
    return out.reshape(index.shape).astype(np.int64)
