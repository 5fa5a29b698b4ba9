"""The metrics of a step by modality: log Z, and the number of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.language.vocabulary import Role
from ar_unified.model.transformer import Transformer
from tests.training import tiny


def test_log_z_by_role_is_the_log_partition_of_those_positions(params):
    task, batch = tiny.task(), tiny.packed(1)
    _, _, metrics = jax.jit(lambda p, b: task.loss(p, {}, b, None))(params, batch)

    def log_partition(params, batch):
        hidden = Transformer.bind(task.config, params)(batch.tokens, batch.positions, batch.doc_start)
        return jax.nn.logsumexp(jnp.einsum("btd,vd->btv", hidden, params["head"]), axis=-1)

    log_z = np.asarray(jax.jit(log_partition)(params, batch))
    trained = np.asarray(task.weights(batch)) > 0
    roles = task.vocabulary.role(batch.targets)
    of = {role.name.lower(): trained & (roles == role) for role in Role if role != Role.PAD}
    for name, where in of.items():
        total, count = metrics[f"log_z/role/{name}"]
        assert count == where.sum() and total == pytest.approx(log_z[where].sum(), rel=1e-5), name
    assert of["text"].sum() and of["image"].sum()
    found = task.summary(jax.device_get(metrics))
    assert found["log_z/role/image"] == pytest.approx(log_z[of["image"]].mean(), rel=1e-5)
    assert found["log_z/role/image"] != found["log_z/role/text"] and "log_z/role/size" not in found


def test_tokens_are_counted_by_what_is_read(params):
    task, batch = tiny.task(), tiny.packed(1)
    _, _, metrics = jax.jit(lambda p, b: task.loss(p, {}, b, None))(params, batch)
    assert {f"tokens/{role.name.lower()}" for role in Role if role != Role.PAD} < set(metrics)
    present = batch.segment_ids > 0
    text = present & (batch.tokens < tiny.VOCABULARY.text_size)
    image = present & (batch.tokens >= tiny.VOCABULARY.image_offset)
    assert metrics["tokens/text"] == text.sum() and metrics["tokens/image"] == image.sum()
    assert text.sum() + image.sum() == metrics["tokens"] == present.sum()
    assert "tokens/text" not in task.summary(jax.device_get(metrics))  # telemetry.Meter reports a rate instead


def test_both_are_in_the_log_line_and_the_metrics(tmp_path):
    from ar_unified.metrics import read_metrics

    lines = []
    tiny.run(tmp_path, steps=4, logger=lines.append, task=tiny.task())
    row = next(row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row)
    whole = row["tokens_per_second"]
    assert row["tokens_per_second/text"] + row["tokens_per_second/image"] == pytest.approx(whole)
    assert {"log_z", "log_z/role/text", "log_z/role/image"} <= set(row)
    assert any("tokens/s (" in line and "text " in line and "image " in line for line in lines)
    board = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"tokens_per_second/text" in board and b"log_z/role/image" in board
