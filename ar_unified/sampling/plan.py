"""Turns a request into arrays: what each of its contexts reads first, how many tokens it may take, and whether it can
be served.

Tokens that are known before the first step are prefilled with the prompt instead of decoded. In mode "image" these are
the first <boi>, the size, and the codes of a canvas up to its first hole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ar_unified.language.automaton import DONE, HEIGHT, PARTS, WIDTH, Opened, Wanted
from ar_unified.language.document import Part, TextPart, TokensPart, Turn
from ar_unified.language.grammar import Break, Grammar
from ar_unified.language.layouts import TurnMarks
from ar_unified.language.syntax import ImageLayout
from ar_unified.sampling import guidance
from ar_unified.sampling.request import MODES, Request, RequestError, TooLong
from ar_unified.sampling.steps import Shape, Start

_SHARES = (4, 2, 1)  # a cache has the length max_length divided by one of these
_SLOTS = 64  # the length of a cache is a multiple of this


@dataclass(frozen=True, eq=False)
class Plan:
    """How one request is served; its samples differ only in their index.

    Attributes:
        request: the request itself.
        prompt: int32 [n], its tokens.
        given: int32 [m], the first tokens of every sample, which are known in advance.
        prefixes: the tokens that each context reads first, int32 [...]; the first context reads prompt and given.
        starts: where each context's images begin; 0 for the first context.
        resets: whether each new <boi> goes back to this start.
        budget: the most tokens of a sample, including `given`.
        smallest: the number of tokens of its smallest possible image.
        steps: how many steps a sample takes, if that is known; else None.
        start: the state from which the automaton resumes.
        shape: the shape of the pool that serves it.
    """

    request: Request
    prompt: np.ndarray
    given: np.ndarray
    prefixes: tuple[np.ndarray, ...]
    starts: tuple[int, ...]
    resets: tuple[bool, ...]
    budget: int
    smallest: int
    steps: int | None
    start: Start
    shape: Shape

    @property
    def weights(self) -> list[float]:
        """The weights of the contexts."""
        return guidance.weights(self.request.guidance, self.request.image_guidance, len(self.prefixes))


def plan(grammar: Grammar, request: Request, max_length: int) -> Plan:
    """Plans a request. Raises RequestError or GrammarError that says what to change, if it cannot be served."""
    request.check()
    layout, syntax = grammar.layout, grammar.syntax
    prompt = prompt_tokens(grammar, request)
    at = grammar.breaks_off(prompt)
    size = request.image_size or (None if request.canvas is None else request.canvas.shape)
    _check(grammar, request, size, at)
    if not layout.sized:
        size = layout.height, layout.width
    inside = at.opened.phase not in (PARTS, DONE)
    given = _given(grammar, request, size) if request.mode == "image" and not inside else np.zeros(0, np.int32)
    given = given[len(prompt) - at.begin :] if len(given) else given  # without the tokens that the prompt already has
    own = np.concatenate([prompt, given])
    if len(given):
        at = grammar.breaks_off(own)
        inside = at.opened.phase not in (PARTS, DONE)

    least, most = request.images
    least = max(least, int(request.mode == "image"))
    smallest = syntax.block(*(size or layout.units))
    largest = syntax.block(*(size or (layout.height, layout.width)))
    # `rest` is what the current image still needs; `needed` adds the images that must follow, and <eos>.
    rest = syntax.block(*_sides(layout, at.opened, size)) - (len(own) - at.begin) if inside else 0
    needed = len(given) + rest + max(least - inside, 0) * smallest + 1
    budget = _budget(request, needed, most * largest + 1, len(prompt), max_length)

    prefixes, starts, resets = [own], [0], [False]
    opening = np.asarray(syntax.open[:-1], np.int32)  # an image begins at the last id of `open`
    for context in (request.context, "image_only")[: request.contexts - 1]:
        base = np.concatenate([_base(grammar, request, context, own), opening])
        prefixes.append(base if context == "image_only" else np.concatenate([base, own[at.begin + len(opening) :]]))
        starts.append(len(base))
        resets.append(context != "image_only")
    if len(prefixes) == 3 and most == 1 and np.array_equal(prefixes[1], prefixes[2]):
        prefixes, starts, resets = prefixes[:2], starts[:2], resets[:2]  # no third context: it equals the second
    longest = max(len(prompt) + budget, max(starts) + min(largest, budget) + 1 if len(starts) > 1 else 0)
    exact = request.mode == "image" and least == most and size is not None and not request.stop
    wanted = (request.image_size or (0, 0)) if request.canvas is None else request.canvas.shape
    return Plan(
        request=request,
        prompt=prompt,
        given=given,
        prefixes=tuple(prefix.astype(np.int32) for prefix in prefixes),
        starts=tuple(starts),
        resets=tuple(resets),
        budget=budget,
        smallest=smallest,
        steps=needed - len(given) if exact else None,
        start=Start(
            at.opened,
            Wanted(
                budget - len(given), MODES[request.mode], *(min(n, 2**30) for n in (least, most)),
                *(side // unit for side, unit in zip(wanted, layout.units, strict=True)),
            ),
        ),
        shape=Shape(len(prefixes), _length_class(longest, max_length)),
    )  # fmt: skip


def prompt_tokens(grammar: Grammar, request: Request) -> np.ndarray:
    """The tokens of the request's prompt, int32 [n]. Raises GrammarError or RequestError if it is not a valid
    prompt."""
    if not any(isinstance(part, TokensPart) for part in request.parts):
        return grammar.prompt(request.turns)
    v, record = grammar.vocabulary, grammar.layout.record
    pieces = [part_tokens(grammar, *group) for group in _groups(request.parts)]
    begin = v.control(record.begin)
    before = grammar.history(request.history) if request.history else np.array([begin], np.int32)
    if not request.history and len(pieces[0]) and pieces[0][0] in grammar.begins:
        before = before[:0]
    tokens = np.concatenate([before, *pieces]).astype(np.int32)
    if request.turn and isinstance(record.turns, TurnMarks) and (ask := v.control(record.turns.ask)) not in tokens:
        tokens = np.append(tokens, ask).astype(np.int32)
    grammar.breaks_off(tokens)
    return tokens


def part_tokens(grammar: Grammar, *parts: Part | TokensPart) -> np.ndarray:
    """The ids of parts in a document, int32 [n]. Either all parts are ids, or none is. Raises like `prompt_tokens`."""
    if isinstance(parts[0], TokensPart):
        return np.concatenate([_ids(part, grammar.vocabulary.used) for part in parts])  # type: ignore[arg-type]
    return grammar.parts(parts)  # type: ignore[arg-type]


def _groups(parts: Sequence[Part | TokensPart]) -> Iterator[list[Part | TokensPart]]:
    """Splits parts into runs: all parts of a run are ids, or none is."""
    for _, group in groupby(parts, lambda part: isinstance(part, TokensPart)):
        yield list(group)


def _ids(part: TokensPart, size: int) -> np.ndarray:
    if not part.ids or min(part.ids) < 0 or max(part.ids) >= size:
        raise RequestError(f"tokens: expected ids 0..{size - 1} of the vocabulary, found {part.ids!r:.80}")
    return np.asarray(part.ids, np.int32)


def _sides(layout: ImageLayout, opened: Opened, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width, in codes, of the image that the prompt begins. Each side is taken from the prompt, else from
    the request; else it is the smallest possible.
    """
    said, wanted = [opened.height, opened.width], size or (0, 0)
    sides = []
    for axis, unit in enumerate(layout.units):
        open_still = opened.phase <= (HEIGHT, WIDTH)[axis]
        sides.append(wanted[axis] if open_still and wanted[axis] else max(said[axis], 1) * unit)
    return sides[0], sides[1]


