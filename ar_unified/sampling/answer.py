"""Turns the tokens of an answer into a Sample: finds where and why the answer ends, and parses it into a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ar_unified.language.document import Document, Part, TextPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.reading import GrammarError
from ar_unified.sampling.plan import Plan
from ar_unified.sampling.request import Sample

Stop = str | tuple[int, ...]  # a text, or ids of text pieces


def finished(grammar: Grammar, plan: Plan, index: int, tokens: np.ndarray, broken: bool = False) -> Sample:
    """The sample of a row that has ended. tokens: int32 [n], with <eos>. broken: whether the row's logits were NaN."""
    request = plan.request
    if broken:
        reason = "the model's logits were NaN: the weights are broken, or overflow in the compute dtype"
        return Sample(request, index, tokens, None, "error", reason)
    try:
        document = _document(grammar, plan, tokens)
    except GrammarError as error:
        return Sample(request, index, tokens, None, "error", str(error))
    # The budget ended the sample if the grammar allowed more tokens, but the rest of the budget was too small for them.
    left = plan.budget - len(tokens)
    if request.mode == "image":
        images = sum(not isinstance(part, TextPart) for part in document.parts)
        cut = images < request.images[1] and left < plan.smallest
    else:
        cut = left == 0
    return Sample(request, index, tokens, document, "length" if cut else "eos")


def stopped(grammar: Grammar, plan: Plan, index: int, tokens: np.ndarray) -> Sample | None:
    """The sample if tokens int32 [n] contain one of the request's stops; else None. The sample's tokens end with the
    stop, and its document ends before the stop.
    """
    found = _first_stop(grammar, plan, tokens)
    if found is None:
        return None
    end, stop = found
    said = tokens[
        : end if isinstance(stop, str) else end - len(stop)
    ]  # the tokens of a stop text are kept here, because it may begin inside a piece
    sample = finished(grammar, plan, index, np.append(said, grammar.syntax.end).astype(np.int32))
    if sample.document is None:
        return replace(sample, tokens=tokens[:end])
    parts = sample.document.parts
    if isinstance(stop, str):
        *before, last = parts
        assert isinstance(last, TextPart)
        text = last.text[: last.text.rindex(stop)]
        parts = (*before, TextPart(text)) if text else tuple(before)
    document = Document.of(parts, id=plan.request.id, meta=plan.request.meta)
    return replace(sample, tokens=tokens[:end], document=document, finish_reason="stop")


def _document(grammar: Grammar, plan: Plan, tokens: np.ndarray) -> Document:
    """The document that follows the prompt. Text that continues the prompt's text becomes a separate part."""
    prompt = plan.prompt
    at = grammar.breaks_off(prompt)
    opened = prompt[at.begin :]
    parts: tuple[Part, ...] = grammar.parse(np.concatenate([prompt[:1], opened, tokens, grammar.tail])).parts
    *_, (begin, end) = (0, 0), *grammar.texts(prompt)
    before = prompt[begin:end] if end == len(prompt) and not len(opened) else prompt[:0]
    runs = grammar.texts(np.append(prompt[:1], tokens)) if len(before) else []
    if runs and runs[0][0] == 1:  # the tokens begin with text, and this text does not open an image
        # The ids are decoded again, after the prompt's text, because their meaning may depend on the text before them.
        first = tokens[: runs[0][1] - 1]
        whole, known = (grammar.text_codec.decode([int(i) for i in ids])
                        for ids in (np.concatenate([before, first]), before))  # fmt: skip
        rest = parts[1:] if parts and isinstance(parts[0], TextPart) else parts
        said = whole.removeprefix(known)
        parts = (TextPart(said), *rest) if said else rest
    return Document.of(parts, id=plan.request.id, meta=plan.request.meta)


def _first_stop(grammar: Grammar, plan: Plan, tokens: np.ndarray) -> tuple[int, Stop] | None:
    """Returns (n, stop) for the stop that comes first, or None. n is the smallest number of tokens that contain it. A
    stop never spans an image.
    """
    stops = plan.request.stop
    before = np.append(plan.prompt[:1], plan.prompt[grammar.breaks_off(plan.prompt).begin :])
    for run in grammar.texts(np.concatenate([before, tokens])):
        begin, end = (max(at - len(before), 0) for at in run)
        ids = [int(i) for i in tokens[begin:end]]
        ends = (_find_text(grammar, ids, stop) if isinstance(stop, str) else _find_ids(ids, stop) for stop in stops)
        found = [(begin + n, stop) for n, stop in zip(ends, stops, strict=True) if n is not None]
        if found:
            return min(found, key=lambda pair: pair[0])
    return None


def _find_text(grammar: Grammar, ids: Sequence[int], stop: str) -> int | None:
    """The smallest n such that the text of ids[:n] contains `stop`."""
    decode = grammar.text_codec.decode
    if stop not in decode(ids):
        return None
    low, high = 0, len(ids)  # decode(ids[:high]) contains the stop, decode(ids[:low]) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if stop in decode(ids[:middle]) else (middle, high)
    return high


def _find_ids(ids: Sequence[int], stop: Sequence[int]) -> int | None:
    """The position in `ids` just after the first occurrence of `stop`, or None."""
    n = len(stop)
    return next((i + n for i in range(len(ids) - n + 1) if tuple(ids[i : i + n]) == tuple(stop)), None)
