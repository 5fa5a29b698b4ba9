"""The grammar as integer state. It says which ids each row of a sampler may emit next, and runs in a compiled loop.

Every function is pure, elementwise over the batch, and made of comparisons. None needs a table over the vocabulary.

One rule keeps every row within its budget of tokens: `remaining >= needed(state)` is true at the start, and a token
that would make it false is not allowed. So a row starts only what it can finish: an image, a digit of its size, or
another word before an image that was requested.

Axes: `B` rows, `V` vocabulary. Heights and widths are in units of the layout (`ImageLayout.units`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ar_unified.language.syntax import Syntax

# Modes: only text; only images, then the end; both.
TEXT, IMAGE, FREE = range(3)
# Phases: text, an image or the end is next; an image's height; its width; the image after its size; after the end.
PARTS, HEIGHT, WIDTH, BODY, DONE = range(5)
_DIGITS = 5  # maximum number of digits of a side


class Opened(NamedTuple):
    """The state at the end of a prompt. Each field is an int, or int32 [B].

    Attributes:
        phase: any phase; DONE after the end of a document.
        written: a count: in PARTS, the ids of a half-written `open` at the end, if `open` is text; in HEIGHT and WIDTH,
            the digits so far; in BODY, the codes and row ends so far, or negative while `start` is incomplete.
        height, width: the sides of the begun image, or their digits so far; 0 if unknown.
    """

    phase: Any = PARTS
    written: Any = 0
    height: Any = 0
    width: Any = 0


class Wanted(NamedTuple):
    """What a request asks for. Each field is an int, or int32 [B].

    Attributes:
        remaining: number of tokens that may be generated, the end included.
        mode: TEXT, IMAGE or FREE.
        min_images, max_images: how many images to generate, including one that the prompt has begun. IMAGE mode makes
            at least one if max_images allows it; TEXT mode makes none.
        height, width: sides of every new image; 0 lets the sampler choose. Ignored if images do not state their size.
    """

    remaining: Any = 0
    mode: Any = TEXT
    min_images: Any = 0
    max_images: Any = 0
    height: Any = 0
    width: Any = 0


class State(NamedTuple):
    """The state of each row. Every field is int32 [B], so rows can be replaced one by one.

    Attributes:
        phase, written, height, width: as in `Opened`, for the current image.
        remaining: number of tokens that may still be generated, the end included.
        images: number of images that the sampler began, or that a prompt began and did not finish.
        mode: TEXT, IMAGE or FREE.
        min_images, max_images: bounds of `images` at the end; the budget is always enough for `min_images`.
        want_height, want_width: sides that every new image must have; 0 lets the sampler choose.
    """

    phase: jax.Array
    written: jax.Array
    height: jax.Array
    width: jax.Array
    remaining: jax.Array
    images: jax.Array
    mode: jax.Array
    min_images: jax.Array
    max_images: jax.Array
    want_height: jax.Array
    want_width: jax.Array


class Event(NamedTuple):
    """For each row, whether one token begins an image, is inside an image, or ends an image; bool [B] each."""

    begins: jax.Array
    inside: jax.Array
    ends: jax.Array


class Choices(NamedTuple):
    """What may come next: ids low..high-1 except `never`, and the decimal `digits`. `has_also` allows `also`, which
    begins an image or follows a number; `end` allows the document's end. Each field is [B], but digits is [B, 10]."""

    low: jax.Array
    high: jax.Array
    never: jax.Array
    also: jax.Array
    has_also: jax.Array
    end: jax.Array
    digits: jax.Array | None