def _given(grammar: Grammar, request: Request, size: tuple[int, int] | None) -> np.ndarray:
    """The known beginning of the first image."""
    if size is None:
        return np.asarray(grammar.syntax.open, np.int32)
    canvas = np.full(size, -1, np.int32) if request.canvas is None else request.canvas
    block = grammar.image(np.where(canvas < 0, 0, canvas).astype(np.int32))
    holes = np.flatnonzero(canvas.ravel() < 0)
    first = int(holes[0]) if len(holes) else canvas.size
    return block[: grammar.syntax.code_at(first, *size)]


def _base(grammar: Grammar, request: Request, context: str, own: np.ndarray) -> np.ndarray:
    """The ids that a context reads before its images, or all its ids if it keeps earlier images."""
    if context == "empty_prompt":
        return grammar.unconditional.tokens
    if context == "bos_boi":
        return own[:1]
    if context == "from_boi":
        return own[:0]
    if context == "negative_prompt":
        negative = Turn("user" if request.turn else "document", (TextPart(request.negative_prompt),))
        return grammar.prompt([negative])
    return without_text(grammar, own)


def without_text(grammar: Grammar, tokens: np.ndarray) -> np.ndarray:
    """Removes the text from ids [n] that begin a document, for the context "image_only".

    It also removes the mark that ends a question, if the layout's `unconditional` lacks this mark, as in Chameleon.
    """
    record = grammar.layout.record
    kept = np.ones(len(tokens), bool)
    if isinstance(record.turns, TurnMarks) and record.turns.ask not in record.unconditional:
        kept = tokens != grammar.vocabulary.control(record.turns.ask)
    for begin, end in grammar.texts(tokens):
        kept[begin:end] = False
    return tokens[kept]


