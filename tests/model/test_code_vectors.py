"""Initial rows of image codes are similar for similar codes and as large as other rows; rows of text do not change."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.model import transformer
from ar_unified.model.code_vectors import CODE_EMBEDDING_INITS, extended_tables, init_from_codebook, random_features
from ar_unified.parallel.mesh import make_mesh
from ar_unified.training.optimizer import make_optimizer
from ar_unified.training.step import abstract_state, make_state
from tests.training import tiny

VECTORS = np.random.default_rng(0).normal(size=(tiny.VOCABULARY.codebook_size, 5)).astype(np.float32)


def test_products_of_features_are_those_of_a_gaussian_of_the_distance():
    features = np.asarray(random_features(3.0 + 2.0 * jnp.asarray(VECTORS), 1 << 16, jax.random.key(0)))
    radius = np.sqrt(np.square(VECTORS - VECTORS.mean(axis=0)).sum(axis=1).mean())
    distance = np.linalg.norm(VECTORS[:, None] - VECTORS[None], axis=-1) / radius
    np.testing.assert_allclose(features @ features.T / features.shape[1], np.exp(-(distance**2) / 2), atol=0.02)


def test_a_codebook_of_one_vector_is_no_division_by_zero():
    assert np.isfinite(random_features(jnp.ones((4, 3)), 8, jax.random.key(0))).all()


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_rows_of_codes_change_and_keep_their_size(tied):
    config = dataclasses.replace(tiny.MODEL, d_model=512, tie_embeddings=tied)
    before = transformer.init(config, jax.random.key(0))
    offset, codes = tiny.VOCABULARY.image_offset, tiny.VOCABULARY.codebook_size
    after = init_from_codebook(before, jnp.asarray(VECTORS), offset, jax.random.key(1))
    changed = {name for name in before if jax.tree.leaves(before[name])[0] is not jax.tree.leaves(after[name])[0]}
    assert changed == ({"embedding"} if tied else {"embedding", "head"})
    before, after = jax.device_get((before, after))
    for name in changed:
        rows = np.zeros(config.vocab_size, bool)
        rows[offset : offset + codes] = True
        np.testing.assert_array_equal(np.any(before[name] != after[name], axis=1), rows)
        assert np.std(after[name][rows]) == pytest.approx(np.std(before[name][rows]), rel=0.05)
    nearest = np.argsort(np.linalg.norm(VECTORS[:, None] - VECTORS[None], axis=-1), axis=1)[:, 1]
    table = after["embedding"][offset : offset + codes]
    similar = np.sum(table * table[nearest], axis=1) / np.sum(table * table, axis=1)
    others = np.sum(table * np.roll(table, 7, axis=0), axis=1) / np.sum(table * table, axis=1)
    assert similar.mean() > others.mean() + 0.15


@pytest.mark.exact
def test_a_task_begins_so_on_any_mesh():
    task, tx = tiny.task(code_vectors=VECTORS), make_optimizer(tiny.TRAINING.optimizer, 8)
    found = []
    for shape, count in ((dict(data=1), 1), (dict(fsdp=4, tensor=2), 8)):
        mesh = make_mesh(shape, jax.devices()[:count])
        placement = jax.tree.map(lambda x: x.sharding, abstract_state(task, tx, mesh))
        found.append(jax.device_get(jax.jit(lambda: make_state(task, tx, 0), out_shardings=placement)()).params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)
    plain = tiny.task().init(jax.random.key(0))
    assert not np.allclose(plain["embedding"], found[0]["embedding"])
    with pytest.raises(ValueError, match="one for each of 60 image codes, found 59"):
        tiny.task(code_vectors=VECTORS[1:])


@pytest.mark.parametrize("how", CODE_EMBEDDING_INITS)
@pytest.mark.parametrize("tables", [("embedding",), ("embedding", "head")])
def test_new_rows_of_a_language_model_begin_around_the_mean_of_its_text(how, tables):
    """Rows 0 ... 39 are text, and 3 controls follow. The new table has 2 more controls, 60 codes and 1 unused row."""
    rng = np.random.default_rng(0)
    old = {name: rng.normal(i + 1, 0.5, (44, 16)).astype(np.float32) for i, name in enumerate(tables)}
    rows = np.array([*range(43), -1, -1, *[-1] * 60, 43], np.int32)
    codes = range(45, 105)
    grow = jax.jit(
        lambda params: extended_tables(params, rows, 40, codes, how, jnp.asarray(VECTORS), jax.random.key(1))
    )
    found = jax.device_get(grow(old | {"norm": np.ones(3)}))
    assert set(found) == {*tables, "norm"}
    for name in tables:
        table, text = found[name], old[name][:40]
        np.testing.assert_array_equal(table[rows >= 0], old[name][rows[rows >= 0]])
        mean, new = text.mean(0), table[codes.start : codes.stop]
        np.testing.assert_allclose(table[43:45], np.stack([mean, mean]), atol=1e-6)
        spread = 0.0 if how == "mean" else np.sqrt(np.mean((text - mean) ** 2))
        assert np.sqrt(np.mean((new - mean) ** 2)) == pytest.approx(spread, rel=0.25, abs=1e-6)
    if how == "codebook":  # similar codes have similar rows
        gaps = np.linalg.norm(VECTORS[:, None] - VECTORS, axis=-1)
        apart = np.linalg.norm(new[:, None] - new, axis=-1)
        near = (gaps > 0) & (gaps < np.quantile(gaps, 0.1))
        assert apart[near].mean() < apart[gaps > np.median(gaps)].mean()
