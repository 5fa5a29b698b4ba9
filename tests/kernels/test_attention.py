"""Attention: every backend is compared with the reference, forward and backward, on packed rows with padding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.kernels.attention import attention, xla
from ar_unified.kernels.merge import merge
from tests.kernels.cases import CASES, Case

# Programs run only briefly, so most of the time is for compiling interpreted kernels.
HASTILY = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=HASTILY)
def outputs_and_gradients(options: tuple, backend: str, q, k, v, bar, lse_bar, doc_start):
    """Cases that differ only in their documents or numbers share one program."""

    def run(q, k, v):
        return attention(q, k, v, doc_start=doc_start, return_lse=True, backend=backend, **dict(options))

    (out, lse), pull = jax.vjp(run, q, k, v)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *pull((bar, lse_bar))), strict=True))


def run(case: Case, backend: str, dtype=jnp.float32) -> dict[str, np.ndarray]:
    q, k, v, bar = case.arrays(dtype)
    doc_start = jnp.asarray(case.doc_start)
    # A log-sum-exp of -inf has no gradient; all others have one, which must be right.
    lse_bar = jnp.where(doc_start[..., None] < case.T, jnp.cos(jnp.arange(case.heads, dtype=jnp.float32)), 0.0)
    options = tuple(case.options.items())
    return jax.tree.map(np.asarray, outputs_and_gradients(options, backend, q, k, v, bar, lse_bar, doc_start))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, with norms of whole arrays."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["xla", "tpu_interpret"])
def test_a_backend_equals_the_reference(backend, name):
    case = CASES[name]
    expected, found = run(case, "reference"), run(case, backend)
    for what, value in found.items():
        finite = np.isfinite(expected[what])
        np.testing.assert_array_equal(np.isfinite(value), finite, err_msg=what)
        assert relative(value[finite], expected[what][finite]) < 1e-5, what


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu_interpret"])
def test_padding_is_exactly_zero_forward_and_backward(backend):
    case = CASES["nothing but padding"]
    padding = case.doc_start == case.T
    for what, value in run(case, backend).items():
        if what == "lse":
            assert (value[padding] == -np.inf).all()
        else:
            assert not value[padding].any() and np.isfinite(value).all(), what
            assert value[~padding].any(), what


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu_interpret"])
def test_parts_of_a_row_with_offsets_are_the_parts_of_the_whole(backend):
    case = CASES["padding at the end"]
    q, k, v, _ = case.arrays()
    doc_start = jnp.asarray(case.doc_start)
    whole = attention(q, k, v, doc_start=doc_start, backend="reference")

    def compiled(**known):
        return jax.jit(functools.partial(attention, backend=backend, **known), compiler_options=HASTILY)

    part = dict(q=q[:, 128:256], k=k, v=v, doc_start=doc_start[:, 128:256])
    np.testing.assert_allclose(compiled(q_offset=128)(**part), whole[:, 128:256], atol=1e-5)  # a static offset
    for offset in (jnp.int32(128), jnp.array([128, 128])):  # dynamic, and one for each row
        np.testing.assert_allclose(compiled()(**part, q_offset=offset), whole[:, 128:256], atol=1e-5)
    # Keys are divided too: their two halves are merged with their log-sum-exps.
    half = compiled(return_lse=True)
    halves = [
        half(q, k[:, i : i + 192], v[:, i : i + 192], doc_start=doc_start, kv_offset=jnp.int32(i)) for i in (0, 192)
    ]
    np.testing.assert_allclose(merge(*zip(*halves, strict=True))[0], whole, atol=1e-5)


def test_what_does_not_fit_is_refused_in_words():
    q, k, v, _ = CASES["multi-head"].arrays()
    doc_start = jnp.zeros(q.shape[:2], jnp.int32)
    for wrong, message in (
        (dict(backend="cuda"), "expected one of auto, reference, xla"),
        (dict(window=0), "window of at least 1 key; found 0"),
        (dict(k=k[:, :, :3], v=v[:, :, :3]), "K dividing N"),
        (dict(doc_start=doc_start[:1, :4]), "expected doc_start int32"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(**(dict(q=q, k=k, v=v, doc_start=doc_start) | wrong))


@pytest.mark.parametrize("prefixes", [2, 8])
def test_chunks_in_a_loop_equal_chunks_one_by_one(monkeypatch, prefixes):
    monkeypatch.setattr(xla, "CHUNK", 64)
    monkeypatch.setattr(xla, "PREFIXES", prefixes)
    case = dataclasses.replace(CASES["T no multiple of a block"], head_dim=8, soft_cap=3.0)
    expected = run(case, "reference")
    own = dataclasses.replace(case, soft_cap=3.0 + prefixes * 1e-9)  # new options, so no program in memory is reused
    for what, value in run(own, "xla").items():
        finite = np.isfinite(expected[what])
        assert relative(value[finite], expected[what][finite]) < 1e-5, what


def test_memory_of_the_xla_path_grows_with_the_length_of_a_row_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr(xla, "CHUNK", 8)
    monkeypatch.setattr(xla, "PREFIXES", 2)
    doc_start = jnp.zeros((1, 96), jnp.int32)

    def loss(x):
        return attention(x, x, x, doc_start=doc_start, backend="xla").sum()

    saved = jax.eval_shape(lambda x: jax.vjp(loss, x)[1], jnp.ones((1, 96, 1, 2)))
    largest = max(leaf.size for leaf in jax.tree.leaves(saved))
    assert largest <= 2 * 96 < 96 * 8  # residuals are as large as a query; no chunk of scores is kept
