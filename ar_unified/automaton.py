"""The grammar as integer state: what a sampler may emit next, row by row, inside one compiled loop.

Every function is pure, elementwise over the batch, and made of comparisons: no tables over the vocabulary.

One rule keeps every row within its budget: `remaining >= needed(state)` holds at the start, and no token is
allowed that would break it. So what cannot be finished is never started, be it a picture, a side of one, or
one more word before a picture that was asked for.

Axes: `B` rows, `P` prompt positions, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from ar_unified.vocabulary import Vocabulary

if TYPE_CHECKING:  # the grammar stands above: it hands its layout down
    from ar_unified.grammar import ImageLayout

# Modes: no pictures; only pictures, then EOS; both.
TEXT, IMAGE, FREE = range(3)
# Phases: text, BOI or EOS is next; a picture's height; its width; its codes, line ends and EOI; after EOS.
_PARTS, _HEIGHT, _WIDTH, _BODY, _DONE = range(5)


class State(NamedTuple):
    """Where each row stands; every field int32 [B], so rows can be replaced one by one.

    Attributes:
        phase: what may come next, see above.
        written: how many codes and line ends of the picture at hand are there.
        height, width: of the picture at hand, in codes.
        remaining: tokens that may still be generated, EOS included.
        images: pictures begun by the sampler, or by a prompt that breaks off inside one.
        mode: TEXT, IMAGE or FREE.
        min_images, max_images: of `images` at EOS. What the budget cannot hold is not in `min_images`.
        want_height, want_width: sides every new picture must have; 0: the sampler chooses.
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


class _Choices(NamedTuple):
    """What may come next: the ids low..high-1, and BOI or EOS besides. Each [B]."""

    low: jax.Array
    high: jax.Array
    boi: jax.Array
    eos: jax.Array


