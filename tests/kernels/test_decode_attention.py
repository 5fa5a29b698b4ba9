"""Decode attention: every backend is compared with the reference, and the reference with attention's reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ar_unified.kernels import attention, decode_attention, device
from ar_unified.kernels.decode_attention import xla
from tests.kernels.decode_cases import CASES, HOPPER_CASES, DecodeCase
from tests.kernels.test_attention import relative

KERNELS = ("xla", "tpu_interpret")


def outputs(case: DecodeCase, backend: str, arrays: dict) -> tuple[np.ndarray, np.ndarray]:
    # A program that runs once needs no optimisations of LLVM and compiles twice as fast without; "xla" is tested with
    # them.
    options = None if backend == "xla" else {"xla_backend_optimization_level": 0}
    step = functools.partial(decode_attention.decode_attention, **case.options, return_lse=True, backend=backend)
    out, lse = jax.jit(step, compiler_options=options)(**arrays)
    return np.asarray(out).astype(np.float32), np.asarray(lse)


def run(case: DecodeCase, backend: str, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    return outputs(case, backend, case.arrays(dtype))


def exact(case: DecodeCase) -> tuple[np.ndarray, np.ndarray]:
    """The reference in float32 on the case's bfloat16 numbers."""
    arrays = case.arrays(jnp.bfloat16)
    return outputs(
        case, "reference", {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in arrays.items()}
    )


@pytest.mark.parametrize("name", CASES)
def test_every_backend_equals_the_reference(name):
    case = CASES[name]
    expected = run(case, "reference")
    for backend in KERNELS:
        for found, right in zip(run(case, backend), expected, strict=True):
            finite = np.isfinite(right)
            np.testing.assert_array_equal(found[~finite], right[~finite], err_msg=backend)
            assert relative(found[finite], right[finite]) < 1e-5, backend


@pytest.mark.parametrize("name", ["grouped by 8", "int8, grouped by 8, window", "soft cap"])
def test_bfloat16_is_near_the_reference_on_the_same_numbers(name):
    expected, _ = exact(CASES[name])
    for backend in KERNELS:
        assert relative(run(CASES[name], backend, jnp.bfloat16)[0], expected) < 2e-2, backend


def test_a_cache_in_float8_is_read_as_it_is():
    arrays = CASES["several blocks"].arrays()
    arrays |= {name: arrays[name].astype(jnp.float8_e4m3fn) for name in ("k", "v")}
    expected, _ = outputs(CASES["several blocks"], "reference", arrays)
    for backend in KERNELS:
        assert relative(outputs(CASES["several blocks"], backend, arrays)[0], expected) < 1e-5, backend


