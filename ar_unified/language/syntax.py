"""A layout as ids and lengths: how the images of one vocabulary are written, computed by arithmetic only.

    open (header: size of height, of width) start (row [row_end])*h close

Axes: `h` `w` rows of an image and codes of a row; both are ints or (traced) integer arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ar_unified.language.layouts import LAYOUTS, Decimal, Layout, Mark, SizeTokens, Text
from ar_unified.language.vocabulary import Role, Vocabulary

SOFTMAXES = ("joint", "by_side")  # one over all ids | one over text ids and one over image ids


@dataclass(frozen=True)
class ImageLayout:
    """A layout and the image sizes that it is used for.

    Attributes:
        kind: its name in `LAYOUTS`.
        height, width: rows of an image and codes of a row; these are maxima if images state their size.
        depth: number of codes per position. These codes are neighbours in a row, so width is a multiple of depth.
    """

    kind: str
    height: int
    width: int
    depth: int = 1

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise ValueError(f"image layout: expected one of {', '.join(LAYOUTS)}, found {self.kind!r}")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"image layout: expected at least 1 x 1, found {self.height} x {self.width}")
        if self.depth < 1 or self.width % self.depth or (self.sized and not (self.most[0] and self.most[1])):
            raise ValueError(
                f"image layout: expected sides of at least {' x '.join(map(str, self.units))} codes and a width "
                f"that is a multiple of {self.depth}; found {self.height} x {self.width}"
            )

    @property
    def record(self) -> Layout:
        """The layout's entry of LAYOUTS."""
        return LAYOUTS[self.kind]

    @property
    def sized(self) -> bool:
        """Whether images state their size."""
        return self.record.size is not None

    @property
    def units(self) -> tuple[int, int]:
        """Number of codes in a unit of height and in a unit of width. An image states its size in units."""
        unit = self.record.size.unit if isinstance(self.record.size, SizeTokens) else 1
        return unit, unit * self.depth

    @property
    def most(self) -> tuple[int, int]:
        """Largest height and width, in units."""
        return self.height // self.units[0], self.width // self.units[1]

    @property
    def size_tokens(self) -> int:
        """How many size tokens a vocabulary needs."""
        return max(self.most) if isinstance(self.record.size, SizeTokens) else 0

    @property
    def row_ends(self) -> tuple[int, int]:
        """(a, b): `a` ids follow each row, but none follow the last `b` rows; both are 0 or 1."""
        return int(self.record.rows != "none"), int(self.record.rows == "between")

    def split(self, vocabulary: Vocabulary, softmax: str) -> int | None:
        """The first id on the image side, if text and images have separate softmaxes; None means one softmax over all
        ids. A loss that is averaged per side (`TransformerTask.mean_split`) has the same two sides.

        The image side has the image codes, the ids after them, and the controls from the record's `image_side` on.
        Text, all other controls and size tokens are on the text side. Raises ValueError for an unknown softmax.
        """
        if softmax not in SOFTMAXES:
            raise ValueError(f"softmax: expected one of {', '.join(SOFTMAXES)}; found {softmax!r:.40}")
        if softmax == "joint" or not vocabulary.codebook_size:
            return None
        first = self.record.image_side
        return vocabulary.control(first) if first else vocabulary.image_offset

    def body(self, height: Any, width: Any) -> Any:
        """Number of codes and row ends of an image."""
        end, fewer = self.row_ends
        return height * (width + end) - fewer

    def digits(self, count: Any) -> Any:
        """Number of decimal digits of a number of units, at least 1."""
        return 1 + sum((count >= 10**k) * 1 for k in range(1, len(str(max(self.most)))))

    def header(self, height: Any, width: Any) -> Any:
        """Number of ids that state a size."""
        if not isinstance(self.record.size, Decimal):
            return 2 if self.sized else 0
        rows, columns = self.units
        return self.digits(height // rows) + 1 + self.digits(width // columns)

    def block(self, height: Any, width: Any) -> Any:
        """Number of ids of an image; a mark that is text counts as one (`Syntax.block` is exact)."""
        around = 1 + len(self.record.start) + len(self.record.close)
        return around + self.header(height, width) + self.body(height, width)


def vocabulary_for(
    layout: ImageLayout, text_size: int, codebook_size: int, text_hash: str = "", image_hash: str = ""
) -> Vocabulary:
    """The vocabulary of two tokenizers with the control and size tokens that a layout needs."""
    controls = layout.record.controls
    return Vocabulary(text_size, codebook_size, layout.size_tokens, text_hash, image_hash, controls)


def fixed_grid(height: int, width: int) -> ImageLayout:
    """The layout for images of exactly height x width codes, written without sizes or row ends."""
    return ImageLayout("grid", height, width)


def sized_rows(max_height: int, max_width: int, depth: int = 1) -> ImageLayout:
    """The layout for images of up to max_height x max_width codes, which state their size and end every row."""
    return ImageLayout("rows", max_height, max_width, depth)


TEXT_ALONE = fixed_grid(1, 1)


@dataclass(frozen=True)
class Syntax:
    """An image layout with the ids of one vocabulary and text tokenizer. It is hashable, so it can be a static
    argument of jit.

    Attributes:
        open: ids that begin an image: a control token, or text pieces (`spelled`), of which the last begins the image.
        digits, separator: the pieces for 0..9 and for the separator; () and -1 if sizes are not decimal.
        start, close: ids before the first code, and after the last.
        row_end: the id that ends a row; -1 for none.
        end: the id that ends an answer and a document.
    """

    vocabulary: Vocabulary
    layout: ImageLayout
    open: tuple[int, ...]
    digits: tuple[int, ...]
    separator: int
    start: tuple[int, ...]
    row_end: int
    close: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, vocabulary: Vocabulary, layout: ImageLayout, encode: Callable[[str], Sequence[int]]) -> Syntax:
        """The syntax of a layout. `encode` returns the ids of a text, for the marks that are text.

        Raises ValueError if a control or size token is missing, or the text tokenizer has no single piece for a digit.
        """
        record = layout.record

        def ids(mark: Mark) -> tuple[int, ...]:
            return tuple(encode(mark.text)) if isinstance(mark, Text) else (vocabulary.control(mark),)

        end = vocabulary.control(record.end)
        if not vocabulary.codebook_size:  # no image is ever written
            return cls(vocabulary, layout, (vocabulary.pad,), (), -1, (), -1, (vocabulary.pad,), end)
        if vocabulary.size_tokens < layout.size_tokens:
            raise ValueError(
                f"vocabulary.size_tokens: expected at least {layout.size_tokens} for images up to "
                f"{layout.height} x {layout.width} codes, found {vocabulary.size_tokens}"
            )
        digits: list[int] = []
        separator = -1
        if isinstance(record.size, Decimal):
            pieces = [list(encode(text)) for text in (*"0123456789", record.size.separator)]
            if any(len(piece) != 1 for piece in pieces) or len({piece[0] for piece in pieces}) < len(pieces):
                raise ValueError(
                    f"layout {layout.kind!r}: its sizes are decimal, so each digit and {record.size.separator!r} "
                    f"need a piece of their own in the text tokenizer; found {pieces}"
                )
            *digits, separator = (piece[0] for piece in pieces)
        return cls(
            vocabulary,
            layout,
            ids(record.open),
            tuple(digits),
            separator,
            tuple(vocabulary.control(name) for name in record.start),
            vocabulary.control(record.row_end) if record.rows != "none" else -1,
            tuple(id for mark in record.close for id in ids(mark)),
            end,
        )

    @property
    def spelled(self) -> bool:
        """Whether `open` is text."""
        return self.open[0] < self.vocabulary.text_size

    # ---- lengths -------------------------------------------------------------------------------------------------

    def block(self, height: Any, width: Any) -> Any:
        """Length of an image, from the first id of `open` to the last id of `close`."""
        return len(self.open) + self.layout.header(height, width) + self.rest(height, width)

    def rest(self, height: Any, width: Any) -> Any:
        """Length of an image after its header."""
        return len(self.start) + self.layout.body(height, width) + len(self.close)

    def code_at(self, index: int, height: int, width: int) -> int:
        """The position in the block of code number `index`, counted row by row. Index h * w gives the position of
        `close`."""
        end, fewer = self.layout.row_ends
        rows = index // width
        if index == height * width:
            rows -= fewer  # no row end after the last row
        return len(self.open) + self.layout.header(height, width) + len(self.start) + index + rows * end

    # ---- ids -----------------------------------------------------------------------------------------------------

    def size(self, height: int, width: int) -> list[int]:
        """The ids that state a size."""
        if not self.layout.sized:
            return []
        counts = [side // unit for side, unit in zip((height, width), self.layout.units, strict=True)]
        if not self.digits:
            return [self.vocabulary.size_offset + count - 1 for count in counts]
        first, second = ([self.digits[int(digit)] for digit in str(count)] for count in counts)
        return [*first, self.separator, *second]

    def write(self, codes: np.ndarray) -> tuple[np.ndarray, bytes]:
        """The ids, int32 [n], of an image with codes int32 [h, w], and the Role of each id by its place, n bytes."""
        ids, where, roles = self._frame(*codes.shape)
        ids = ids.copy()
        ids[where] = codes.reshape(-1) + self.vocabulary.image_offset
        return ids, roles

    @cached_property
    def _frames(self) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray, bytes]]:
        """Results of `_frame`, by size."""
        return {}

    def _frame(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray, bytes]:
        """An image without its codes: the ids, the places of the codes in them, and the roles."""
        if (height, width) in self._frames:
            return self._frames[height, width]
        end, fewer = self.layout.row_ends
        size = self.size(height, width)
        row = [-1] * width + [self.row_end] * end
        body = (row * height)[: (width + end) * height - fewer]
        ids = np.array([*self.open, *size, *self.start, *body, *self.close], np.int32)
        roles = np.full(len(ids), Role.CONTROL, np.uint8)
        roles[len(self.open) : len(self.open) + len(size)] = Role.SIZE
        roles[ids == -1] = Role.IMAGE
        self._frames[height, width] = found = ids, np.flatnonzero(ids == -1), roles.tobytes()
        return found
