"""The slots of a pool, and the arrays that the device gets for the sample in each slot.

R slots, C contexts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from ar_unified.language.syntax import ImageLayout
from ar_unified.sampling import steps
from ar_unified.sampling.decoding import Filters
from ar_unified.sampling.plan import Plan
from ar_unified.sampling.steps import Shape


@dataclass(eq=False)
class Job:
    """One sample in a slot.

    Attributes:
        left: how many steps are left, if that is known.
        tokens: the ids drawn so far, without the given ones.
        logprobs: their log-probabilities, if they are asked for.
    """

    plan: Plan
    index: int
    left: int | None
    tokens: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    finished: bool = False

    def drawn(self) -> np.ndarray:
        """int32 ids of the sample so far: the given ids, then the drawn ids."""
        return np.concatenate([self.plan.given, *self.tokens]).astype(np.int32)

    def drawn_logprobs(self) -> np.ndarray:
        """The log-probabilities of `drawn`: 0 for given tokens."""
        return np.concatenate([np.zeros(len(self.plan.given)), *self.logprobs]).astype(np.float32)


def row_arrays(
    layout: ImageLayout, shape: Shape, slots: int, fresh: dict[int, Job], adapters: Mapping[str, int]
) -> tuple[Any, ...]:
    """The arguments rows, start and position of `steps.insert` for these samples. adapters: the number of each adapter
    by its name."""
    jobs = [fresh.get(i) for i in range(slots)]
    C = shape.contexts

    def column(default: object, value: Any, dtype: DTypeLike) -> Any:
        return np.array([default if job is None else value(job) for job in jobs], dtype)

    def pair(name: str, default: object, dtype: DTypeLike) -> Any:
        def of(job: Job) -> list[Any]:
            return [getattr(f, name) for f in (job.plan.request.text, job.plan.request.image)]

        return column([default] * 2, of, dtype)

    canvas: Any = np.full((slots, layout.height * layout.width), -1, np.int32)
    for i, job in fresh.items():
        if job.plan.request.canvas is not None:
            canvas[i, : job.plan.request.canvas.size] = job.plan.request.canvas.ravel()
    rows = steps.Rows(
        seed=column(0, lambda job: job.plan.request.seed, np.uint32),
        sample=column(0, lambda job: job.index, np.int32),
        weights=column([0] * C, lambda job: job.plan.weights, np.float32),
        start=column([0] * C, lambda job: job.plan.starts, np.int32),
        resets=column([False] * C, lambda job: job.plan.resets, bool),
        filters=Filters(pair("temperature", 0, np.float32), pair("top_k", 0, np.int32), pair("top_p", 1, np.float32)),
        penalty=column(1, lambda job: job.plan.request.repetition_penalty, np.float32),
        canvas=canvas,
        adapter=column(0, lambda job: adapters[job.plan.request.adapter], np.int32),
    )
    starts = [steps.Start() if job is None else job.plan.start for job in jobs]
    start = jax.tree.map(lambda *values: np.array(values, np.int32), *starts)
    position = column([0] * C, lambda job: [len(prefix) for prefix in job.plan.prefixes], np.int32)
    return rows, start, position
