"""Properties of only the TPU kernels: rounding in bfloat16, the blocks they visit, the order of copies, groups of
rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.kernels.attention import attention, tpu_steps, visits
from ar_unified.kernels.attention.bounds import key_ranges, make_bounds, pad_queries, query_ranges
from tests.kernels.cases import CASES, Case
from tests.kernels.test_attention import HASTILY, relative, run

# One case for each variant of blocks, heads and masks; test-all has the others.
SOME = (
    "one document",
    "T no multiple of a block",
    "many tiny ones",
    "grouped by 8",
    "head_dim 256",
    "window and soft cap",
)


def exact(case: Case, dtype) -> dict[str, np.ndarray]:
    """Outputs and gradients in float64 for inputs that are rounded to `dtype`."""
    arrays = case.arrays(dtype)
    with jax.enable_x64(True):
        *qkv, bar = (jnp.asarray(np.asarray(x, np.float64)) for x in arrays)

        def attend(q, k, v):
            return attention(q, k, v, doc_start=jnp.asarray(case.doc_start), backend="reference", **case.options)

        out, pull = jax.vjp(attend, *qkv)
        return jax.tree.map(np.asarray, dict(zip(("out", "dq", "dk", "dv"), (out, *pull(bar)), strict=True)))


def rounded(case: Case, backend: str) -> dict[str, np.ndarray]:
    """Outputs and gradients of a backend in bfloat16."""
    *qkv, bar = case.arrays(jnp.bfloat16)

    @functools.partial(jax.jit, compiler_options=HASTILY)
    def outputs(q, k, v, bar, doc_start):
        out, pull = jax.vjp(lambda *x: attention(*x, doc_start=doc_start, backend=backend, **case.options), q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *pull(bar)), strict=True))

    return jax.tree.map(np.asarray, outputs(*qkv, bar, jnp.asarray(case.doc_start)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOME else pytest.mark.exhaustive) for name in CASES]
)
def test_bfloat16_errs_no_more_than_xla_does(name):
    case = CASES[name]
    expected, found = exact(case, jnp.bfloat16), rounded(case, "tpu_interpret")
    by_xla = rounded(case, "xla")
    for what, value in expected.items():
        # If a query sees only one key, the gradients of q and k are exactly 0, so their error is taken relative to at
        # least 0.01.
        size = max(np.linalg.norm(value), 1e-2 * value.size**0.5)
        error, of_xla = (np.linalg.norm(x[what].astype(np.float64) - value) / size for x in (found, by_xla))
        assert error < min(2e-2, 1.5 * of_xla + 1e-6), what


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def listed(case: Case, block_q: int, block_k: int):
    bounds = make_bounds(jnp.asarray(case.doc_start), case.T, window=case.window)
    by_query = key_ranges(pad_queries(bounds, case.T + -case.T % block_q, case.T), case.T, block_q, block_k)
    by_key = query_ranges(by_query, -(-case.T // block_k))
    most = visits.most(case.T, case.T, block_q, block_k, 0) * len(case.lengths)
    lists = [
        visits.visits(outer, by_query, most, outer_is_keys=outer is by_key)._asdict() for outer in (by_query, by_key)
    ]
    return [
        dict(x, row=visits.row(x["outer"]), own=visits.outer_block(x["outer"]), other=visits.inner_block(x["inner"]))
        for x in lists
    ]


HOLE = Case(((40, 60, 30),), 160)  # its second document becomes padding in the middle of a row


@pytest.mark.parametrize("block_q, block_k", [(64, 32)])
@pytest.mark.parametrize("case", [*CASES.values(), HOLE], ids=[*CASES, "hole"])
def test_steps_are_the_pairs_of_blocks_that_meet_in_both_directions(monkeypatch, case, block_q, block_k):
    doc_start = case.doc_start
    if case is HOLE:
        doc_start[:, 40:100] = case.T
        monkeypatch.setattr(Case, "doc_start", doc_start)
    T, S = case.T + -case.T % block_q, case.T + -case.T % block_k
    q, s = np.arange(T)[:, None], np.arange(S)
    start = np.pad(doc_start, [(0, 0), (0, T - case.T)], constant_values=case.T)[..., None]
    seen = (start <= s) & (s <= q) & (q - s < (case.window or T)) & (s < case.T)  # as the definition says
    tiles = seen.reshape(len(seen), T // block_q, block_q, S // block_k, block_k)
    some, whole = tiles.any((2, 4)), tiles.all((2, 4))
    for steps, turn in zip(listed(case, block_q, block_k), (lambda x: x, lambda x: x.swapaxes(1, 2)), strict=True):
        steps = {name: np.asarray(x)[: steps["cuts"][-1]] for name, x in steps.items()}
        at, flags = (steps["row"], steps["own"], steps["other"]), steps["inner"]
        computed = flags & (visits.MASKED | visits.CLEAN) != 0
        for chosen, expected in ((computed, some), (flags & visits.CLEAN != 0, whole)):
            count = np.zeros_like(turn(some), int)
            np.add.at(count, tuple(x[chosen] for x in at), 1)
            np.testing.assert_array_equal(count, turn(expected))
        # Each outer block is opened once and closed once, and no other block comes between.
        blocks = at[0] * turn(some).shape[1] + at[1]
        np.testing.assert_array_equal(blocks[flags & visits.FIRST != 0], np.arange(turn(some)[..., 0].size))
        np.testing.assert_array_equal(flags & visits.FIRST != 0, np.diff(blocks, prepend=-1) != 0)
        np.testing.assert_array_equal(flags & visits.LAST != 0, np.diff(blocks, append=blocks[-1] + 1) != 0)
        if case is not HOLE:  # one step per visited pair of blocks, and one for a block of padding
            assert len(flags) == np.maximum(turn(some).sum(2), 1).sum()


def test_rows_whose_steps_do_not_fit_scalar_memory_go_in_groups(monkeypatch):
    case = Case(((100, 60), (150,), (20, 30), ()), 160, kv_heads=1)
    expected = run(case, "reference")
    monkeypatch.setattr(tpu_steps, "VISITS", 20)  # two rows of at most 3 + 2 + 2 steps
    for what, value in run(case, "tpu_interpret").items():
        finite = np.isfinite(expected[what])
        assert relative(value[finite], expected[what][finite]) < 1e-5, what


def test_what_the_kernels_cannot_do_is_said():
    q, doc_start = jnp.zeros((1, 8, 2, 96)), jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="expected a head dim of 64, 128, 256; found 96"):
        attention(q, q, q, doc_start=doc_start, backend="tpu_interpret")
    with pytest.raises(ValueError, match="bfloat16 or float32, both the same; found float16"):
        attention(*[jnp.zeros((1, 8, 2, 64), jnp.float16)] * 3, doc_start=doc_start, backend="tpu_interpret")
