"""The search for a top-k or top-p threshold finds the sorted reference's set, whatever the logits are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.sampling.threshold import ranked, threshold

V = 300
RNG = np.random.default_rng(0)
ROWS = {
    "normal": RNG.normal(size=V) * 5,
    "one value": np.full(V, -2.0),
    "two values": np.where(np.arange(V) < 40, 3.0, -3.0),
    "few values": RNG.integers(-3, 3, V).astype(float),
    "a peak": np.where(np.arange(V) == 7, 0.0, -80 + RNG.normal(size=V)),
    "over all magnitudes": -(10.0 ** RNG.uniform(-30, 30, V)),
    "mostly forbidden": np.where(np.arange(V) < 25, RNG.normal(size=V), -np.inf),
    "with zeros": np.where(np.arange(V) % 3 == 0, 0.0, -1.0),
}


def sets(least, weight=None):
    """Which tokens stay in each of ROWS."""
    logits = jnp.asarray(np.stack(list(ROWS.values())), jnp.float32)
    ranks = ranked(logits)
    used = jnp.ones(len(ROWS), bool)
    found = jax.jit(threshold)(ranks, weight, jnp.full(len(ROWS), least, jnp.float32), used)
    return np.asarray(logits), np.asarray((ranks >= found[:, None]) & (logits > -jnp.inf))


@pytest.mark.parametrize("k", [1, 2, 25, 26, 150, 299])
def test_the_k_most_likely_stay_with_their_ties(k):
    logits, kept = sets(k)
    for name, row, stays in zip(ROWS, logits, kept, strict=True):
        want = (row >= np.sort(row)[-k]) & (row > -np.inf)
        np.testing.assert_array_equal(stays, want, err_msg=name)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_smallest_set_with_a_share_of_the_weight_stays(share):
    weight = np.stack([np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in ROWS.values()])
    logits, kept = sets(share, jnp.asarray(weight, jnp.float32))
    for name, row, own, stays in zip(ROWS, logits, weight, kept, strict=True):
        assert own[stays].sum() >= share - 1e-5, name
        bound = row[stays].min()
        assert own[row > bound].sum() < share + 1e-5, name  # without the least likely value it would be too little
        np.testing.assert_array_equal(stays, row >= bound, err_msg=name)


def test_rows_that_do_not_use_it_end_the_search():
    ranks = ranked(jnp.asarray(ROWS["normal"], jnp.float32)[None])
    found = threshold(ranks, None, jnp.array([10.0]), jnp.array([False]))
    assert int(found[0]) == int(ranks.min())  # as it began
