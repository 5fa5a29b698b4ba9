"""Finds copies among many images without looking at all pairs: hashes propose pairs, and `alike` decides about them.

An image is described by 33 numbers: the lowest frequencies of its luma and of two colour differences. Scaling and
recompression do not change them, and small crops change them a little. In each hash table, the hash of an image has one
bit for each of several random directions (Charikar, 2002). Copies often have the same hash in a table, and other images
hardly ever do. Each table is also searched for hashes in which the least certain bits are flipped (multi-probe, Lv et
al., 2007), so few tables are enough. The work grows with the number of images, not with the number of pairs.

In memory, an image takes 33 x 2 bytes, and 16 more for the current table. Its small picture is read only if its hash
equals that of another image.

Axes: `n` images, `m` pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ar_unified.data.filters.alike import SIDE, alike

_TABLES = 8
_TURNED = 4  # bits of a hash that are tried both as they are and flipped
_SPARE = 6  # bits of a hash beyond log2(n), so that a table has several places for each image
_BITS = 63
_NEIGHBOURS = 12  # neighbours on each side that are compared, if many images share a hash
_FAR = 4.6  # maximum distance between the numbers of copies, in standard deviations; unrelated images are about 8 apart
_CHUNK = 1 << 16

_LOW = [(i, j) for i in range(6) for j in range(6 - i)]
_LOW_COLOUR = [(i, j) for i in range(3) for j in range(3 - i)]
# Minimum of the standard deviation, needed if all images are alike: a third to a tenth of the value for photos.
_LEAST = np.array([0.02 / (1 + i + j) for i, j in (*_LOW, *_LOW_COLOUR, *_LOW_COLOUR)])


def frequencies(small: np.ndarray) -> np.ndarray:
    """The numbers that describe an image: uint8 [n, SIDE, SIDE, 3] -> float16 [n, 33]."""
    pixels = small.astype(np.float32).transpose(3, 0, 1, 2) / 255
    light = 0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]
    waves = np.cos(np.pi * np.outer(np.arange(6), np.arange(SIDE) + 0.5) / SIDE).astype(np.float32) / SIDE
    numbers = []
    for plane, kept in ((light, _LOW), (pixels[2] - light, _LOW_COLOUR), (pixels[0] - light, _LOW_COLOUR)):
        found = waves @ plane @ waves.T
        numbers += [found[:, i, j] for i, j in kept]
    return np.stack(numbers, -1).astype(np.float16)


def copies(small: np.ndarray, numbers: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Nearly all pairs of images that are copies of each other: int64 [m, 2], indices into `which`, i < j, sorted.

    Args:
        small: uint8 [N, SIDE, SIDE, 3], the small pictures of all images; may be a file (`np.memmap`).
        numbers: their `frequencies`, [N, 33].
        which: int64 [n], the images that are compared.
    """
    pairs = candidates(numbers[which])
    found = [np.zeros((0, 2), np.int64)]
    for at in range(0, len(pairs), _CHUNK):
        those = pairs[at : at + _CHUNK]
        found.append(those[alike(*(np.asarray(small[which[side]]) for side in those.T))])
    return np.concatenate(found)


def candidates(numbers: np.ndarray) -> np.ndarray:
    """Pairs that share a hash and are near each other: int64 [m, 2], i < j, sorted, each once."""
    n = len(numbers)
    mean = numbers.mean(0, dtype=np.float64).astype(np.float32)
    deviation = np.maximum(numbers.std(0, dtype=np.float64), _LEAST).astype(np.float32)
    random = np.random.default_rng(0)  # another seed finds the same copies
    met = np.zeros(0, np.int64)
    for _ in range(_TABLES if n > 1 else 0):
        directions = random.standard_normal((numbers.shape[1], _BITS)).astype(np.float32)
        new = [met]
        for i, j in _met(numbers, mean, deviation, directions):
            difference = (numbers[i].astype(np.float32) - numbers[j]) / deviation
            near = (difference * difference).sum(1) < _FAR**2
            new.append(np.minimum(i, j)[near] * n + np.maximum(i, j)[near])
        met = np.unique(np.concatenate(new))
    return np.stack(np.divmod(met, n), -1) if n else np.zeros((0, 2), np.int64)


def _met(
    numbers: np.ndarray, mean: np.ndarray, deviation: np.ndarray, directions: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields pairs of images i and j, int64 [m] each. Their hashes in one table are equal after some bits (or none) of
    the hash of i are flipped.

    The hash is the upper part of a code of 63 bits. Images with the same hash are sorted by the lower bits, so that
    neighbours in that order are the most alike.
    """
    n = len(numbers)
    lower = _BITS - min(_BITS, max(6, int(n).bit_length() + _SPARE))
    codes, unsure = np.empty(n, np.int64), np.empty((n, _TURNED), np.int8)
    place = np.int64(1) << np.arange(_BITS - 1, -1, -1, dtype=np.int64)
    for at in range(0, n, _CHUNK):
        those = slice(at, at + _CHUNK)
        along = ((numbers[those] - mean) / deviation) @ directions
        codes[those] = (along > 0) @ place
        unsure[those] = np.argpartition(np.abs(along[:, : _BITS - lower]), _TURNED, axis=1)[:, :_TURNED]
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    for turned in range(1 << _TURNED):
        wanted = codes.copy()
        for bit in range(_TURNED):
            if turned >> bit & 1:
                wanted ^= place[unsure[:, bit]]
        start = np.searchsorted(ordered, wanted)
        for step in (1, -1):
            images, places = np.arange(n), start - (step < 0)
            for _ in range(_NEIGHBOURS):
                inside = (places >= 0) & (places < n)
                images, places = images[inside], places[inside]
                same = ordered[places] >> lower == wanted[images] >> lower
                images, places = images[same], places[same]
                if not len(images):
                    break
                other = order[places]
                apart = other != images
                yield images[apart], other[apart]
                places = places + step
