"""Finds texts that are the same, by a hash of their words, or nearly the same, by their runs of five words.

A text's words are its runs of letters and digits, in lower case and in one form (NFKC). So case, punctuation and spaces
do not matter. Texts of at least _LEAST words are also compared by MinHash with one permutation (Li, Owen and Zhang,
2012). Every run of five words is hashed into one of 64 bins, and the least hash of each bin is kept. The similarity of
two texts is the share of bins in which they agree. Bins form groups of four, and two texts are compared only if they
agree in a whole group.

Axes: `n` texts, `m` pairs.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib

import numpy as np

BINS = 64
_LEAST, _RUN, _BAND = 32, 5, 4
_ALIKE = 0.7  # minimum share of bins in which two texts agree if they are nearly the same
_EMPTY = np.uint32(0xFFFFFFFF)
_NEIGHBOURS = 12  # a text is compared with at most this many texts that equal it in a group of bins


def words(text: str) -> list[str]:
    """The words of a text in order, NFKC-normalized and case-folded. Texts with equal lists of words are copies."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def digest(found: list[str]) -> int:
    """The hash of a text's words, 0 to 2**64 - 1."""
    return int.from_bytes(hashlib.blake2b(" ".join(found).encode(), digest_size=8).digest(), "little")


def signature(found: list[str]) -> np.ndarray | None:
    """The least hash of each bin, from a text's words: uint32 [BINS]; None for too few words."""
    if len(found) < _LEAST:
        return None
    hashes = np.array([zlib.crc32(word.encode()) for word in found], np.uint64)
    runs = np.zeros(len(found) - _RUN + 1, np.uint64)
    for i in range(_RUN):  # the words of a run get different factors, so order counts
        runs = (runs + hashes[i : len(found) - _RUN + 1 + i]) * np.uint64(0x9E3779B97F4A7C15)
        runs ^= runs >> np.uint64(29)
    least = np.full(BINS, _EMPTY, np.uint32)
    np.minimum.at(least, (runs >> np.uint64(58)).astype(np.int64), (runs & np.uint64(0xFFFFFFFE)).astype(np.uint32))
    return least


def similar(signatures: np.ndarray) -> np.ndarray:
    """Pairs of texts that are nearly the same: uint32 [n, BINS] -> int64 [m, 2], i < j, sorted."""
    n, met = len(signatures), np.zeros(0, np.int64)
    for band in range(0, BINS, _BAND):
        part = signatures[:, band : band + _BAND]
        _, key = np.unique(part, axis=0, return_inverse=True)
        key = np.where((part == _EMPTY).all(1), -1 - np.arange(n), key.reshape(-1))
        order = np.argsort(key, kind="stable")
        for step in range(1, _NEIGHBOURS + 1):
            i, j = order[:-step], order[step:]
            same = key[i] == key[j]
            if not same.any():
                break
            i, j = i[same], j[same]
            filled = (signatures[i] != _EMPTY) | (signatures[j] != _EMPTY)
            agree = ((signatures[i] == signatures[j]) & filled).sum(1) >= _ALIKE * filled.sum(1)
            met = np.union1d(met, (i * n + j)[agree])
    return np.stack(np.divmod(met, max(n, 1)), -1)
