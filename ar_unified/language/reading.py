"""Splits ids into items, and finds where the ids break off.

Axes: `h` `w` height and width of an image in codes; `n` ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ar_unified.language import automaton
from ar_unified.language.automaton import Opened
from ar_unified.language.syntax import Syntax
from ar_unified.language.vocabulary import Role


class GrammarError(ValueError):
    """Says what the grammar expected, what it found, and where.

    Attributes:
        position: index of the offending token (parse) or part (encode).
        expected, found: in words.
    """

    def __init__(self, position: int, expected: str, found: str, unit: str = "token"):
        super().__init__(f"{unit} {position}: expected {expected}, found {found}")
        self.position, self.expected, self.found = position, expected, found


class Item(NamedTuple):
    """A run of text pieces, an image, or any other single id, at positions `begin` to `end` - 1.

    `codes`: int32 [h, w], for a whole image. `opened`: the automaton's state at the end of the ids, for an
    incomplete image.
    """

    kind: str  # text | image | other
    begin: int
    end: int
    codes: np.ndarray | None = None
    opened: Opened | None = None


class Reader:
    """Reads ids [n] of one syntax."""

    def __init__(self, syntax: Syntax, ids: np.ndarray):
        self.syntax, self.vocabulary, self.ids = syntax, syntax.vocabulary, ids
        self._texts = np.append(self.vocabulary.role(ids) == Role.TEXT, False)

    def items(self, at: int) -> Iterator[Item]:
        """The items from `at` on. Raises GrammarError for an invalid image; only the last image may be incomplete."""
        while at < len(self.ids):
            text = at + int(np.argmin(self._texts[at:]))
            begin = self._opening(at, text)
            if begin > at:
                yield Item("text", at, begin)
            elif begin < 0 and text > at:
                yield Item("text", at, text)
                at = text
                continue
            if begin < 0:
                yield Item("other", at, at + 1)
                at += 1
                continue
            item = self._image(begin)
            yield item
            at = item.end

    def _opening(self, at: int, text: int) -> int:
        """The position where the next image begins if only text, ids[at:text], comes before it; -1 if there is none."""
        opening = self.syntax.open
        if not self.vocabulary.codebook_size:
            return -1
        if not self.syntax.spelled:
            return text if text < len(self.ids) and self.ids[text] == opening[0] else -1
        return find(self.ids[at:text], opening, at)

    def _image(self, begin: int) -> Item:
        """The image that begins at `begin`."""
        layout, at = self.syntax.layout, begin + len(self.syntax.open)
        height, width = layout.most
        if layout.sized:
            read = self._decimal if self.syntax.digits else self._size_token
            said, written, at = read(at, "height", height, self.syntax.separator)
            if said is None:
                return self._broken(begin, Opened(automaton.HEIGHT, written, self._value, 0))
            height = said
            said, written, at = read(at, "width", width, self.syntax.start[0] if self.syntax.start else -1)
            if said is None:
                return self._broken(begin, Opened(automaton.WIDTH, written, height, self._value))
            width = said
            at -= bool(self.syntax.digits)  # the id that ended the number belongs to `start`
        h, w = (count * unit for count, unit in zip((height, width), layout.units, strict=True))
        rest = self.ids[at : at + self.syntax.rest(h, w)]
        wrong = np.flatnonzero(~self._right(rest, h, w))
        if len(wrong):
            where = int(wrong[0])
            raise GrammarError(at + where, self._expected(where, h, w), self.found(at + where))
        if len(rest) < self.syntax.rest(h, w):
            return self._broken(begin, Opened(automaton.BODY, len(rest) - len(self.syntax.start), height, width))
        body = rest[len(self.syntax.start) : len(rest) - len(self.syntax.close)]
        end, _ = layout.row_ends
        codes = body[np.arange(len(body)) % (w + end) < w].reshape(h, w) - self.vocabulary.image_offset
        return Item("image", begin, at + len(rest), codes=codes.astype(np.int32))

    def _broken(self, begin: int, opened: Opened) -> Item:
        return Item("image", begin, len(self.ids), opened=opened)

    def _right(self, rest: np.ndarray, h: int, w: int) -> np.ndarray:
        """bool [n]: whether each id after an image's header is valid at its place."""
        syntax, body = self.syntax, self.syntax.layout.body(h, w)
        at = np.arange(len(rest)) - len(syntax.start)
        end, _ = syntax.layout.row_ends
        code = (at >= 0) & (at < body)
        row_end = code & (at % (w + end) == w)
        wanted = np.full(len(rest), syntax.row_end)
        for ids, where in ((syntax.start, at + len(syntax.start)), (syntax.close, at - body)):
            inside = (where >= 0) & (where < len(ids))
            wanted[inside] = np.asarray(ids, np.int64)[where[inside]]
        return np.where(code & ~row_end, self.vocabulary.role(rest) == Role.IMAGE, rest == wanted)

    def _expected(self, where: int, h: int, w: int) -> str:
        """The id that was expected, in words. `where` counts ids from the end of the image's header."""
        syntax, at = self.syntax, where - len(self.syntax.start)
        end, _ = syntax.layout.row_ends
        if at < 0:
            return self.vocabulary.name(syntax.start[where])
        if at >= (body := syntax.layout.body(h, w)):
            return self.vocabulary.name(syntax.close[at - body])
        row, column = divmod(at, w + end)
        what = self.vocabulary.name(syntax.row_end) if column == w else "an image code"
        return f"{what} (row {row}, column {column} of {h} x {w})"

    # ---- reading a side of a size ------------------------------------------------------------------------------------
    # Each function returns (number of units, 0, position after the number). If the ids end too early, it returns (None,
    # number of digits read, position).

    _value = 0  # the part of the number that was read, if the ids end too early

    def _size_token(self, at: int, name: str, most: int, _: int) -> tuple[int | None, int, int]:
        if at >= len(self.ids):
            return None, 0, at
        count = int(self.ids[at]) - self.vocabulary.size_offset + 1
        if not (1 <= count <= most and self.vocabulary.role(self.ids[at : at + 1])[0] == Role.SIZE):
            raise GrammarError(at, f"a size token for the {name}, 1..{most}", self.found(at))
        return count, 0, at + 1

    def _decimal(self, at: int, name: str, most: int, end: int) -> tuple[int | None, int, int]:
        value = written = 0
        while at < len(self.ids) and (id := int(self.ids[at])) != end:
            digit = self.syntax.digits.index(id) if id in self.syntax.digits else -1
            if digit < 0 or not 1 <= 10 * value + digit <= most:
                expected = f"a digit of the {name}, 1..{most}" + (f", or {self.vocabulary.name(end)}" if value else "")
                raise GrammarError(at, expected, self.found(at))
            value, written, at = 10 * value + digit, written + 1, at + 1
        if at >= len(self.ids):
            self._value = value
            return None, written, at
        if not value:
            raise GrammarError(at, f"a digit of the {name}, 1..{most}", self.found(at))
        return value, 0, at + 1

    def found(self, at: int) -> str:
        """The name of the id at a place, for a message."""
        return self.vocabulary.name(int(self.ids[at])) if at < len(self.ids) else "the end of the sequence"


def find(ids: np.ndarray, run: tuple[int, ...], offset: int = 0) -> int:
    """`offset` plus the position in ids [n] where the sequence `run` first occurs; -1 if it does not occur."""
    windows = len(ids) - len(run) + 1
    if windows < 1:
        return -1
    same = np.ones(windows, bool)
    for i, id in enumerate(run):
        same &= ids[i : i + windows] == id
    return offset + int(np.argmax(same)) if same.any() else -1


def half_open(syntax: Syntax, ids: np.ndarray) -> int:
    """How many ids of a half-written `open` are at the end of ids [n], if `open` is text."""
    run = syntax.open
    return next((n for n in range(min(len(run) - 1, len(ids)), 0, -1) if tuple(ids[-n:]) == run[:n]), 0)
