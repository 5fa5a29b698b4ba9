"""Turns documents with pixels into documents with codes, in the same order. Images of one size are encoded in batches.

Axes: `B` images of a batch, `H` `W` their size in pixels, `h` `w` in codes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ar_unified.data.images import ImageCodec
from ar_unified.data.prepare.image_codes import ImageCodes, digest_of
from ar_unified.data.sources import BadItem
from ar_unified.language.document import CodesPart, Document, ImagePart


@dataclass
class Item:
    """An item in progress: a document whose images are being encoded, or the reason why there is none."""

    number: int
    document: Document | None
    bad: BadItem | None = None
    images: list[bytes] = field(default_factory=list)  # the digests of the document's images, in order


class Tokenizers:
    """Replicas of one image tokenizer, one for each device. Each has a thread, so batches are encoded while others are
    read.

    Attributes:
        encoded, known: how many images went through a tokenizer, and how many had codes from earlier runs.
    """

    def __init__(self, replicas: Sequence[ImageCodec], codes: ImageCodes | None = None):
        self.codes = codes
        self.encoded = self.known = 0
        self.devices = len(replicas)
        self._pool = ThreadPoolExecutor(self.devices)
        self._free: queue.SimpleQueue[ImageCodec] = queue.SimpleQueue()
        for replica in replicas:
            self._free.put(replica)
        self._began, self._busy, self._lock = time.perf_counter(), 0.0, threading.Lock()

    def encode(self, batch: np.ndarray) -> Future[np.ndarray]:
        """uint8 [B, H, W, 3] -> int32 [B, h, w]."""
        return self._pool.submit(self._encode, batch)

    def _encode(self, batch: np.ndarray) -> np.ndarray:
        replica, began = self._free.get(), time.perf_counter()
        try:
            return np.asarray(replica.encode(batch), np.int32)
        finally:
            self._free.put(replica)
            with self._lock:
                self._busy += time.perf_counter() - began

    def __str__(self) -> str:
        """The text for a progress line; "" without images."""
        if not self.encoded + self.known:
            return ""
        seconds = time.perf_counter() - self._began
        busy = self._busy / self.devices / seconds
        return f"{(self.encoded + self.known) / seconds:.0f} images/s, tokenizer {busy:.0%} busy"


class Encoder:
    """Encodes the images of one shard, each at its own size. Equal images are encoded once, because an image often
    comes with many questions.

    Timing does not matter: the items and the known codes decide which images are in a batch. All batches have the same
    size, so each size of images compiles once.
    """

    def __init__(self, tokenizers: Tokenizers, batch_size: int):
        self._tokenizers, self._batch_size = tokenizers, batch_size
        self._last: tuple[np.ndarray | None, bytes] = None, b""  # the last image and its digest; it often comes again
        self._codes: dict[bytes, CodesPart | None] = {}  # None while an image is being encoded
        self._new: list[bytes] = []
        self._waiting: dict[tuple[int, ...], dict[bytes, np.ndarray]] = {}  # images by size
        self._going: deque[tuple[list[bytes], Future[np.ndarray]]] = deque()
        self._items: deque[Item] = deque()

    def run(self, items: Iterable[tuple[int, Document | BadItem]], taken: Callable[[], object]) -> Iterator[Item]:
        """Yields all items as they become ready; calls `taken` after each item that was read."""
        try:
            for number, item in items:
                self._add(number, item)
                yield from self._ready()
                taken()
            while self._waiting:
                self._send(next(iter(self._waiting)))
            self._settle(0)
        finally:
            for _, future in self._going:
                future.cancel()
        yield from self._ready()
        if self._tokenizers.codes is not None:
            new = {digest: codes.codes for digest in self._new if (codes := self._codes[digest]) is not None}
            self._tokenizers.codes.put(new)

    def _add(self, number: int, item: Document | BadItem) -> None:
        if isinstance(item, BadItem):
            self._items.append(Item(number, None, item))
            return
        digests: list[bytes] = []

        def without(part: object) -> Any:  # keeps only an image's place, so that its pixels can be freed
            if not isinstance(part, ImagePart):
                return part
            digests.append(self._take(part.pixels))
            return _IMAGE

        document = item.changed(without)
        self._items.append(Item(number, document if digests else item, None, digests))
        if sum(map(len, self._waiting.values())) > 8 * self._batch_size:  # many sizes wait: send the oldest
            self._send(next(iter(self._waiting)))

    def _take(self, pixels: np.ndarray) -> bytes:
        last, digest = self._last
        if pixels is last:
            return digest
        digest = digest_of(pixels)
        self._last = pixels, digest
        if digest in self._codes:
            return digest
        codes = None if self._tokenizers.codes is None else self._tokenizers.codes.get(digest)
        if codes is not None:
            self._codes[digest] = CodesPart(codes)
            self._tokenizers.known += 1
            return digest
        self._codes[digest] = None
        same_size = self._waiting.setdefault(pixels.shape, {})
        same_size[digest] = pixels
        if len(same_size) == self._batch_size:
            self._send(pixels.shape)
        return digest

    def _send(self, shape: tuple[int, ...]) -> None:
        images = self._waiting.pop(shape)
        batch = np.zeros((self._batch_size, *shape), np.uint8)
        np.stack(list(images.values()), out=batch[: len(images)])
        self._going.append((list(images), self._tokenizers.encode(batch)))
        self._settle(2 * self._tokenizers.devices)

    def _settle(self, most: int) -> None:
        """Takes the codes of finished batches. Waits while more than `most` batches are being encoded."""
        while self._going and (len(self._going) > most or self._going[0][1].done()):
            digests, future = self._going.popleft()
            # `zip` is not strict, because a batch is padded.
            self._codes.update(zip(digests, map(CodesPart, future.result()), strict=False))
            self._new += digests
            self._tokenizers.encoded += len(digests)

    def _ready(self) -> Iterator[Item]:
        self._settle(len(self._going))
        while self._items:
            codes = [known for digest in self._items[0].images if (known := self._codes[digest]) is not None]
            if len(codes) < len(self._items[0].images):
                return
            item = self._items.popleft()
            if item.document is not None and codes:
                left = iter(codes)
                item.document = item.document.changed(lambda part: next(left) if part is _IMAGE else part)  # noqa: B023
            yield item


_IMAGE = ImagePart(np.zeros((1, 1, 3), np.uint8))  # takes the place of an image
