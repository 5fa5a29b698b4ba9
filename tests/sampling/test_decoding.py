"""Drawing one token: filters compared with a sorted reference, forced and greedy rows, and invalid logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.language.automaton import Event
from ar_unified.sampling import decoding, guidance
from ar_unified.sampling.decoding import Filter, Filters

B, V = 64, 300


def sorted_reference(logits: np.ndarray, k: int, p: float) -> np.ndarray:
    """The ids that one row keeps, by sorting; ties at the border stay."""
    order = np.sort(logits)[::-1]
    keep = logits >= order[min(k, len(order)) - 1] if k else np.isfinite(logits)
    keep &= np.isfinite(logits)
    if p < 1:
        x = np.where(keep, logits, -np.inf).astype(np.float64)
        prob = np.exp(x - x.max())
        prob /= prob.sum()
        ranked = np.sort(prob)[::-1]
        last = ranked[np.searchsorted(np.cumsum(ranked), p)]
        keep &= prob >= last
    return keep


def test_filters_equal_a_sorted_reference():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (B, V)).astype(np.float32)
    logits[rng.random((B, V)) < 0.3] = -np.inf
    logits[0, :10] = logits[0, 10]  # ties
    k = rng.integers(0, V, B).astype(np.int32)
    p = np.where(rng.random(B) < 0.3, 1.0, rng.uniform(0.05, 0.999, B)).astype(np.float32)
    k[:3], p[:3] = (1, 0, 5), (1.0, 0.5, 1.0)
    found = np.asarray(jax.jit(decoding.nucleus)(logits, k, p))
    for row in range(B):
        expected = sorted_reference(logits[row], int(k[row]), float(p[row]))
        np.testing.assert_array_equal(found[row], expected, err_msg=f"row {row}: k={k[row]} p={p[row]}")


def choose_tokens(logits, **changes):
    rows = len(logits)
    arguments = dict(
        allowed=None,
        active=jnp.ones(rows, bool),
        filters=Filters.of([(Filter(), Filter(0.0))] * rows).at(jnp.zeros(rows, bool)),
        keys=decoding.row_keys(jnp.arange(rows, dtype=jnp.uint32), jnp.zeros(rows, jnp.int32)),
        position=jnp.arange(rows),
    )
    return decoding.choose(logits, **(arguments | changes))[0]


def choose(logits, **changes):
    return np.asarray(choose_tokens(logits, **changes))


def test_draws_follow_the_distribution():
    logits = jnp.tile(jnp.log(jnp.array([0.5, 0.3, 0.2])), (20_000, 1))
    shares = np.bincount(choose(logits), minlength=3) / 20_000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.02)
    cold = Filters.of([(Filter(0.5), Filter())] * 20_000).at(jnp.zeros(20_000, bool))
    shares = np.bincount(choose(logits, filters=cold), minlength=3) / 20_000
    np.testing.assert_allclose(shares, np.array([0.25, 0.09, 0.04]) / 0.38, atol=0.02)


def test_modality_decides_temperature():
    logits = jax.random.normal(jax.random.key(0), (B, V))
    both = Filters.of([(Filter(1.0), Filter(0.0))] * B)
    image = jnp.arange(B) % 2 == 1
    drawn = choose(logits, filters=both.at(image))
    greedy = np.argmax(logits, axis=-1)
    assert (drawn[1::2] == greedy[1::2]).all() and (drawn[::2] != greedy[::2]).any()


def test_what_is_drawn_stays_within_top_k_and_top_p():
    rows = 4000
    logits = jnp.tile(jnp.log(jnp.array([0.2, 0.4, 0.1, 0.3])), (rows, 1))
    cases = [
        (Filter(top_k=2), {1: 4 / 7, 3: 3 / 7}),
        (Filter(top_p=0.75), {1: 4 / 9, 3: 3 / 9, 0: 2 / 9}),
        (Filter(top_k=3, top_p=0.7), {1: 4 / 7, 3: 3 / 7}),  # of the three that top_k keeps, the best two have 0.78
        (Filter(0.5, top_p=0.5), {1: 1.0}),  # the temperature changes 0.4 to 0.53
    ]
    draw = jax.jit(lambda filters: choose_tokens(logits, filters=filters))
    for text, expected in cases:
        for image in (False, True):  # each modality has its own filter
            pair = (Filter(top_k=1), text) if image else (text, Filter(top_k=1))
            drawn = np.asarray(draw(Filters.of([pair] * rows).at(jnp.full(rows, image))))
            shares = np.bincount(drawn, minlength=4) / rows
            np.testing.assert_allclose(shares, [expected.get(i, 0) for i in range(4)], atol=0.04, err_msg=str(text))
            assert set(drawn.tolist()) == set(expected), text


def test_the_mask_wins_over_any_logits_and_nan_is_told():
    logits = jnp.stack(
        [
            jnp.full(8, jnp.nan),
            jnp.full(8, -jnp.inf),
            jnp.full(8, jnp.inf),
            jnp.arange(8.0) * 1e38,
            jnp.arange(8.0).at[3].set(jnp.nan),
        ]
    )
    allowed = jnp.zeros((5, 8), bool).at[:, 2:4].set(True)
    for filter in (Filter(0.0), Filter(1.0), Filter(1e-8), Filter(100.0, 1, 0.01)):
        filters = Filters.of([(filter, filter)] * 5).at(jnp.zeros(5, bool))
        token = choose(logits, allowed=allowed, filters=filters)
        assert token[4] == 2  # NaN counts as least likely
        assert all(t in (2, 3) for t in token[:4])
    keys = decoding.row_keys(jnp.arange(5, dtype=jnp.uint32), jnp.zeros(5, jnp.int32))
    active = jnp.array([True, True, True, True, False])
    _, broken = decoding.choose(logits, allowed, active, filters, keys, jnp.zeros(5, jnp.int32))
    assert broken.tolist() == [True, False, False, False, False]


def test_the_penalty_moves_what_was_said_away_from_being_said_again():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]] * 2)
    seen = jnp.array([[True, True, False, False]] * 2)
    found = decoding.penalize(logits, seen, jnp.array([2.0, 1.0]))
    np.testing.assert_array_equal(found, [[1.0, -4.0, 2.0, -2.0], [2.0, -2.0, 2.0, -2.0]])


@pytest.mark.exact
def test_noise_belongs_to_seed_sample_and_position_not_to_the_slot():
    logits = jnp.tile(jax.random.normal(jax.random.key(0), (V,)), (B, 1))
    seeds, samples, position = (jnp.arange(B) % m for m in (7, 3, 5))
    keys = decoding.row_keys(seeds.astype(jnp.uint32), samples)
    token = choose(logits, keys=keys, position=position)
    order = np.random.default_rng(0).permutation(B)
    np.testing.assert_array_equal(choose(logits, keys=keys[order], position=position[order]), token[order])
    same = {(int(a), int(b), int(c)): set() for a, b, c in zip(seeds, samples, position, strict=True)}
    for a, b, c, t in zip(seeds, samples, position, token, strict=True):
        same[int(a), int(b), int(c)].add(int(t))
    assert all(len(tokens) == 1 for tokens in same.values()) and len(set(token.tolist())) > 20
    for varied in range(3):  # seed, sample and position each have an effect alone
        seed, sample, at = (jnp.arange(B) if i == varied else jnp.zeros(B, jnp.int32) for i in range(3))
        alone = choose(logits, keys=decoding.row_keys(seed.astype(jnp.uint32), sample), position=at)
        assert len(set(alone.tolist())) > 20, varied


@pytest.mark.parametrize(
    "bad", [Filter(-1.0), Filter(float("nan")), Filter(top_k=-1), Filter(top_p=0.0), Filter(top_p=1.5)]
)
def test_a_filter_nothing_can_be_drawn_with_is_refused(bad):
    with pytest.raises(ValueError, match="image.t"):
        bad.check("image")


def test_unconditional_contexts_read_images_alone_and_begin_each_anew_if_they_reset():
    # Four events: a word, an image's first id, a code, and an image's last id.
    event = Event(*jnp.array([[0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]], bool))
    position, start = (jnp.tile(jnp.array(row), (4, 1)) for row in ([5, 3, 4], [0, 2, 1]))
    resets = jnp.tile(jnp.array([False, True, False]), (4, 1))  # contexts: its own | one that resets | images only
    writes, after = guidance.advance(event, position, start, resets)
    assert writes.tolist() == [[5, 3, 4], [5, 2, 4], [5, 3, 4], [5, 3, 4]]
    assert after.tolist() == [[6, 2, 4], [6, 3, 5], [6, 4, 5], [6, 2, 5]]


@pytest.mark.exact
def test_mix_is_the_weighted_sum_and_scale_one_is_no_guidance_bit_for_bit():
    c, u, i = jax.random.normal(jax.random.key(1), (3, 4, V))
    scales = [3.0, 1.0, 0.0, 2.0]
    mixed = guidance.mix(jnp.stack([c, u], 1), jnp.array([guidance.weights(s, None, 2) for s in scales]))
    np.testing.assert_allclose(mixed[0], u[0] + 3 * (c[0] - u[0]), atol=1e-5)
    np.testing.assert_array_equal(mixed[1], c[1])
    np.testing.assert_array_equal(mixed[2], u[2])
    mixed = guidance.mix(jnp.stack([c, u, i], 1), jnp.array([guidance.weights(s, 1.2, 3) for s in scales]))
    for row, s in enumerate(scales):
        expected = u[row] + 1.2 * (i[row] - u[row]) + s * (c[row] - i[row])
        np.testing.assert_allclose(mixed[row], expected, atol=1e-5)
    mixed = guidance.mix(jnp.stack([c, u, i], 1), jnp.array([guidance.weights(1.0, 1.0, 3)] * 4))
    np.testing.assert_array_equal(mixed, c)
