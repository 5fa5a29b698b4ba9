"""EvolvingLMMs' lmms-eval (package lmms-eval 0.7): tasks with pictures in the prompt.

from ar_unified.sampling.adapters.lmms_eval import EngineLMM
lmms_eval.evaluator.simple_evaluate(model=EngineLMM(engine, image_tokenizer), tasks=["mme"])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms
from PIL import Image

from ar_unified.sampling.adapters.model import Content, Model
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.job import ImageTokenizer

_PLACE = "<image>"  # where a task wants a picture in its text


class EngineLMM(lmms):
    """An engine as the harness's multimodal model; arguments as those of `adapters.model.Model`."""

    is_simple = True

    def __init__(
        self,
        engine: Engine,
        image_tokenizer: ImageTokenizer,
        resize: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        max_new_tokens: int = 256,
    ):
        super().__init__()
        self._model = Model(engine, image_tokenizer, resize, max_tokens=max_new_tokens)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """(context, settings, doc_to_visual, doc_id, task, split) each."""
        asked = []
        for context, settings, doc_to_visual, id, task, split in (request.args for request in requests):
            asked.append((_content(context, doc_to_visual(self.task_dict[task][split][id])), settings))
        return self._model.answers(asked)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(context, continuation, doc_to_visual, doc_id, task, split) each: log-likelihood in nats, and whether it is
        the greedy one. The continuation may be a function of the document."""
        pairs = []
        for context, continuation, doc_to_visual, id, task, split in (request.args for request in requests):
            doc = self.task_dict[task][split][id]
            text = continuation if isinstance(continuation, str) else continuation(doc)
            pairs.append((_content(context, doc_to_visual(doc)), text))
        return self._model.likelihoods(pairs)

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("a prompt has one turn: tasks of several rounds cannot be run")


def _content(context: str, visuals: list[Any] | None) -> Content:
    """The pictures where the text has places for them, else before it."""
    pictures = list(visuals or ())
    if any(not isinstance(picture, Image.Image) for picture in pictures):
        raise ValueError(f"expected pictures, found {type(pictures[0]).__name__}: video and sound cannot be read")
    texts = context.split(_PLACE)
    if len(texts) - 1 != len(pictures):
        return [*pictures, context]
    mixed: list[str | Image.Image] = [texts[0]]
    for picture, text in zip(pictures, texts[1:], strict=True):
        mixed += [picture, text]
    return mixed
