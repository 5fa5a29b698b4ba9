"""Rows of preference pairs for tests: 0 to 2 pairs per row, with answers of different lengths, of text and images."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ar_unified.data.batch import PackedBatch, PreferenceBatch
from ar_unified.language.vocabulary import Role
from ar_unified.training.preference import PreferenceConfig, PreferenceTask
from tests.training import tiny

DPO = PreferenceConfig()
ROWS, LENGTH, PAIRS = 8, 40, 3  # a row has room for three pairs, and at most two are there


def packed(step: int, index: int = 0, count: int = 1) -> PreferenceBatch:
    rng = np.random.default_rng((11, step))
    rows = PackedBatch.padding(ROWS, LENGTH, tiny.VOCABULARY.pad)
    reference = np.zeros((ROWS, PAIRS, 2, len(Role)), np.float32)
    for row in range(ROWS):
        start, pairs = 0, (1, 2, 0, 2)[row % 4]
        for segment in range(1, 2 * pairs + 1):
            n = int(rng.integers(5, LENGTH // 4 + 1))
            text = rng.integers(0, 40, n)
            image = tiny.VOCABULARY.image_offset + rng.integers(0, 60, n)
            document = np.where(np.arange(n) < n - 2 * (row % 3), text, image)
            where = slice(start, start + n)
            rows.tokens[row, where] = document
            rows.targets[row, start : start + n - 1] = document[1:]
            rows.roles[row, start : start + n - 1] = tiny.VOCABULARY.role(document[1:])
            rows.positions[row, where] = np.arange(n)
            rows.doc_start[row, where] = start
            rows.segment_ids[row, where] = segment
            rows.tasks[row, where] = (row + segment) % 4
            rows.prompt[row, start : start + 2] = True
            if segment == 1:  # earlier turns, which are not learned
                rows.roles[row, start + 2] = Role.PAD
            start += n
        reference[row, :pairs] = rng.normal(-9, 3, (pairs, 2, len(Role)))
    batch = PreferenceBatch(rows, reference)
    part = slice(index * ROWS // count, (index + 1) * ROWS // count)
    return jax.tree.map(lambda values: values[part], batch)


def task(preference: PreferenceConfig = DPO, kind: type = PreferenceTask, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        config=tiny.MODEL,
        vocabulary=tiny.VOCABULARY,
        batch=packed,
        validation=[packed(10_000)],
        role_weights={"image": 0.5},
        task_weights={"interleaved": 2.0},
        z_loss=1e-3,
        chunk=32,
        attention_share=False,
        preference=preference,
    )
    return kind(**settings | changes)
