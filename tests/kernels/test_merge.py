"""Merging attention over parts of the keys gives attention over all keys, also if a log-sum-exp is -inf."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.kernels.merge import merge


@jax.jit
def attend(scores, values):
    return jax.nn.softmax(scores, -1) @ values, jax.nn.logsumexp(scores, -1)


def test_parts_merge_to_the_whole_however_far_their_scores_are_apart():
    random = np.random.default_rng(0)
    scores, values = random.standard_normal((5, 90), np.float32), random.standard_normal((90, 8), np.float32)
    scores += np.array([0.0, 1e4, -1e4, 50.0, -50.0], np.float32)[:, None] * (np.arange(90) // 30 - 1)
    expected, expected_lse = attend(scores, values)
    parts = [attend(scores[:, i : i + 30], values[i : i + 30]) for i in (0, 30, 60)]
    outs, lses = zip(*parts, strict=True)
    for out, lse in (jax.jit(merge)(outs, lses), jax.jit(merge)(np.stack(outs), np.stack(lses))):
        np.testing.assert_allclose(out, expected, atol=1e-6)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)


def test_a_part_that_saw_nothing_weighs_nothing():
    outs = jnp.array([[[1.0, 2.0], [jnp.nan, jnp.inf]], [[jnp.nan, jnp.nan], [jnp.nan, 0.0]]])
    lses = jnp.array([[-200.0, -jnp.inf], [-jnp.inf, -jnp.inf]])
    out, lse = jax.jit(merge)(outs, lses)
    np.testing.assert_array_equal(out, [[1.0, 2.0], [0.0, 0.0]])
    np.testing.assert_array_equal(lse, [-200.0, -jnp.inf])


def test_outputs_keep_their_dtype():
    out, lse = jax.jit(merge)(jnp.ones((2, 3, 4), jnp.bfloat16), jnp.zeros((2, 3)))
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, np.log(2), rtol=1e-6)
