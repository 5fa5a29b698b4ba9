"""Data augmentation: a source whose items come several times, each time with slightly changed images.

Axes: `H` `W` height and width in pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ar_unified.data.counter_rng import key, uniform
from ar_unified.data.items import BadItem, Source, fetched, texts_of
from ar_unified.errors import UserError
from ar_unified.language.document import Document, ImagePart
from ar_unified.manifests import Json


class Augmented:
    """`count` versions of every item of a source. Item i * count + k is version k of the source's item i.

    Version 0 is the unchanged item. The others are moved vertically and horizontally by up to `shift` of the height and
    width. With `mirror`, about half of them are mirrored left to right. All images of a document move in the same way.
    The moves depend only on the source's name, the item and k, so all readers see the same versions: an image tokenizer
    is trained on them, and `prepare` encodes each (LlamaGen, arXiv:2406.06525, stores ten crops).

    The texts must stay true. Do not use `mirror` if the texts say left or right, or `shift` if they say where something
    is. A shift cuts off what is near an edge. With `whole`, an image moves only as far as its flat background allows,
    so the figure on it is never cut off; then a shift near 1 may put the figure anywhere.

    Raises:
        UserError: if count is below 1 or shift is outside [0, 1), or if shift or mirror is set with a count of 1, which
            has no effect.
    """

    def __init__(self, source: Source, *, count: int, shift: float = 0.0, mirror: bool = False, whole: bool = False):
        if count < 1 or not 0 <= shift < 1:
            raise UserError(f"augmentation: expected count >= 1 and 0 <= shift < 1, found {count=} and {shift=}")
        if count == 1 and (shift or mirror):
            raise UserError(
                "augmentation: version 0 is the unchanged item, so shift and mirror need count >= 2, found count 1"
            )
        self.source, self.count, self.shift, self.mirror, self.whole = source, count, shift, mirror, whole
        self.name, self.reversible = source.name, source.reversible
        self._stream = key("views", source.name)  # a seed; another word than "views" would change the versions

    @property
    def fingerprint(self) -> Mapping[str, Json]:
        """The source's fingerprint, together with the settings of the augmentation."""
        return dict(self.source.fingerprint) | {"augmentation": [self.count, self.shift, self.mirror, self.whole]}

    def __len__(self) -> int:
        return len(self.source) * self.count

    def __getitem__(self, i: int) -> Document:
        return self._version(i, functools.partial(self.source.__getitem__, i // self.count))

    def fetch(self, indices: Sequence[int]) -> list[Callable[[], Document]]:
        """See `items.fetched`."""
        read = fetched(self.source, [i // self.count for i in indices])
        return [functools.partial(self._version, i, decode) for i, (_, decode) in zip(indices, read, strict=True)]

    def _version(self, i: int, decode: Callable[[], Document]) -> Document:
        document = decode()
        if i % self.count == 0:
            return document
        down, right, side = uniform(self._stream, i * 3 + np.arange(3)).tolist()
        most = np.full(4, self.shift)  # up, down, left, right
        for part in document.parts if self.whole else ():
            if isinstance(part, ImagePart):
                most = np.minimum(most, room(part.pixels))
        move = down * (most[0] + most[1]) - most[0], right * (most[2] + most[3]) - most[2], self.mirror and side < 0.5
        return document.changed(
            lambda part: ImagePart(moved(part.pixels, *move, whole=self.whole)) if isinstance(part, ImagePart) else part
        )

    def texts(self, i: int) -> list[str]:
        """The texts of an item that is version 0; [] for other versions, because their texts are the same."""
        return [] if i % self.count else self.source.texts(i // self.count)

    def fetch_texts(self, indices: Sequence[int]) -> list[list[str] | BadItem]:
        """See `items.texts_of`."""
        read = texts_of(self.source, [i // self.count for i in indices if i % self.count == 0])
        return [[] if i % self.count else next(read)[1] for i in indices]

    def origin(self, i: int) -> str:
        """The origin of the source's item from which item i is made."""
        return self.source.origin(i // self.count)


def moved(pixels: np.ndarray, down: float, right: float, mirror: bool = False, *, whole: bool = False) -> np.ndarray:
    """Moves an image by shares of its height and width, rounded to whole pixels, and then mirrors it if `mirror`.

    The gap is filled by repeating the edge pixels. With `whole`, pixels that leave on one side come in on the opposite
    side. If the move stays within `room`, these pixels are only background. uint8 [H, W, 3] -> the same shape.
    """
    H, W = pixels.shape[:2]
    rows, columns = np.arange(H) - round(down * H), np.arange(W) - round(right * W)
    rows, columns = (rows % H, columns % W) if whole else (np.clip(rows, 0, H - 1), np.clip(columns, 0, W - 1))
    return pixels[rows[:, None], columns[::-1] if mirror else columns]


def room(pixels: np.ndarray) -> np.ndarray:
    """How far an image, uint8 [H, W, 3], can move up, down, left and right while it loses only background.

    The background is the colour of the first pixel. Returns float64 [4]: two shares of the height, two of the width.
    """
    shown = np.any(pixels != pixels[0, 0], axis=-1)
    found = []
    for line in (shown.any(axis=1), shown.any(axis=0)):
        at = np.flatnonzero(line) if line.any() else np.arange(len(line))  # only background: no need to move
        found += [at[0] / len(line), (len(line) - 1 - at[-1]) / len(line)]
    return np.array(found)
