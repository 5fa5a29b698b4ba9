"""EleutherAI's lm-evaluation-harness (package lm-eval 0.4): text tasks.

    from ar_unified.sampling.adapters.lm_eval import EngineLM
    lm_eval.simple_evaluate(model=EngineLM(ar_unified.load("bundle")), tasks=["hellaswag"])

Prompts that are too long lose their beginning, as usual in that harness.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM

from ar_unified.language.document import TokensPart
from ar_unified.sampling.adapters.harness import Harness
from ar_unified.sampling.model import Model


class EngineLM(LM):
    """A model as the harness's language model.

    Args:
        turn: whether prompts are answered (True) or texts are continued (False).
        max_gen_toks: the most tokens of an answer, if the task sets no limit.
    """

    def __init__(self, model: Model, *, turn: bool = False, max_gen_toks: int = 256):
        super().__init__()
        self._model = Harness(model, turn=turn, max_tokens=max_gen_toks)
        self._encode = model.grammar.text_codec.encode
        self._room = model.engine.max_length - 2 - turn  # tokens of text, besides <bos>, <eos> and <eot>

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-likelihood in nats, and whether greedy decoding
        would give the continuation.
        """
        pairs = []
        for context, continuation in (request.args for request in requests):
            # A space between context and continuation belongs to the continuation, because tokenizers put spaces at the
            # start of pieces.
            bare = context if self._model.turn else context.rstrip()
            given = self._encode(bare) if bare else []
            if self._model.turn:
                scored = self._encode(continuation)
            else:
                scored = self._encode(context + continuation)[len(given) :]
            pairs.append((self._behind(given, len(scored)), TokensPart(tuple(scored))))
        return self._model.likelihoods(pairs)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """For each (text,): the log-likelihood of the whole text. A long text is cut into pieces as large as fit, and
        every token counts once. The context of a token is the part of its piece before it. If the last piece is
        shorter, as many earlier tokens as fit come before it.
        """
        pairs, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            ids = self._encode(text)
            for start in range(0, len(ids), self._room):
                end = min(start + self._room, len(ids))
                scored = tuple(ids[start:end])
                pairs.append((self._behind(ids[:start], len(scored)), TokensPart(scored)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._model.likelihoods(pairs), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """For each (context, settings): the generated text, up to the first of the texts in `until`."""
        asked = []
        for context, settings in (request.args for request in requests):
            budget = settings.get("max_gen_toks") or self._model.max_tokens
            ids = self._encode(context) if context else []
            fits = len(ids) + budget <= self._room
            asked.append(((context,) if fits else self._behind(ids, budget), settings))
        return self._model.answers(asked)

    def _behind(self, ids: list[int], more: int) -> tuple[TokensPart, ...]:
        """The last part of a context, short enough to leave room for `more` tokens."""
        kept = ids[max(0, len(ids) - max(self._room - more, 0)) :]
        return (TokensPart(tuple(kept)),) if kept else ()
