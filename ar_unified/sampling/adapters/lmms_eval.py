"""EvolvingLMMs' lmms-eval (package lmms-eval 0.7): tasks with images in the prompt.

from ar_unified.sampling.adapters.lmms_eval import EngineLMM
lmms_eval.evaluator.simple_evaluate(model=EngineLMM(ar_unified.load("bundle")), tasks=["mme"])
"""

from __future__ import annotations

from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image

from ar_unified.sampling.adapters.harness import Harness, Prompt
from ar_unified.sampling.model import Model

_PLACE = "<image>"  # marks the place of an image in the text


class EngineLMM(lmms):
    """A model as the harness's multimodal model."""

    is_simple = True

    def __init__(self, model: Model, *, max_new_tokens: int = 256):
        super().__init__()
        self._model = Harness(model, max_tokens=max_new_tokens)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The text for each (context, settings, doc_to_visual, doc_id, task, split)."""
        asked = []
        for context, settings, doc_to_visual, id, task, split in (request.args for request in requests):
            asked.append((_content(context, doc_to_visual(self.task_dict[task][split][id])), settings))
        return self._model.answers(asked)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation, doc_to_visual, doc_id, task, split): the continuation's log-likelihood in
        nats, and whether greedy decoding would give the continuation. The continuation may be a function of the
        document."""
        pairs = []
        for context, continuation, doc_to_visual, id, task, split in (request.args for request in requests):
            doc = self.task_dict[task][split][id]
            text = continuation if isinstance(continuation, str) else continuation(doc)
            pairs.append((_content(context, doc_to_visual(doc)), text))
        return self._model.likelihoods(pairs)

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """For each (context, settings, doc_to_visual, doc_to_text, doc_id, task, split): the answers of all its rounds.

        Every round is a separate prompt. `doc_to_text` makes the next prompt from the answers so far, until it says
        that the rounds are over. The task decides whether a prompt repeats earlier rounds.
        """
        answers: list[Any] = [[] for _ in requests]
        asked = {}  # maps a request to the prompt of this round, and to what the task remembers
        for i, request in enumerate(requests):
            context, _, doc_to_visual, _, id, task, split = request.args
            asked[i] = _content(context, doc_to_visual(self.task_dict[task][split][id])), None
        number = 0
        while asked:
            number += 1
            found = self._model.answers([(content, requests[i].args[1]) for i, (content, _) in asked.items()])
            for (i, (_, memory)), answer in zip(list(asked.items()), found, strict=True):
                _, _, _, doc_to_text, id, task, split = requests[i].args
                visuals, context, over, answers[i], memory = doc_to_text(
                    self.task_dict[task][split][id],
                    previous_output=[*answers[i], answer],
                    round_idx=number,
                    previous_round_info=memory,
                )
                if over:
                    del asked[i]
                else:
                    asked[i] = _content(context, visuals), memory
        return [list(rounds) for rounds in answers]


def _content(context: str, visuals: list[Any] | None) -> Prompt:
    """The prompt, with each image at its `<image>` mark in the text. If the text does not have one mark for each image,
    all images come before the text.
    """
    images = list(visuals or ())
    if any(not isinstance(image, Image.Image) for image in images):
        raise ValueError(f"expected images, found {type(images[0]).__name__}: video and sound cannot be read")
    texts = context.split(_PLACE)
    if len(texts) - 1 != len(images):
        return [*images, context]
    mixed: list[str | Image.Image] = [texts[0]]
    for image, text in zip(images, texts[1:], strict=True):
        mixed += [image, text]
    return mixed
