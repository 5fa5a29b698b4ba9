"""Finds documents that repeat an earlier one, and training documents that are also in a held-out set.

Documents are added one after the other and not kept. An image takes 8 bytes for the hash of its pixels, 66 for
`copies`, and 3 KiB in a temporary file. A text takes 8 bytes for the hash of its words, and 256 more if it is the whole
document.

Axes: `n` documents.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ar_unified.data.filters import similar_texts as texts
from ar_unified.data.filters.alike import SIDE, small
from ar_unified.data.filters.copies import copies, frequencies
from ar_unified.language.document import Document, ImagePart, TextPart

_FLUSH = 256


@dataclass(frozen=True)
class Duplicates:
    """What was found for each document, in the order in which they were added; -1 means nothing.

    Attributes:
        same: int64 [n], the first document that has the same images in the same order and the same words. Images are
            treated as the same if they are copies: scaled, recompressed, or cropped a little. For documents without
            images, nearly the same words are enough.
        shown: int64 [n], the first document with a copy of this document's first image, if earlier documents have
            copies of all images of this document.
        repeats: int64 [n], how many training documents have a copy of this document's most frequent image.
        overlap: int64 [n], the first held-out document with a copy of one of this document's images; for a document
            without images, the first held-out document with nearly the same words.
    """

    same: np.ndarray
    shown: np.ndarray
    repeats: np.ndarray
    overlap: np.ndarray


class Search:
    """`add` takes documents; `found` says which are duplicates. Held-out documents are compared only with each other.
    Training documents are compared with each other and with held-out documents.
    """

    def __init__(self) -> None:
        self._held_out: list[bool] = []
        self._words, self._images = array("Q"), array("q", [0])  # at i: number of images in documents 0 to i - 1
        self._alone: list[int] = []  # documents that are one text, long enough to be compared
        self._signatures: list[np.ndarray] = []
        self._pixels = array("Q")
        self._numbers: list[np.ndarray] = []
        self._waiting: list[np.ndarray] = []
        self._file = tempfile.TemporaryFile()

    def add(self, document: Document, *, held_out: bool = False) -> None:
        """Adds a document. Its images and words are hashed now, and compared later by `found`."""
        pixels = [part.pixels for part in document.parts if isinstance(part, ImagePart)]
        words = texts.words(" ".join(part.text for part in document.parts if isinstance(part, TextPart)))
        if not pixels and (signature := texts.signature(words)) is not None:
            self._alone.append(len(self._held_out))
            self._signatures.append(signature)
        self._held_out.append(held_out)
        self._words.append(texts.digest(words))
        self._images.append(self._images[-1] + len(pixels))
        for image in pixels:
            digest = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=8).digest()
            self._pixels.append(int.from_bytes(digest, "little"))
            self._waiting.append(small(image))
        if len(self._waiting) >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            pictures = np.stack(self._waiting)
            self._file.write(pictures.tobytes())
            self._numbers.append(frequencies(pictures))
            self._waiting = []

    def found(self) -> Duplicates:
        """Compares all documents that were added so far."""
        groups = self._groups()
        words = self._texts()
        count = len(self._held_out)
        none = np.full(count, -1, np.int64)
        same, shown, overlap, repeats = none, none.copy(), none.copy(), np.zeros(count, np.int64)
        owner = np.repeat(np.arange(count), np.diff(self._images))  # the document of each image
        trained = ~np.array(self._held_out, bool)[owner]
        in_documents = np.unique(np.stack([groups[trained], owner[trained]]), axis=1)[0]
        often = dict(zip(*(column.tolist() for column in np.unique(in_documents, return_counts=True)), strict=True))
        # One dict for training documents and one for held-out ones. `firsts` maps contents to the first document that
        # has them; `seen` maps an image to the first document that has it.
        firsts: tuple[dict[tuple[int, ...], int], ...] = ({}, {})
        seen: tuple[dict[int, int], ...] = ({}, {})
        for i, held_out in enumerate(self._held_out):
            images = groups[self._images[i] : self._images[i + 1]].tolist()
            first = firsts[held_out].setdefault((words[i], *images), i)
            same[i] = first if first != i else -1
            before = [seen[held_out].setdefault(image, i) for image in images]
            if images:
                shown[i] = before[0] if i not in before else -1
                repeats[i] = max(often.get(image, 0) for image in images)
        for i, held_out in enumerate(self._held_out):
            if held_out:
                continue
            images = groups[self._images[i] : self._images[i + 1]].tolist()
            there = [seen[True][image] for image in images if image in seen[True]]
            overlap[i] = min(there) if images and there else -1 if images else firsts[True].get((words[i],), -1)
        return Duplicates(same, shown, repeats, overlap)

    def _groups(self) -> np.ndarray:
        """For every image, the number of the first image that it is a copy of, int64."""
        self._flush()
        if not self._pixels:
            return np.zeros(0, np.int64)
        _, first, inverse = np.unique(np.array(self._pixels, np.uint64), return_index=True, return_inverse=True)
        order = np.argsort(first)  # in the order in which they were added
        rank = np.argsort(order)
        kept = first[order]
        self._file.flush()
        pictures = np.memmap(self._file, np.uint8, "r", shape=(len(self._pixels), SIDE, SIDE, 3))
        pairs = copies(pictures, np.concatenate(self._numbers), kept)
        return kept[_leaders(pairs, len(kept))[rank[inverse]]]

    def _texts(self) -> list[int]:
        """A number for every document; documents with the same words have the same number."""
        numbers = list(self._words)
        if self._alone:
            leaders = _leaders(texts.similar(np.stack(self._signatures)), len(self._alone))
            for i, leader in enumerate(leaders.tolist()):
                numbers[self._alone[i]] = self._words[self._alone[leader]]
        return numbers


def _leaders(pairs: np.ndarray | Sequence[Sequence[int]], count: int) -> np.ndarray:
    """The leader of each of `count` things. A thing that is paired with earlier leaders follows the first of them.
    Every other thing becomes a leader and leads itself.

    So chains are not followed: if each of many images differs a little from the image before it, the first and the last
    are not copies.
    """
    leader = np.arange(count)
    pairs = np.asarray(pairs)
    for i, j in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if leader[i] == i and leader[j] == j:
            leader[j] = i
    return leader