@pytest.mark.newest_jax
@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX cannot emulate a Hopper GPU; 0.12 can")
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_hopper_emulated_is_near_the_reference_on_the_same_numbers_and_has_no_races(name):
    case = HOPPER_CASES[name]
    expected, expected_lse = exact(case)
    out, lse = run(case, "hopper_interpret", jnp.bfloat16)
    finite = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.isfinite(lse), finite)
    assert relative(lse[finite], expected_lse[finite]) < 1e-5
    assert relative(out, expected) < 2e-2 and not out[~finite].any()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_a_row_of_length_0_is_exact_zeros(backend):
    case = CASES["grouped by 4"]
    out, lse = run(case, backend)
    empty = np.array(case.lengths) == 0
    assert not out[empty].any() and (lse[empty] == -np.inf).all()
    assert out[~empty].any(-1).all() and np.isfinite(lse[~empty]).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_what_lies_outside_of_a_row_has_no_influence(backend):
    case = CASES["window"]
    arrays = case.arrays()
    s, lengths = np.arange(case.S), np.array(case.lengths)[:, None]
    outside = ((s >= lengths) | (s < lengths - case.window))[:, None, :, None]
    other = arrays | {name: np.where(outside, np.float32(1e4), arrays[name]) for name in ("k", "v")}
    for found, expected in zip(outputs(case, backend, other), outputs(case, backend, arrays), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("longest", [1, 128, 129, 513])
def test_xla_reads_no_more_of_a_cache_than_the_prefix_its_longest_row_needs(longest, int8):
    """On both sides of each border the result equals the reference. Slots after the prefix are NaN, so reading them
    would show."""
    assert xla.prefixes(1000) == [128, 256, 512, 1000]
    read = next(prefix for prefix in xla.prefixes(1000) if prefix >= longest)
    case = DecodeCase((longest, longest // 2, 0, min(longest, 70)), 1000, heads=4, kv_heads=2, int8=int8)
    arrays = case.arrays()
    expected = outputs(case, "reference", arrays)
    floats = ("k_scale", "v_scale") if int8 else ("k", "v")
    behind = arrays | {name: arrays[name].copy() for name in floats}
    for name in floats:
        np.moveaxis(behind[name], -1 if int8 else 2, 0)[read:] = np.nan
    for found, right in zip(outputs(case, "xla", behind), expected, strict=True):
        finite = np.isfinite(right)
        np.testing.assert_array_equal(found[~finite], right[~finite])
        assert relative(found[finite], right[finite]) < 1e-5


@pytest.mark.exact
def test_by_xla_a_row_gets_the_same_bits_whatever_prefix_its_batch_needs():
    """Otherwise a sample would depend on its neighbours. With a cache of 1000 slots, not a multiple of 64, its last
    bits do depend on them."""
    alone = DecodeCase((100, 1), 1024).arrays()
    beside = alone | {"lengths": np.array([100, 1024], np.int32)}
    for a, b in zip(*(outputs(CASES["grouped by 4"], "xla", arrays) for arrays in (alone, beside)), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


@pytest.mark.parametrize("name", ["grouped by 4", "window and soft cap"])
def test_the_reference_is_attention_with_the_queries_at_the_ends_of_their_rows(name):
    case = CASES[name]
    arrays = case.arrays()
    lengths = arrays["lengths"]
    # attention has no query at position -1; a doc_start after all keys makes a query that sees nothing.
    doc_start = np.where(lengths == 0, case.S, 0)[:, None].astype(np.int32)
    k, v = (np.moveaxis(arrays[name], 1, 2) for name in ("k", "v"))
    attend = functools.partial(attention.attention, return_lse=True, backend="reference", **case.options)
    expected, expected_lse = jax.jit(attend)(arrays["q"][:, None], k, v, doc_start=doc_start, q_offset=lengths - 1)
    out, lse = run(case, "reference")
    np.testing.assert_allclose(out, expected[:, 0], atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse[:, 0], atol=1e-5)


def test_int8_restores_each_value_to_half_a_step_and_zeros_to_zeros():
    x = np.random.default_rng(0).standard_normal((3, 5, 64)) * 10.0 ** np.arange(-4, 1)[:, None]
    x[1, 2] = 0.0
    values, scale = map(np.asarray, jax.jit(decode_attention.quantize)(x))
    assert values.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (3, 5)
    assert (np.abs(values).max(-1) == np.where(scale > 0, 127, 0)).all()
    assert (np.abs(values * scale[..., None] - x) <= 0.5001 * scale[..., None]).all()
    assert not values[1, 2].any() and scale[1, 2] == 0


def test_int8_is_within_2_percent_of_the_whole_cache():
    """Rounding is uniform within a step, so its error is scale / sqrt(12), 0.7% for a normal vector of 128 values. The
    values and the weights (through the scores) each contribute about that; 0.9% was measured."""
    whole, rounded = (DecodeCase((1024,) * 4, 1024, 8, 2, 128, int8=int8) for int8 in (False, True))
    assert relative(run(rounded, "reference")[0], run(whole, "reference")[0]) < 2e-2


def test_the_default_is_xla_here_and_what_a_kernel_cannot_do_elsewhere_warns(monkeypatch):
    arrays = CASES["grouped by 4"].arrays()
    expected = decode_attention.decode_attention(**arrays, backend="xla")
    np.testing.assert_array_equal(decode_attention.decode_attention(**arrays), expected)
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200"))
    with pytest.warns(UserWarning, match="XLA computes it on this NVIDIA H200, not the kernel: .*bfloat16"):
        np.testing.assert_array_equal(decode_attention.decode_attention(**arrays), expected)
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "Tesla T4"))
    with pytest.warns(UserWarning, match="no kernel for Tesla T4"):
        np.testing.assert_array_equal(decode_attention.decode_attention(**arrays), expected)


def test_what_does_not_fit_is_refused_in_words():
    arrays, int8 = CASES["grouped by 4"].arrays(), CASES["int8"].arrays()
    for wrong, message in (
        (dict(backend="cuda"), "expected one of auto, reference, xla"),
        (dict(backend="hopper"), "'hopper': .*bfloat16.*; backend='xla' takes any shape"),
        (dict(window=0), "window of at least 1 slot; found 0"),
        (dict(v=arrays["v"][:, :, :3]), "K dividing N"),
        (dict(q=arrays["q"][:, :3]), "K dividing N"),
        (dict(lengths=arrays["lengths"][:1]), "expected lengths int32"),
        (dict(k=int8["k"], v=int8["v"], v_scale=int8["v_scale"]), "found a cache in int8 without k_scale"),
        (dict(k_scale=int8["k_scale"]), "an int8 cache needs scales, and other caches must have none"),
        (dict(int8, k_scale=int8["k_scale"][..., :3]), "expected k_scale float32"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention.decode_attention(**(arrays | wrong))


def test_a_derivative_is_refused_in_words():
    arrays = CASES["grouped by 4"].arrays()
    with pytest.raises(TypeError, match="no derivative; use kernels.attention with q_offset"):
        jax.grad(lambda q: decode_attention.decode_attention(**(arrays | dict(q=q))).sum())(arrays["q"])


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu_interpret"])
@pytest.mark.parametrize("int8", [False, True])
def test_several_queries_a_row_are_one_after_another(backend, int8):
    """The last query is at position lengths - 1, the others just before. Queries beyond the cache are not compared."""
    B, T, N, K, S, H = 3, 4, 4, 2, 128, 64
    keys, values, q = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(B, K, S, H)] * 2 + [(B, T, N, H)])
    )
    lengths, cache = jnp.array([T, 70, S + 2], jnp.int32), dict(k=keys, v=values)
    if int8:
        (k, k_scale), (v, v_scale) = (decode_attention.quantize(x) for x in (keys, values))
        cache = dict(k=k, v=v, k_scale=k_scale[:, :, None], v_scale=v_scale[:, :, None])
    options = dict(return_lse=True)
    found = decode_attention.decode_attention(q, lengths=lengths, backend=backend, **cache, **options)
    for t in range(T):
        mine = lengths - (T - 1 - t)
        one = decode_attention.decode_attention(q[:, t], lengths=mine, backend="reference", **cache, **options)
        there = np.asarray(mine) <= S
        for several, alone in zip(found, one, strict=True):
            np.testing.assert_allclose(several[:, t][there], alone[there], rtol=0, atol=1e-5)
