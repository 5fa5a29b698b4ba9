"""The numbered prompts for training by rewards, made from the documents of the training sources.

Prompt number n is the same in every process, so the groups of answers do not depend on the number of processes. Every
epoch of a source has each of its documents once. A document that asks nothing, is bad or does not fit is left out. It
is counted and named, and the next document of its source replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ar_unified.data.counter_rng import hash64, key, permute
from ar_unified.data.images import ImageCodec, by_size
from ar_unified.data.items import BadItem, LeftOut, Source
from ar_unified.data.packing import Mixture
from ar_unified.errors import UserError
from ar_unified.language.document import CodesPart, Document, ImagePart, Part, TextPart
from ar_unified.language.reading import GrammarError
from ar_unified.sampling.plan import Plan
from ar_unified.sampling.request import Request, RequestError

_LOOKED_AT = 1000  # maximum number of consecutive documents that are tried to find a prompt


@dataclass(frozen=True)
class Asked:
    """A document that asks something, and the plan of its answer. The document's images already have the size in which
    they are encoded."""

    document: Document
    plan: Plan


class Prompts:
    """Returns the prompt with a given number.

    Args:
        sources, weights: the sources of documents, and their shares.
        drawn: how an answer is drawn; mode "free" means the mode of the document's own answer.
        plan: a function like `Engine.plan`, which raises RequestError or GrammarError if a request does not fit.
        tokenizer: encodes images in prompts.
        fit: resizes an image as data preparation does.
        seed: decides the order, and the seeds of the answers.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        drawn: Request,
        plan: Callable[[Request], Plan],
        tokenizer: ImageCodec,
        fit: Callable[[np.ndarray], np.ndarray],
        seed: int,
    ):
        self._sources, self._drawn, self._plan, self._fit, self._seed = sources, drawn, plan, fit, seed
        self._tokenizer = tokenizer
        self._mixture = Mixture([len(source) for source in sources], weights)
        self.left_out = LeftOut()

    def __call__(self, number: int) -> Asked:
        """Prompt `number`. Raises UserError if none of many documents can serve as a prompt."""
        picks = self._mixture.picks(number, number + 1)
        source, item = self._sources[int(picks.source[0])], int(picks.item[0])
        stream = key(self._seed, "prompts", source.name, int(picks.epoch[0]))
        for attempt in range(min(_LOOKED_AT, len(source))):
            index = int(permute((item + attempt) % len(source), len(source), stream))
            try:
                return self._asked(source[index], source.origin(index), number)
            except BadItem as bad:
                self.left_out(bad)
        raise UserError(f"source {source.name!r}: no document can serve as a prompt; left out: {self.left_out}")

    def _fitted(self, part: Part) -> Part:
        return ImagePart(self._fit(part.pixels)) if isinstance(part, ImagePart) else part

    def _asked(self, document: Document, origin: str, number: int) -> Asked:
        if not document.asks or not any(turn.parts for turn in document.asked):
            raise BadItem("no_question", origin, "the document asks nothing")
        document = document.changed(self._fitted)
        images = [part.pixels for turn in document.asked for part in turn.parts if isinstance(part, ImagePart)]
        codes = iter(by_size(self._tokenizer.encode, images) if images else ())

        def coded(part: Part) -> Part:
            return CodesPart(next(codes)) if isinstance(part, ImagePart) else part

        asked = [replace(turn, parts=tuple(map(coded, turn.parts))) for turn in document.asked]
        request = replace(
            self._drawn,
            id=f"{document.id or origin} #{number}",
            seed=int(hash64(key(self._seed, "answers"), number) & np.uint64(0xFFFFFFFF)),
            parts=asked[-1].parts,
            history=tuple(asked[:-1]),
            mode=_mode(document) if self._drawn.mode == "free" else self._drawn.mode,
        )
        try:
            return Asked(document, self._plan(request))
        except (RequestError, GrammarError) as error:
            raise BadItem("no_room", origin, str(error)) from error


def _mode(document: Document) -> Any:
    """The mode of the document's own answer: images alone, text alone, or both."""
    kinds = {isinstance(part, TextPart) for part in document.answer}
    return {frozenset([False]): "image", frozenset([False, True]): "interleaved"}.get(frozenset(kinds), "text")
