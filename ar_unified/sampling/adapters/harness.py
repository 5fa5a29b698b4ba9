"""The common part of all adapters: answers to prompts, and the likelihood of a text after a prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ar_unified.language.document import Part, TextPart, TokensPart
from ar_unified.language.reading import GrammarError
from ar_unified.manifests import Json
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.model import Content, Model
from ar_unified.sampling.plan import prompt_tokens
from ar_unified.sampling.request import Request, RequestError
from ar_unified.sampling.score import pieces

_BUDGET = ("max_new_tokens", "max_gen_toks", "max_tokens")  # the harnesses' names for max_tokens

log = logging.getLogger(__name__)

Prompt = Sequence[Content]  # in reading order


class Harness:
    """A model with the functions that harnesses need.

    Args:
        model: the model; it decodes the prompts of one call together, in its slots.
        turn: whether prompts are answered (True) or continued (False).
        max_tokens: the most tokens of an answer, if the harness sets no limit.

    If a prompt cannot be served, for example because it is too long, a warning is logged. The answer is then "", and
    the log-likelihood is -inf.
    """

    def __init__(self, model: Model, *, turn: bool = True, max_tokens: int = 256):
        self.engine, self.parts, self.turn, self.max_tokens = model.engine, model.parts, turn, max_tokens

    def answers(self, asked: Sequence[tuple[Prompt, Mapping[str, Json]]]) -> list[str]:
        """The text of the answer to each prompt. Decoding is greedy unless the prompt's settings have `do_sample` or a
        temperature. The answer ends before the first of the texts in `until`, and has at most `max_new_tokens` tokens.
        """
        answers = [""] * len(asked)
        for sample in self.engine.generate(self._requests(asked)):
            if sample.document is None:
                log.warning("request %s: %s", sample.request.id, sample.error)
                continue
            answers[int(sample.request.id)] = "".join(
                part.text for part in sample.document.parts if isinstance(part, TextPart)
            )
        return answers

    def likelihoods(self, asked: Sequence[tuple[Prompt, str | TokensPart]]) -> list[tuple[float, bool]]:
        """Returns, for each (prompt, continuation), the log-likelihood of the continuation in nats, and whether greedy
        decoding would give the continuation."""
        found = [(-math.inf, False)] * len(asked)
        pairs: dict[int, tuple[Request, tuple[Part | TokensPart, ...]]] = {}
        for i, (content, text) in enumerate(asked):
            request = Request(str(i), self.parts(content), turn=self.turn, mode="text")
            pair = request, (TextPart(text) if isinstance(text, str) else text,)
            try:
                length = sum(map(len, pieces(self.engine.grammar, pair)))
                if length > self.engine.max_length:
                    most = self.engine.max_length
                    raise RequestError(f"prompt and continuation have {length} tokens, but max_length is {most}")
                pairs[i] = pair
            except (RequestError, GrammarError) as error:
                log.warning("request %d: %s", i, error)
        for i, likely in zip(pairs, self.engine.score(pairs.values()), strict=True):
            found[i] = likely.log_likelihood, all(part.greedy for part in likely.parts)
        return found

    def _requests(self, asked: Sequence[tuple[Prompt, Mapping[str, Any]]]) -> Iterable[Request]:
        for i, (content, settings) in enumerate(asked):
            until = settings.get("until") or ()
            request = Request(
                str(i),
                self.parts(content),
                turn=self.turn,
                mode="text",
                seed=i,
                stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
                text=_filter(settings),
            )
            budget = next((settings[key] for key in _BUDGET if settings.get(key)), self.max_tokens)
            try:
                room = self.engine.max_length - len(prompt_tokens(self.engine.grammar, request))
                if room > 0:
                    request = replace(request, max_tokens=min(int(budget) + 1, room))  # our max_tokens counts <eos>
            except (RequestError, GrammarError):
                pass  # the engine reports the error with the sample, for example if a prompt is too long
            yield request


def _filter(settings: Mapping[str, Any]) -> Filter:
    temperature = settings.get("temperature")
    if settings.get("do_sample") is False or (temperature is None and not settings.get("do_sample")):
        temperature = 0.0
    return Filter(
        temperature=1.0 if temperature is None else float(temperature),
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1.0),
    )
