"""From a request to arrays: what each of its contexts reads first, what it may take, and whether it can be served.

What is known before the first step is not decoded but read with the prompt: in mode "image" the first <boi>, the size,
and the codes that a canvas gives up to its first hole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ar_unified.document import CodesPart, Part, TextPart
from ar_unified.grammar import Grammar
from ar_unified.sampling import guidance
from ar_unified.sampling.request import MODES, Request, RequestError, TokensPart
from ar_unified.sampling.steps import Shape
from ar_unified.vocabulary import Role

_PARTS = (4, 2, 1)  # of max_length, that a cache is long
_SLOTS = 64  # its length is a multiple of


@dataclass(frozen=True, eq=False)
class Plan:
    """How one request is served; its samples differ in their index alone.

    Attributes:
        request: what was asked for. prompt: int32 [n], its tokens.
        given: int32 [m], the first tokens of every sample, as far as they are known.
        prefixes: what each context reads, tokens int32 [...]; the first is prompt and given.
        starts: where the pictures of each context begin again. resets: whether they do, at each <boi>.
        budget: tokens of a sample at most, `given` among them. smallest: of the smallest picture it may make.
        steps: how many are drawn, if that is known; else None.
        start: the arguments of `Automaton.resume`.
        shape: of the pool that serves it.
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
    start: tuple[int, ...]
    shape: Shape

    @property
    def weights(self) -> list[float]:
        """Of the contexts."""
        return guidance.weights(self.request.guidance, self.request.image_guidance, len(self.prefixes))


def plan(grammar: Grammar, request: Request, max_length: int) -> Plan:
    """Raises RequestError or GrammarError, saying what to change, if the request cannot be served."""
    request.check()
    layout = grammar.layout
    prompt = prompt_tokens(grammar, request)
    opened = open_picture(grammar, prompt)
    size = request.image_size or (None if request.canvas is None else request.canvas.shape)
    _check(grammar, request, size, bool(len(opened)))
    if not layout.sized:
        size = layout.height, layout.width
    given = _given(grammar, request, size) if request.mode == "image" and not len(opened) else np.zeros(0, np.int32)
    own = np.concatenate([prompt, given])
    opened = open_picture(grammar, own)

    least, most = request.images
    least = max(least, int(request.mode == "image"))
    smallest = layout.block(*(size or (1, 1)))
    largest = layout.block(*(size or (layout.height, layout.width)))
    # What the picture at hand still takes, and those that are owed after it.
    sides = _sides(grammar, opened)
    rest = (
        layout.block(*(a or b for a, b in zip(sides, size or (1, 1), strict=True))) - len(opened) if len(opened) else 0
    )
    needed = len(given) + rest + max(least - bool(len(opened)), 0) * smallest + 1
    budget = _budget(request, needed, most * largest + 1, len(prompt), max_length)

    prefixes, starts, resets = [own], [0], [False]
    for context in (request.context, "image_only")[: request.contexts - 1]:
        base = _base(grammar, request, context, own)
        prefixes.append(base if context == "image_only" else np.concatenate([base, opened]))
        starts.append(len(base))
        resets.append(context != "image_only")
    longest = max(len(prompt) + budget, max(starts) + min(largest, budget) + 1 if len(starts) > 1 else 0)
    exact = request.mode == "image" and least == most and size is not None and not request.stop
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
        start=(
            len(opened) - 1, *sides, budget - len(given), MODES[request.mode], *(min(n, 2**30) for n in (least, most)),
            *(request.image_size or (0, 0) if request.canvas is None else request.canvas.shape),
        ),
        shape=Shape(len(prefixes), _length_class(longest, max_length)),
    )  # fmt: skip


def prompt_tokens(grammar: Grammar, request: Request) -> np.ndarray:
    """The request's prompt, int32 [n]. Raises GrammarError or RequestError where it is none."""
    v = grammar.vocabulary
    pieces: list[np.ndarray] = []
    run: list[Part] = []
    for part in (*request.parts, None):
        if part is None or isinstance(part, TokensPart):
            if run:
                pieces.append(grammar.prompt_tokens(run, turn=False)[1:])
                run = []
            if part is not None:
                pieces.append(_ids(part, v.size))
        else:
            run.append(part)
    tokens = np.concatenate([np.zeros(0, np.int32), *pieces]).astype(np.int32)
    if not len(tokens) or tokens[0] != v.bos:
        tokens = np.concatenate([[v.bos], tokens]).astype(np.int32)
    if request.turn and v.eot not in tokens:
        tokens = np.append(tokens, v.eot).astype(np.int32)
    if any(isinstance(part, TokensPart) for part in request.parts):
        grammar.parse(np.concatenate([tokens, _closing(grammar, open_picture(grammar, tokens)), [v.eos]]))
    return tokens


def open_picture(grammar: Grammar, tokens: np.ndarray) -> np.ndarray:
    """The tokens, from <boi> on, of the picture that `tokens` break off in; none if they do not."""
    v = grammar.vocabulary
    begins = np.flatnonzero(tokens == v.boi)
    begin = int(begins[-1]) if len(begins) else len(tokens)
    return tokens[begin:] if v.eoi not in tokens[begin:] else tokens[:0]