@dataclass(frozen=True)
class Automaton:
    """The automaton of one vocabulary and one way to write pictures. Hashable: a static jit argument."""

    vocabulary: Vocabulary
    layout: ImageLayout

    def init(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        remaining: jax.Array,
        mode: jax.Array,
        min_images: jax.Array,
        max_images: jax.Array,
        height: jax.Array,
        width: jax.Array,
    ) -> State:
        """The state after each row's prompt.

        Args:
            tokens: int [B, P], prompts padded on the right. They may end after BOS, in text, after EOT, or
                anywhere inside a picture, which is then completed first.
            lengths: int [B], at least 1.
            remaining: int [B], tokens that may be generated, EOS included.
            mode: int [B], TEXT, IMAGE or FREE.
            min_images, max_images: int [B], pictures to generate, the one a prompt breaks off in included.
                IMAGE mode makes at least one if max_images allows it, TEXT mode none.
            height, width: int [B], sides of every new picture in codes; 0 leaves a side to the sampler. A
                fixed grid has its own size and ignores both. A vocabulary without image codes makes no picture.

        Nothing can be raised here, where values may be traced. A request is possible as it stands iff
        `fits(state, min_images)`. Otherwise `min_images` is lowered to what the budget holds (to none if the
        layout has no such size), and a picture that the prompt began and the budget cannot end breaks off.
        """
        v, layout = self.vocabulary, self.layout
        tokens, lengths = jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)

        def token(i: jax.Array) -> jax.Array:
            return jnp.take_along_axis(tokens, jnp.maximum(i, 0)[:, None], axis=1, mode="clip")[:, 0]

        # A prompt is inside a picture iff its last BOI has no EOI behind it; how far inside is a subtraction.
        at = jnp.arange(tokens.shape[1])
        inside = at < lengths[:, None]
        begin = jnp.max(jnp.where(inside & (tokens == v.boi), at, -1), axis=1)
        end = jnp.max(jnp.where(inside & (tokens == v.eoi), at, -1), axis=1)
        into = jnp.where(begin > end, lengths - 1 - begin, -1)
        side = 1 - v.size_offset
        sides = (jnp.where(into > i, token(begin + 1 + i) + side, 0) for i in range(layout.header))
        picture_height, picture_width = sides if layout.sized else (0, 0)
        state = self.resume(
            into, picture_height, picture_width, remaining, mode, min_images, max_images, height, width
        )  # fmt: skip
        return self.halt(state, token(lengths - 1) == v.eos)

    def resume(
        self,
        into: jax.Array,
        picture_height: jax.Array | int,
        picture_width: jax.Array | int,
        remaining: jax.Array,
        mode: jax.Array,
        min_images: jax.Array,
        max_images: jax.Array,
        height: jax.Array,
        width: jax.Array,
    ) -> State:
        """The state of `init` from how far each row is into a picture.

        Args:
            into: int [B], tokens of the picture that the prompt breaks off in, BOI not counted; -1: it is in none.
            picture_height, picture_width: int [B], sides of that picture as far as they are said, else 0.
            others: as in `init`.
        """
        layout = self.layout
        into = jnp.asarray(into, jnp.int32)

        def column(x: jax.Array | int) -> jax.Array:
            return jnp.broadcast_to(jnp.asarray(x, jnp.int32), into.shape)

        open_image = into >= 0
        written = into - layout.header  # negative while sides are missing
        phase = jnp.select([~open_image, written == -2, written == -1], [_PARTS, _HEIGHT, _WIDTH], _BODY)
        remaining, mode = column(remaining), column(mode)
        images = open_image.astype(jnp.int32)
        if layout.sized:
            image_height, image_width = column(picture_height), column(picture_width)
            want_height, want_width = column(height), column(width)
        else:
            image_height, image_width = layout.height * images, layout.width * images
            want_height, want_width = column(layout.height), column(layout.width)

        possible = (
            (mode != TEXT)
            & (self.vocabulary.codebook_size > 0)
            & (want_height <= layout.height)
            & (want_width <= layout.width)
        )
        max_images = jnp.where(possible, jnp.maximum(column(max_images), images), images)
        min_images = jnp.maximum(column(min_images), (mode == IMAGE).astype(jnp.int32))
        state = State(
            phase=column(jnp.where(remaining > 0, phase, _DONE)),
            written=jnp.where(open_image, jnp.maximum(written, 0), 0),
            height=image_height,
            width=image_width,
            remaining=remaining,
            images=images,
            mode=mode,
            min_images=column(0),
            max_images=max_images,
            want_height=jnp.minimum(want_height, layout.height),
            want_width=jnp.minimum(want_width, layout.width),
        )
        room = jnp.maximum(remaining - self.needed(state), 0) // self._smallest(state)
        return state._replace(min_images=jnp.minimum(jnp.minimum(min_images, max_images), images + room))

    def halt(self, state: State, rows: jax.Array) -> State:
        """The state with `rows`, bool [B], ended where they are."""
        return state._replace(phase=jnp.where(rows, _DONE, state.phase).astype(jnp.int32))

    def fits(self, state: State, min_images: jax.Array) -> jax.Array:
        """bool [B]: whether a fresh state can end within its budget with the pictures that were asked for."""
        return (state.min_images >= min_images) & (self.needed(state) <= state.remaining)

    def needed(self, state: State) -> jax.Array:
        """int32 [B]: fewest tokens that end the document from here, missing pictures and EOS included."""
        layout = self.layout
        least_height, least_width = self._least(state)
        rest = jnp.select(
            [state.phase == _HEIGHT, state.phase == _WIDTH, state.phase == _BODY],
            [
                3 + layout.body(least_height, least_width),  # two sides, body, EOI
                2 + layout.body(state.height, least_width),
                1 + layout.body(state.height, state.width) - state.written,
            ],
            0,
        )
        return jnp.where(state.phase == _DONE, 0, rest + self._later(state))

    def allowed(self, state: State, first: int | None = None) -> jax.Array:
        """bool [B, V]: the ids that may come next; at least one in every row. `first`: of the first so many ids."""
        choices = self._choices(state)
        ids = jnp.arange(self.vocabulary.size if first is None else first, dtype=jnp.int32)
        low, high, boi, eos = (field[:, None] for field in choices)
        inside = (ids >= low) & (ids < high)
        return inside | (boi & (ids == self.vocabulary.boi)) | (eos & (ids == self.vocabulary.eos))

    def forced(self, state: State) -> jax.Array:
        """int32 [B]: the only allowed id, or -1 where there is a choice."""
        low, high, boi, eos = self._choices(state)
        count = jnp.maximum(high - low, 0) + boi + eos
        only = jnp.where(boi, self.vocabulary.boi, jnp.where(eos, self.vocabulary.eos, low))
        return jnp.where(count == 1, only, -1)

    def advance(self, state: State, token: jax.Array) -> State:
        """The state after one more generated token, int [B], which must be an allowed one."""
        v, layout = self.vocabulary, self.layout
        phase = state.phase
        begins = (phase == _PARTS) & (token == v.boi)
        ends = (phase == _BODY) & (token == v.eoi)
        writes = (phase == _BODY) & ~ends
        stops = (phase == _PARTS) & (token == v.eos)
        remaining = jnp.where(phase == _DONE, state.remaining, state.remaining - 1)
        next_phase = jnp.select(
            [begins, phase == _HEIGHT, phase == _WIDTH, ends, stops],
            [_HEIGHT if layout.sized else _BODY, _WIDTH, _BODY, _PARTS, _DONE],
            phase,
        )
        side = token - v.size_offset + 1
        new_height, new_width = (0, 0) if layout.sized else (layout.height, layout.width)
        return state._replace(
            phase=jnp.where(remaining > 0, next_phase, _DONE).astype(jnp.int32),
            written=jnp.where(begins, 0, state.written + writes),
            height=jnp.select([begins, phase == _HEIGHT], [new_height, side], state.height).astype(jnp.int32),
            width=jnp.select([begins, phase == _WIDTH], [new_width, side], state.width).astype(jnp.int32),
            remaining=remaining,
            images=state.images + begins,
        )

    def done(self, state: State) -> jax.Array:
        """bool [B]: the row has ended; only PAD follows."""
        return state.phase == _DONE

    def code(self, state: State) -> jax.Array:
        """int32 [B]: which code of its picture, row by row from 0, the next token is, where it is one."""
        if not self.layout.sized:
            return state.written
        return state.written - state.written // (state.width + 1)

    def in_image(self, state: State) -> jax.Array:
        """bool [B]: the next token is an image code."""
        line_end, image_end = self._borders(state)
        return (state.phase == _BODY) & ~line_end & ~image_end

    # ---- the arithmetic --------------------------------------------------------------------------

    def _least(self, state: State) -> tuple[jax.Array, jax.Array]:
        """Sides of the smallest picture that may be begun, each [B]."""
        return jnp.maximum(state.want_height, 1), jnp.maximum(state.want_width, 1)

    def _smallest(self, state: State) -> jax.Array:
        return self.layout.block(*self._least(state))

    def _later(self, state: State) -> jax.Array:
        """Tokens to keep for after the picture at hand: pictures still owed, and EOS."""
        return jnp.maximum(state.min_images - state.images, 0) * self._smallest(state) + 1

    def _borders(self, state: State) -> tuple[jax.Array, jax.Array]:
        """Whether a line of the picture, and whether all of it, is full; each [B]. For phase _BODY."""
        image_end = state.written == self.layout.body(state.height, state.width)
        if not self.layout.sized:
            return jnp.zeros_like(image_end), image_end
        return state.written % (state.width + 1) == state.width, image_end

    def _choices(self, state: State) -> _Choices:
        v, layout = self.vocabulary, self.layout
        later = self._later(state)
        free = state.remaining - later  # for the picture at hand, or for words
        parts = state.phase == _PARTS

        owed = state.images < state.min_images
        smallest = self._smallest(state)
        boi = parts & (state.images < state.max_images) & (free + jnp.where(owed, smallest, 0) >= smallest)
        words = parts & (state.mode != IMAGE) & (free > 0)

        # height * (width + 1) codes and line ends, then EOI, after the sides still to be said
        _, least_width = self._least(state)
        most_height = jnp.clip((free - 3) // (least_width + 1), 1, layout.height)
        most_width = jnp.clip((free - 2) // jnp.maximum(state.height, 1) - 1, 1, layout.width)
        low_height = jnp.where(state.want_height > 0, state.want_height, 1)
        low_width = jnp.where(state.want_width > 0, state.want_width, 1)
        high_height = jnp.where(state.want_height > 0, state.want_height, most_height)
        high_width = jnp.where(state.want_width > 0, state.want_width, most_width)

        line_end, image_end = self._borders(state)
        body = state.phase == _BODY
        first_side = v.size_offset - 1
        cases = (
            (words, 0, v.text_size),
            (parts, 0, 0),
            (state.phase == _HEIGHT, first_side + low_height, first_side + high_height + 1),
            (state.phase == _WIDTH, first_side + low_width, first_side + high_width + 1),
            (body & image_end, v.eoi, v.eoi + 1),
            (body & line_end, v.eol, v.eol + 1),
            (body, v.image_offset, v.image_offset + v.codebook_size),
        )
        conditions, lows, highs = ([case[i] for case in cases] for i in range(3))
        low = jnp.select(conditions, lows, v.pad).astype(jnp.int32)
        high = jnp.select(conditions, highs, v.pad + 1).astype(jnp.int32)
        return _Choices(low, high, boi, parts & ~owed)
