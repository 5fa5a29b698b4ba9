"""A training run of a few seconds: the real transformer, with two layers of width 32, on packed random documents.

As a script it is the run that tests kill: python tests/training/tiny.py FOLDER
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh

from ar_unified.data.batch import PackedBatch
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import TransformerConfig
from ar_unified.parallel.mesh import make_mesh
from ar_unified.training import loop
from ar_unified.training.loop import TrainingConfig
from ar_unified.training.optimizer import OptimizerConfig
from ar_unified.training.tasks import TransformerTask

VOCABULARY = Vocabulary(text_size=40, codebook_size=60, size_tokens=4)
MODEL = TransformerConfig(
    vocab_size=VOCABULARY.size, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_mlp=64, qk_norm="rmsnorm"
)
TRAINING = TrainingConfig(
    steps=8,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    log_every=2,
    validate_every=0,
    checkpoint_every=3,
)
ROWS, LENGTH = 8, 24
ROLE_WEIGHTS, TASK_WEIGHTS, TEXT_BYTES = {"image": 0.5}, {"interleaved": 2.0}, np.arange(1, 41)


def packed(step: int, index: int = 0, count: int = 1, rows: int = ROWS, length: int = LENGTH) -> PackedBatch:
    """Rows of two documents and padding of different lengths. Every text id is followed by an image code, so there is
    much to learn."""
    rng = np.random.default_rng((7, step))
    batch = PackedBatch.padding(rows, length, VOCABULARY.pad)
    for row in range(rows):
        start = 0
        for segment, n in enumerate(rng.integers(4, length // 2, 2), 1):
            text = rng.integers(0, 40, n)
            document = np.where(np.arange(n) % 2 == 0, text, VOCABULARY.image_offset + np.roll(text, 1) % 60)
            where = slice(start, start + n)
            batch.tokens[row, where] = document
            batch.targets[row, start : start + n - 1] = document[1:]
            batch.roles[row, start : start + n - 1] = VOCABULARY.role(document[1:])
            batch.positions[row, where] = np.arange(n)
            batch.doc_start[row, where] = start
            batch.segment_ids[row, where] = segment
            batch.tasks[row, where] = segment % 4
            batch.prompt[row, start : start + n // 2] = segment == 2
            start += n
    part = slice(index * rows // count, (index + 1) * rows // count)
    return jax.tree.map(lambda values: values[part], batch)


def task(**changes: Any) -> TransformerTask:
    settings: dict[str, Any] = dict(
        config=MODEL,
        vocabulary=VOCABULARY,
        batch=packed,
        validation=[packed(10_000)],
        role_weights=ROLE_WEIGHTS,
        task_weights=TASK_WEIGHTS,
        prompt_weight=0.25,
        z_loss=1e-3,
        text_bytes=TEXT_BYTES,
        chunk=32,
        attention_share=False,
    )
    return TransformerTask(**settings | changes)


def fit(task: Any, config: TrainingConfig, folder: str | Path, **options: Any) -> Any:
    """The loop's `fit`. All tasks that differ only in their data share programs, because tracing a step takes longer
    than running it. A run that continues after a kill has the same program as before.
    """

    def kept(make: Callable[..., Any]) -> Callable[..., Any]:
        def once(task: Any, *rest: Any, **options: Any) -> Any:
            fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
            asked = [_hashable(value) for name, value in fields.items() if name not in ("batch", "validation")]
            mesh = next(x for x in rest if isinstance(x, Mesh))
            key = (make, type(task), *asked, config.optimizer, config.steps, mesh, repr(options))
            if key not in _PROGRAMS:
                _PROGRAMS[key] = task, make(task, *rest, **options)
            return _PROGRAMS[key][1]

        return once

    with contextlib.ExitStack() as stack:
        for name in ("abstract_state", "make_train_step", "make_eval_step", "make_inspection"):
            stack.enter_context(mock.patch.object(loop, name, kept(getattr(loop, name))))
        return loop.fit(task, config, folder, **options)


_PROGRAMS: dict[Any, tuple[Any, Any]] = {}  # the task is kept, because a key may contain the id() of its fields


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def run(folder: str | Path, *, task: Any = None, mesh: Any = None, **changes: Any) -> Any:
    """fit() of the tiny task on one device unless told otherwise; quiet."""
    import jax

    mesh = mesh or make_mesh({}, jax.devices()[:1])
    settings = {key: changes.pop(key) for key in ("manifest", "preview", "logger") if key in changes}
    settings.setdefault("logger", lambda line: None)
    return fit(task or globals()["task"](), replace(TRAINING, **changes), folder, mesh=mesh, **settings)


if __name__ == "__main__":
    run(sys.argv[1], logger=lambda line: print(line, flush=True), steps=60, checkpoint_every=5, log_every=1)