def _ids(part: TokensPart, size: int) -> np.ndarray:
    if not part.ids or min(part.ids) < 0 or max(part.ids) >= size:
        raise RequestError(f"tokens: expected ids 0..{size - 1} of the vocabulary, found {part.ids!r:.80}")
    return np.asarray(part.ids, np.int32)


def _sides(grammar: Grammar, opened: np.ndarray) -> tuple[int, int]:
    """Height and width of a picture that was begun, 0 where they are not said."""
    said = opened[1 : 1 + grammar.layout.header] - grammar.vocabulary.size_offset + 1
    if not grammar.layout.sized:
        return (grammar.layout.height, grammar.layout.width) if len(opened) else (0, 0)
    return int(said[0]) if len(said) else 0, int(said[1]) if len(said) > 1 else 0


def _closing(grammar: Grammar, opened: np.ndarray) -> np.ndarray:
    """The rest of a picture that was begun, in some way."""
    if not len(opened):
        return opened
    height, width = (side or 1 for side in _sides(grammar, opened))
    canvas = np.zeros((height, width), np.int32)
    return grammar.prompt_tokens((CodesPart(canvas),), turn=False)[1:][len(opened) :]


def _given(grammar: Grammar, request: Request, size: tuple[int, int] | None) -> np.ndarray:
    """The beginning of the first picture as far as it is known."""
    v, layout = grammar.vocabulary, grammar.layout
    if size is None:
        return np.array([v.boi], np.int32)
    canvas = np.full(size, -1, np.int32) if request.canvas is None else request.canvas
    codes = np.where(canvas < 0, 0, canvas).astype(np.int32)
    block = grammar.prompt_tokens((CodesPart(codes),), turn=False)[1:]
    holes = np.flatnonzero(canvas.ravel() < 0)
    first = int(holes[0]) if len(holes) else canvas.size
    lines = first // size[1] if layout.sized else 0  # line ends before it
    return block[: 1 + layout.header + first + lines]


def _base(grammar: Grammar, request: Request, context: str, own: np.ndarray) -> np.ndarray:
    """What a context reads before the picture at hand; all it reads, if it keeps the pictures before."""
    v = grammar.vocabulary
    if context == "empty_prompt":
        return grammar.unconditional
    if context == "bos_boi":
        return grammar.unconditional[:1]
    if context == "from_boi":
        return grammar.unconditional[:0]
    if context == "negative_prompt":
        return grammar.prompt_tokens((TextPart(request.negative_prompt),), turn=request.turn)
    return own[v.role(own) != Role.TEXT]


def _check(grammar: Grammar, request: Request, size: Any, opened: bool) -> None:
    v = grammar.vocabulary
    if not v.codebook_size:
        if request.mode in ("image", "interleaved") or request.images[0] or request.canvas is not None:
            raise RequestError(
                f'mode: expected "text" or "free", as this model was trained on text alone, found {request.mode!r} '
                "with a picture asked for"
            )
        return
    if size is not None:
        grammar.check_size(*size)
    canvas = request.canvas
    if canvas is not None:
        if opened:
            raise RequestError("canvas: the prompt breaks off in a picture, which says itself what it begins with")
        if canvas.min() < -1 or canvas.max() >= v.codebook_size:
            found = f"{canvas.min()}..{canvas.max()}"
            raise RequestError(f"canvas: expected codes 0..{v.codebook_size - 1}, or -1 to draw, found {found}")
    for stop in request.stop:
        if not isinstance(stop, str) and not all(0 <= id < v.text_size for id in stop):
            raise RequestError(f"stop: expected a text, or ids of text pieces 0..{v.text_size - 1}, found {stop!r:.80}")


def _budget(request: Request, needed: int, most: int, prompt: int, max_length: int) -> int:
    """Tokens of a sample at most."""
    room = max_length - prompt
    pictures = f"{max(request.images[0], int(request.mode == 'image'))} pictures with <eos>"
    if room < needed:
        raise RequestError(
            f"the prompt has {prompt} tokens and {pictures} need {needed} more, "
            f"but the engine's max_length is {max_length}: shorten the prompt or raise max_length"
        )
    budget = request.max_tokens or min(room, most if request.mode == "image" else room)
    if budget > room:
        raise RequestError(
            f"max_tokens: the prompt has {prompt} tokens and the engine's max_length is {max_length}, "
            f"so at most {room} fit, found {budget}"
        )
    if budget < needed:
        raise RequestError(f"max_tokens: {pictures} need {needed}, found {budget}")
    return budget


def _length_class(n: int, max_length: int) -> int:
    """The length of the cache that n tokens go to: max_length, a half or a quarter of it, in multiples of 64.

    Of 64, because XLA on a CPU adds up a row in vectors: behind an incomplete one, a row's bits would depend on how
    much of the cache its batch makes it read (kernels/decode_attention/xla.py).
    """
    classes = [-(-max_length // (_SLOTS * part)) * _SLOTS for part in _PARTS]
    fitting = [length for length in classes if length >= n]
    if not fitting:
        raise RequestError(
            f"negative_prompt: with a picture behind it it takes {n} tokens, but the engine's max_length is "
            f"{max_length}: shorten it or raise max_length"
        )
    return fitting[0]