@dataclass(frozen=True)
class Automaton:
    """The automaton of one syntax. It is hashable, so it can be a static argument of jit."""

    syntax: Syntax

    def resume(self, opened: Opened, wanted: Wanted) -> State:
        """The state of each row after its prompt.

        Nothing can be raised here, because values may be traced. A request can be fulfilled unchanged iff `fits(state,
        min_images)`. Otherwise `min_images` is lowered until the budget is enough, or to 0 if the layout does not allow
        the size. An image that the prompt began stays unfinished if the budget is too small for it.
        """
        layout = self.syntax.layout
        shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (*opened, *wanted)))
        opened = Opened(*(jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape) for x in opened))
        wanted = Wanted(*(jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape) for x in wanted))
        most_height, most_width = layout.most
        images = ((opened.phase != PARTS) & (opened.phase != DONE)).astype(jnp.int32)
        want_height, want_width = wanted.height, wanted.width
        if self.syntax.digits:  # a size that the prompt has begun to state takes priority over the wanted one
            contradicts = (opened.written > 0) & ~_extends(opened.height, want_height, want_height)
            want_height = jnp.where((opened.phase == HEIGHT) & contradicts, 0, want_height)
            contradicts = (opened.written > 0) & ~_extends(opened.width, want_width, want_width)
            want_width = jnp.where((opened.phase == WIDTH) & contradicts, 0, want_width)
        if not layout.sized:
            want_height, want_width = (jnp.full(shape, most, jnp.int32) for most in layout.most)
        possible = (
            (wanted.mode != TEXT)
            & (self.syntax.vocabulary.codebook_size > 0)
            & (want_height <= most_height)
            & (want_width <= most_width)
        )
        max_images = jnp.where(possible, jnp.maximum(wanted.max_images, images), images)
        min_images = jnp.maximum(wanted.min_images, (wanted.mode == IMAGE).astype(jnp.int32))
        state = State(
            phase=jnp.where(wanted.remaining > 0, opened.phase, DONE).astype(jnp.int32),
            written=opened.written,
            height=opened.height,
            width=opened.width,
            remaining=wanted.remaining,
            images=images,
            mode=wanted.mode,
            min_images=jnp.zeros(shape, jnp.int32),
            max_images=max_images,
            want_height=jnp.minimum(want_height, most_height),
            want_width=jnp.minimum(want_width, most_width),
        )
        # If the image does not fit, the part of an `open` that the prompt has begun counts as text.
        short = (opened.phase == PARTS) & (wanted.remaining < self.needed(state))
        state = state._replace(written=jnp.where(short, 0, state.written))
        room = jnp.maximum(wanted.remaining - self.needed(state), 0) // self._smallest(state)
        return state._replace(min_images=jnp.minimum(jnp.minimum(min_images, max_images), images + room))

    def halt(self, state: State, rows: jax.Array) -> State:
        """The state in which the selected rows have ended, whatever they have generated so far. rows: bool [B]."""
        return state._replace(phase=jnp.where(rows, DONE, state.phase).astype(jnp.int32))

    def fits(self, state: State, min_images: jax.Array) -> jax.Array:
        """bool [B]: whether a new state can end within its budget with the requested images."""
        return (state.min_images >= min_images) & (self.needed(state) <= state.remaining)

    def needed(self, state: State) -> jax.Array:
        """int32 [B]: the fewest tokens that can still end the document, including missing images and the end."""
        syntax, layout = self.syntax, self.syntax.layout
        least_height, least_width = self._least(state)
        # If no side is wanted, the number that the digits give so far is the side that takes the fewest tokens.
        height = jnp.where(state.want_height > 0, state.want_height, jnp.maximum(state.height, 1))
        width = jnp.where(state.want_width > 0, state.want_width, jnp.maximum(state.width, 1))
        header = layout.header(*self._codes(height, least_width))
        of_width = layout.digits(width) if syntax.digits else 1
        rest = jnp.select(
            [state.phase == HEIGHT, state.phase == WIDTH, state.phase == BODY],
            [
                header - state.written + syntax.rest(*self._codes(height, least_width)),
                of_width - state.written + syntax.rest(*self._codes(state.height, width)),
                self._block_end(state) - state.written,
            ],
            self._begun(state),
        )
        return jnp.where(state.phase == DONE, 0, rest + self._later(state))

    def allowed(self, state: State, first: int | None = None) -> jax.Array:
        """bool [B, V]: the ids that may come next, at least one in every row. first: look only at the first
        `first` ids."""
        choices = self.choices(state)
        ids = jnp.arange(self.syntax.vocabulary.size if first is None else first, dtype=jnp.int32)
        low, high, never, also, has_also, end = (field[:, None] for field in choices[:6])
        allowed = (ids >= low) & (ids < high)
        if len(self.syntax.open) > 1 or self.syntax.spelled:
            allowed &= ids != never
        allowed |= (has_also & (ids == also)) | (end & (ids == self.syntax.end))
        if choices.digits is not None:
            for digit, id in enumerate(self.syntax.digits):
                allowed |= choices.digits[:, digit, None] & (ids == id)
        return allowed

    def forced(self, state: State) -> jax.Array:
        """int32 [B]: the only allowed id, or -1 where there is a choice."""
        low, high, never, also, has_also, end, digits = self.choices(state)
        said = (also >= low) & (also < high)  # if the last id of `open` is a text piece, it is also a word
        count = jnp.maximum(high - low, 0) - ((never >= low) & (never < high)) + (has_also & ~said) + end
        only = jnp.where(has_also, also, jnp.where(end, self.syntax.end, low))
        if digits is not None:
            count += jnp.sum(digits, axis=1)
            id = _pick(self.syntax.digits, jnp.argmax(digits, axis=1))
            only = jnp.where(jnp.any(digits, axis=1), id, only)
        return jnp.where(count == 1, only, -1)

    def event(self, state: State, token: jax.Array) -> Event:
        """What an allowed token, int [B], does to the images of its row."""
        last = state.written == len(self.syntax.open) - 1
        begins = (state.phase == PARTS) & (token == self.syntax.open[-1]) & last
        inside = (state.phase == HEIGHT) | (state.phase == WIDTH) | (state.phase == BODY)
        ends = (state.phase == BODY) & (state.written + 1 == self._block_end(state))
        return Event(begins, inside | begins, ends)

    def advance(self, state: State, token: jax.Array) -> State:
        """The state after one more generated token, int [B]. The token must be allowed."""
        syntax, phase = self.syntax, state.phase
        begins, _, ends = self.event(state, token)
        stops = (phase == PARTS) & (token == syntax.end)
        remaining = jnp.where(phase == DONE, state.remaining, state.remaining - 1)
        height, width = state.height, state.width
        written = jnp.where(phase == BODY, state.written + 1, self._matched(state, token))
        if not syntax.layout.sized:
            most_height, most_width = syntax.layout.most
            height, width = jnp.where(begins, most_height, height), jnp.where(begins, most_width, width)
            said = jnp.zeros_like(begins)
        else:
            number, said = self._number(state, token)
            height = jnp.select([begins, phase == HEIGHT], [0, jnp.where(said, height, number)], height)
            width = jnp.select([begins, phase == WIDTH], [0, jnp.where(said, width, number)], width)
            if not syntax.digits:
                said = (phase == HEIGHT) | (phase == WIDTH)
            written = jnp.where((phase == HEIGHT) | (phase == WIDTH), state.written + 1, written)
            written = jnp.where(said & (phase == HEIGHT), 0, written)
        # Now the size is complete. If it is in digits, the first id of `start` has already ended the width.
        behind = (1 if syntax.digits else 0) - len(syntax.start)
        written = jnp.where(said & (phase == WIDTH), behind, written)
        written = jnp.where(begins, 0 if syntax.layout.sized else behind, written)
        next_phase = jnp.select(
            [begins, (phase == HEIGHT) & said, (phase == WIDTH) & said, ends, stops],
            [HEIGHT if syntax.layout.sized else BODY, WIDTH, BODY, PARTS, DONE],
            phase,
        )
        return state._replace(
            phase=jnp.where(remaining > 0, next_phase, DONE).astype(jnp.int32),
            written=jnp.where(ends, 0, written).astype(jnp.int32),
            height=height.astype(jnp.int32),
            width=width.astype(jnp.int32),
            remaining=remaining,
            images=state.images + begins,
        )

    def done(self, state: State) -> jax.Array:
        """bool [B]: whether the row has ended, so that only PAD follows."""
        return state.phase == DONE

    def code(self, state: State) -> jax.Array:
        """int32 [B]: if the next token is a code, its index among the codes of the image, counted row by row from 0."""
        if not self.syntax.layout.row_ends[0]:
            return state.written
        return state.written - state.written // (self._codes(state.height, state.width)[1] + 1)

    def columns(self, state: State) -> jax.Array:
        """int32 [B]: the number of codes in a row of the current image."""
        return self._codes(state.height, state.width)[1]

    def in_image(self, state: State) -> jax.Array:
        """bool [B]: whether the next token is an image code."""
        start, row_end, close = self._borders(state)
        return (state.phase == BODY) & ~start & ~row_end & ~close

    # ---- the arithmetic ------------------------------------------------------------------------------------------

    def _codes(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Converts units to codes."""
        rows, columns = self.syntax.layout.units
        return height * rows, width * columns

    def _least(self, state: State) -> tuple[jax.Array, jax.Array]:
        """Sides of the smallest image that may begin, each [B]."""
        return jnp.maximum(state.want_height, 1), jnp.maximum(state.want_width, 1)

    def _smallest(self, state: State) -> jax.Array:
        return self.syntax.block(*self._codes(*self._least(state)))

    def _later(self, state: State) -> jax.Array:
        """Tokens that must remain after the current image, for the images still to be made and for the end."""
        return jnp.maximum(state.min_images - state.images, 0) * self._smallest(state) + 1

    def _begun(self, state: State) -> jax.Array:
        """How a half-written `open` changes the number of tokens needed in the phase PARTS. If an image must still be
        made, that image needs fewer tokens. Otherwise, in mode IMAGE, the rest of the begun image is needed.
        """
        if len(self.syntax.open) == 1:
            return jnp.zeros_like(state.written)
        owed = state.images < state.min_images
        committed = (state.mode == IMAGE) & (state.written > 0) & (state.images < state.max_images)
        return jnp.where(owed, -state.written, jnp.where(committed, self._smallest(state) - state.written, 0))

    def _block_end(self, state: State) -> jax.Array:
        """The value of `written` at the end of the current image."""
        return self.syntax.layout.body(*self._codes(state.height, state.width)) + len(self.syntax.close)

    def _borders(self, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
        """For the phase BODY, bool [B] each: whether the next id is part of `start`, a row end, or part of `close`."""
        end, _ = self.syntax.layout.row_ends
        close = state.written >= self.syntax.layout.body(*self._codes(state.height, state.width))
        start = state.written < 0
        if not end:
            return start, jnp.zeros_like(close), close
        width = self._codes(state.height, state.width)[1]
        return start, ~start & ~close & (state.written % (width + 1) == width), close

    def _matched(self, state: State, token: jax.Array) -> jax.Array:
        """For the phase PARTS: how many ids of a half-written `open` are at the row's end, including `token`."""
        matched = jnp.zeros_like(state.written)
        if len(self.syntax.open) > 1:
            for id, after in _matches(self.syntax.open).items():
                matched = jnp.where(token == id, _pick(after, state.written), matched)
        return jnp.where(state.phase == PARTS, matched, state.written)

    def _number(self, state: State, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(number, ended), each [B]: height or width after `token`, and whether `token` ends the number."""
        syntax = self.syntax
        if not syntax.digits:
            return token - syntax.vocabulary.size_offset + 1, jnp.zeros_like(token, bool)
        digit = sum(value * (token == id) for value, id in enumerate(syntax.digits))
        number = 10 * jnp.where(state.phase == HEIGHT, state.height, state.width) + digit
        ends = jnp.where(state.phase == HEIGHT, token == syntax.separator, token == syntax.start[0])
        return number, ends

    def _most(self, state: State, free: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The largest height (in phase HEIGHT) and width (in phase WIDTH) for which `free` tokens are enough."""
        syntax, layout = self.syntax, self.syntax.layout
        (rows, columns), (end, fewer) = layout.units, layout.row_ends
        _, least_width = self._least(state)
        fixed = len(syntax.start) + len(syntax.close) - fewer
        row = rows * (self._codes(0, least_width)[1] + end)
        height = jnp.maximum(self._codes(state.height, 0)[0], 1)
        if not syntax.digits:
            most = (free - 2 - fixed) // row, ((free - 1 - fixed) // height - end) // columns
        else:
            digits = range(1, len(str(max(layout.most))) + 1)
            free = free + state.written - fixed
            room = free - 1 - layout.digits(least_width)
            most = (
                _largest([(n, (room - n) // row) for n in digits]),
                _largest([(n, ((free - n) // height - end) // columns) for n in digits]),
            )
        return tuple(jnp.clip(side, 1, limit) for side, limit in zip(most, layout.most, strict=True))  # type: ignore[return-value]

    def choices(self, state: State) -> Choices:
        """What each row may write next, as ranges of ids and flags."""
        syntax, v = self.syntax, self.syntax.vocabulary
        later = self._later(state)
        free = state.remaining - later  # tokens for the current image, or for words
        parts = state.phase == PARTS

        owed = state.images < state.min_images
        smallest, matched = self._smallest(state), jnp.where(parts, state.written, 0)
        image = parts & (state.images < state.max_images)
        image &= free + jnp.where(owed, smallest, 0) >= smallest - matched
        words = parts & (state.mode != IMAGE) & (free > 0)
        end = parts & ~owed
        never = jnp.full_like(state.phase, -1)
        if syntax.spelled:
            end &= (state.mode != IMAGE) | (matched == 0) | (state.images >= state.max_images)
            never = jnp.where(parts & ~image & (matched == len(syntax.open) - 1), syntax.open[-1], -1)
            # If `open` is text, its first ids are also words, so they are allowed whenever words are.
            image &= ~words | (matched == len(syntax.open) - 1)
        first = _pick(syntax.open, matched)

        height, width = self._most(state, free) if syntax.layout.sized else syntax.layout.most
        is_height = state.phase == HEIGHT
        want, most = (jnp.where(is_height, *pair) for pair in ((state.want_height, state.want_width), (height, width)))
        least, most = jnp.where(want > 0, want, 1), jnp.where(want > 0, want, most)
        header = is_height | (state.phase == WIDTH)
        digits, number_ends, number_end = None, jnp.zeros_like(parts), jnp.zeros_like(state.phase)
        if syntax.digits:
            number = jnp.where(is_height, state.height, state.width)
            most = jnp.maximum(most, number)  # a prompt may have begun a number that is too large
            digits = jnp.stack([header & _extends(10 * number + d, least, most) for d in range(10)], axis=1)
            number_ends = header & (number >= least) & (number <= most)
            number_end = jnp.where(is_height, syntax.separator, syntax.start[0])

        start, row_end, close = self._borders(state)
        body = state.phase == BODY
        size = v.size_offset - 1
        written = state.written
        at_start = _pick(syntax.start or (v.pad,), written + len(syntax.start))
        at_close = _pick(syntax.close or (v.pad,), written - (self._block_end(state) - len(syntax.close)))
        cases = (
            (words, 0, v.text_size),
            (parts | (header & bool(syntax.digits)), 0, 0),
            (header, size + least, size + most + 1),
            (body & start, at_start, at_start + 1),
            (body & close, at_close, at_close + 1),
            (body & row_end, syntax.row_end, syntax.row_end + 1),
            (body, v.image_offset, v.rest_offset),
        )
        conditions, lows, highs = ([case[i] for case in cases] for i in range(3))
        low = jnp.select(conditions, lows, v.pad).astype(jnp.int32)
        high = jnp.select(conditions, highs, v.pad + 1).astype(jnp.int32)
        also = jnp.where(parts, first, number_end).astype(jnp.int32)
        return Choices(low, high, never, also, image | number_ends, end, digits)


def _pick(ids: tuple[int, ...], index: jax.Array) -> jax.Array:
    """int32 [B]: ids[index], for a short list of ids. An index out of range gives the first or the last id."""
    return (
        jnp.asarray(ids, jnp.int32)[jnp.clip(index, 0, len(ids) - 1)] if len(ids) > 1 else jnp.full_like(index, ids[0])
    )


def _matches(run: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """The Knuth-Morris-Pratt table of a run of ids: found[id][matched] is the number of ids that match after `id`, if
    `matched` ids matched before it. A complete match is not in this table; `event` reports it.
    """
    found = {}
    for id in set(run):
        after = []
        for matched in range(len(run)):
            said = [*run[:matched], id]
            after.append(max(n for n in range(len(run)) if said[len(said) - n :] == list(run[:n])))
        found[id] = tuple(after)
    return found


def _extends(number: jax.Array, least: jax.Array, most: jax.Array) -> jax.Array:
    """bool [B]: whether `number` is in least..most, or more digits can bring it there."""
    more = [(number * 10**k <= most) & ((number + 1) * 10**k > least) for k in range(_DIGITS)]
    return (number > 0) & jnp.any(jnp.stack(more), axis=0)


def _largest(by_digits: list[tuple[int, jax.Array]]) -> jax.Array:
    """The largest number that one of the pairs (n, limit) allows. A pair allows numbers of n digits up to the limit."""
    numbers = [jnp.where(limit >= 10 ** (n - 1), jnp.minimum(limit, 10**n - 1), 0) for n, limit in by_digits]
    return jnp.max(jnp.stack(numbers), axis=0)
