"""The Hopper kernels: their results under JAX's emulation of a GPU with threads, barriers and TMA, and the blocks they
visit.

The emulation has no wgmma with an operand in registers, and no accumulators that persist between products, so these are
plain products here (`warpgroup.accumulate`). It does not check layouts and swizzles of real shared memory. It does
detect races: writing a slot before all its readers have finished is an error.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ar_unified.kernels.attention import attention, hopper, reference, warpgroup
from ar_unified.kernels.attention.bounds import key_ranges, make_bounds, pad_queries, query_ranges
from ar_unified.kernels.attention.spec import Spec
from tests.kernels.cases import CASES, Case

emulated = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason=f"jax {jax.__version__} cannot emulate these kernels; 0.12 can"
)
# Emulated threads are slow, and none of these cases needs four heads.
FEW_HEADS = {
    name: dataclasses.replace(CASES[name], heads=2, kv_heads=1)
    for name in ("nothing but padding", "head_dim 256", "window", "soft cap", "far log-sum-exps")
} | {"every ring goes round": Case(((512,),), 512, heads=1, kv_heads=1, head_dim=128)}


def run(case: Case) -> tuple[dict, dict]:
    """Results of the kernels in bfloat16, and of the float32 reference on the same numbers."""
    q, k, v, bar = case.arrays(jnp.bfloat16)
    bounds = make_bounds(jnp.asarray(case.doc_start), case.T, window=case.window)
    spec = Spec(case.head_dim**-0.5, case.soft_cap, interpret=True)
    out, lse = hopper.forward(spec, q, k, v, bounds)
    q32, k32, v32, bar32 = (x.astype(jnp.float32) for x in (q, k, v, bar))

    def attend(q, k, v):
        return reference.forward(spec, q, k, v, bounds)

    (out32, lse32), pull = jax.vjp(attend, q32, k32, v32)
    delta = jnp.einsum("BTNH,BTNH->BNT", out.astype(jnp.float32), bar32)
    gradients = hopper.backward(spec, q, k, v, bounds, lse, delta, bar)
    names = "out", "lse", "dq", "dk", "dv"
    found = dict(zip(names, (out, jnp.swapaxes(lse, 1, 2), *gradients), strict=True))
    expected = dict(zip(names, (out32, jnp.swapaxes(lse32, 1, 2), *pull((bar32, jnp.zeros_like(lse32)))), strict=True))
    wide = [{k: np.asarray(v, np.float64) for k, v in x.items()} for x in (found, expected)]
    return wide[0], wide[1]


@pytest.mark.newest_jax
@emulated
@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_HEADS)
def test_the_kernels_equal_the_reference(name):
    case = FEW_HEADS[name]
    padding = case.doc_start == case.T
    found, expected = run(case)
    for what, value in found.items():
        assert (value[padding] == (-np.inf if what == "lse" else 0.0)).all(), what
        value, right = value[~padding], expected[what][~padding]
        assert np.isfinite(value).all(), what
        # The weights are rounded once to bfloat16. Large log-sum-exps lose more in dweights - delta, as in any kernel.
        limit = 1e-6 if what == "lse" else 2e-2 if name == "far log-sum-exps" else 6e-3
        assert np.linalg.norm(value - right) < limit * np.linalg.norm(right), what


@pytest.mark.parametrize("block_q, block_k", [(128, 64), (64, 128)])
@pytest.mark.parametrize("name", CASES)
def test_the_walk_visits_every_block_once_and_masks_all_but_the_clean_ones(name, block_q, block_k):
    case = CASES[name]
    length = -(-case.T // block_q) * block_q
    bounds = pad_queries(make_bounds(jnp.asarray(case.doc_start), case.T, window=case.window), length, case.T)
    by_query = key_ranges(bounds, case.T, block_q, block_k)
    for ranges in (by_query, query_ranges(by_query, -(-case.T // block_k))):
        stacked = np.asarray(warpgroup.stacked(ranges))
        begin, end, clean_begin, clean_end = (np.asarray(x) for x in ranges)
        for at in np.ndindex(begin.shape):
            walk = warpgroup.read_walk(stacked[at])
            masked = [int(walk.block(i)) for i in range(walk.masked)]
            clean = [int(walk.clean_begin + i) for i in range(walk.clean)]
            assert sorted(masked + clean) == list(range(begin[at], end[at]))
            assert set(clean) == set(range(clean_begin[at], clean_end[at]))


def test_what_does_not_fit_is_refused_in_words():
    q, k, v, _ = CASES["multi-head"].arrays()
    doc_start = jnp.zeros(q.shape[:2], jnp.int32)
    with pytest.raises(ValueError, match="expected q, k and v of bfloat16 or float16.* found float32"):
        attention(q, k, v, doc_start=doc_start, backend="hopper")
    q, k, v = (x[..., :48].astype(jnp.bfloat16) for x in (q, k, v))
    with pytest.raises(ValueError, match="head dim of 64, 128, 256; found 48"):
        attention(q, k, v, doc_start=doc_start, backend="hopper")
