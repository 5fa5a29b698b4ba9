"""Turns samples into rows for training a policy: one sample per row, with the ids that each token could have been.

A sample with guidance has a row for each context. The codes of an image are in the same columns of all these rows. So
the hidden states that guidance mixes to draw a code are all in one column.

Axes: B samples, T positions, C contexts, n tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ar_unified.language.grammar import Grammar
from ar_unified.sampling.plan import Plan
from ar_unified.sampling.replay import replay
from ar_unified.sampling.request import Sample
from ar_unified.training.policy import PolicyBatch


def begin(plan: Plan) -> int:
    """The column in which the prompt begins; it is above 0 if another context has a longer prefix."""
    return max(len(prefix) for prefix in plan.prefixes) - len(plan.prefixes[0])


def room(plan: Plan) -> int:
    """The number of columns that the longest possible sample needs."""
    return begin(plan) + len(plan.prompt) + plan.budget


def rows(
    grammar: Grammar, served: Sequence[tuple[Plan, Sample]], length: int, contexts: int, **of_samples: np.ndarray
) -> PolicyBatch[np.ndarray]:
    """A batch of numpy arrays. A sample without tokens, for example after a failed request, becomes a row of padding.

    Args:
        length: T, at least `room` of each plan.
        contexts: C, at least the number of contexts of each plan.
        of_samples: the fields of a PolicyBatch that have one number for each sample.
    """
    B, T, pad = len(served), length, grammar.vocabulary.pad
    drawn, spans, image = replay(grammar, served, T)
    K = spans.shape[2]
    tokens = np.full((B, contexts, T), pad, np.int32)
    positions, doc_start = np.zeros_like(tokens), np.full_like(tokens, T)
    mix = np.zeros(tokens.shape, np.float32)
    mix[:, 0] = 1.0
    batch = PolicyBatch(
        tokens=tokens,
        positions=positions,
        doc_start=doc_start,
        mix=mix,
        targets=np.full((B, T), pad, np.int32),
        drawn=np.zeros((B, T), bool),
        spans=np.zeros((B, T, K, 2), np.int32),
        sampled=np.zeros((B, T), np.float32),
        **of_samples,
    )
    for row, (plan, sample) in enumerate(served):
        n = len(sample.tokens)
        if not n:
            continue
        start = begin(plan)
        behind = start + len(plan.prefixes[0])  # the column after every context's prefix
        later = sample.tokens[len(plan.given) :]
        for context, prefix in enumerate(plan.prefixes):
            first, last = behind - len(prefix), behind + len(later)
            tokens[row, context, first:last] = np.concatenate([prefix, later])
            positions[row, context, first:last] = np.arange(last - first)
            doc_start[row, context, first:last] = first
        own = slice(start + len(plan.prompt) - 1, start + len(plan.prompt) - 1 + n)  # where its tokens are targets
        batch.targets[row, start : behind + len(later) - 1] = tokens[row, 0, start + 1 : behind + len(later)]
        batch.drawn[row, own], batch.spans[row, own] = drawn[row, :n], spans[row, :n]
        if sample.logprobs is not None:
            batch.sampled[row, own] = np.where(drawn[row, :n], sample.logprobs, 0.0)
        text, codes = plan.request.text.temperature, plan.request.image.temperature
        of_image = np.zeros(T, bool)
        of_image[own] = image[row, :n]
        mix[row, 0] = np.where(batch.drawn[row], 1.0 / text, 1.0)
        for context, weight in enumerate(plan.weights):
            mix[row, context] = np.where(of_image, weight / codes, mix[row, context])
    only = ~batch.drawn  # a token that was not drawn had only one possible id, with probability 1
    batch.spans[only] = 0
    batch.spans[only, 0, 0], batch.spans[only, 0, 1] = batch.targets[only], batch.targets[only] + 1
    return batch