def _check(grammar: Grammar, request: Request, size: Any, at: Break) -> None:
    v = grammar.vocabulary
    if not v.codebook_size:
        if request.mode in ("image", "interleaved") or request.images[0] or request.canvas is not None:
            raise RequestError(
                f'mode: expected "text" or "free" without images, because this model was trained on text alone; '
                f"found {request.mode!r} with images"
            )
        return
    if size is not None:
        grammar.check_size(*size)
        _check_begun(grammar, at.opened, size)
    image_only = request.contexts == 3 or (request.contexts == 2 and request.context == "image_only")
    if image_only and len(grammar.syntax.open) > 1:
        why = f"because images begin with text in layout {grammar.layout.kind!r}"
        raise RequestError(f'context: expected neither "image_only" nor image_guidance, {why}; found one of them')
    canvas = request.canvas
    if canvas is not None:
        if at.opened.phase != PARTS:
            raise RequestError("canvas: expected none, because the prompt already has the first codes of the image")
        if canvas.min() < -1 or canvas.max() >= v.codebook_size:
            found = f"{canvas.min()}..{canvas.max()}"
            raise RequestError(
                f"canvas: expected codes 0..{v.codebook_size - 1}, or -1 for a code to sample, found {found}"
            )
    for stop in request.stop:
        if not isinstance(stop, str) and not all(0 <= id < v.text_size for id in stop):
            raise RequestError(f"stop: expected a text, or ids of text pieces 0..{v.text_size - 1}, found {stop!r:.80}")


def _check_begun(grammar: Grammar, opened: Opened, size: tuple[int, int]) -> None:
    """Raises RequestError if the prompt already has digits of a size that differs from the requested size."""
    wanted = [side // unit for side, unit in zip(size, grammar.layout.units, strict=True)]
    for axis, (phase, said) in enumerate(((HEIGHT, opened.height), (WIDTH, opened.width))):
        if opened.phase == phase and said and not str(wanted[axis]).startswith(str(said)):
            name = ("height", "width")[axis]
            raise RequestError(
                f"image_size: expected a {name} whose first digits are {said}, as in the prompt, found {wanted[axis]}"
            )


def _budget(request: Request, needed: int, most: int, prompt: int, max_length: int) -> int:
    """The most tokens of a sample."""
    room = max_length - prompt
    images = f"{max(request.images[0], int(request.mode == 'image'))} images with <eos>"
    if room < needed:
        raise TooLong(
            f"the prompt has {prompt} tokens and {images} need {needed} more, "
            f"but the engine's max_length is {max_length}: shorten the prompt or raise max_length"
        )
    budget = request.max_tokens or min(room, most if request.mode == "image" else room)
    if budget > room:
        raise TooLong(
            f"max_tokens: the prompt has {prompt} tokens and the engine's max_length is {max_length}, "
            f"so at most {room} fit, found {budget}"
        )
    if budget < needed:
        raise RequestError(f"max_tokens: {images} need {needed} tokens, found {budget}")
    return budget


def cache_length(max_length: int, part: int = 1) -> int:
    """The length of a KV cache for max_length / part tokens, rounded up to a multiple of 64."""
    return -(-max_length // (_SLOTS * part)) * _SLOTS


def _length_class(n: int, max_length: int) -> int:
    """The cache length for n tokens: max_length, or a half or a quarter of it, in multiples of 64.

    It is a multiple of 64 because XLA on a CPU sums a row in vectors. With an incomplete vector, the bits of a row's
    result would depend on how much of the cache is read for its batch (kernels/decode_attention/xla.py).
    """
    classes = [cache_length(max_length, part) for part in _SHARES]
    fitting = [length for length in classes if length >= n]
    if not fitting:
        raise RequestError(
            f"negative_prompt: the negative prompt and an image after it take {n} tokens, but the engine's max_length "
            f"is {max_length}: shorten the negative prompt or raise max_length"
        )
    return fitting[0]
