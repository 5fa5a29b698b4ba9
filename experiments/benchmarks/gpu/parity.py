"""Whether the kernels compute what the reference computes, on the cases of the tests, in bfloat16."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.kernels.attention import attention
from ar_unified.kernels.decode_attention import decode_attention
from experiments.benchmarks.gpu.measure import Check
from experiments.benchmarks.gpu.sizes import Size
from tests.kernels.cases import CASES, Case
from tests.kernels.decode_cases import CASES as DECODE_CASES
from tests.kernels.decode_cases import HOPPER_CASES, DecodeCase

TOLERANCE = 2e-2  # of bfloat16 outputs and gradients, |found - expected| / |expected|


def checks(size: Size) -> list[Check]:
    """Every case of the kernels' tests that a GPU can run, against the reference."""
    # Caches whose slots TMA cannot copy are XLA's on a GPU too.
    decode = {f"decode: {name}": case for name, case in (DECODE_CASES | HOPPER_CASES).items() if case.S % 8 == 0}
    found = [(name, functools.partial(_check, _attention, case, size.backend)) for name, case in CASES.items()]
    return found + [(name, functools.partial(_check, _decode, case, size.backend)) for name, case in decode.items()]


def _check(errors_of: Any, case: Any, backend: str) -> dict[str, Any]:
    errors = errors_of(case, backend)
    figures = {what: f"{error:.1e}" for what, error in errors.items()}
    return dict(wrong=not max(errors.values()) <= TOLERANCE, figures=figures)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs_and_gradients(case: Case, backend: str, q, k, v, bar, doc_start) -> dict[str, jax.Array]:
    def run(q, k, v):
        return attention(q, k, v, doc_start=doc_start, return_lse=True, backend=backend, **case.options)

    (out, lse), pull = jax.vjp(run, q, k, v)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *pull((bar, jnp.zeros_like(lse)))), strict=True))


def _attention(case: Case, backend: str) -> dict[str, float]:
    """Relative error of each result in bfloat16 against the reference in float32; inf where padding is not exact."""
    arrays = case.arrays(jnp.bfloat16)
    doc_start = jnp.asarray(case.doc_start)
    found = _outputs_and_gradients(case, backend, *arrays, doc_start)
    expected = _outputs_and_gradients(case, "reference", *(x.astype(jnp.float32) for x in arrays), doc_start)
    padding = case.doc_start == case.T
    errors = {}
    for what, value in found.items():
        value, right = np.asarray(value, np.float64), np.asarray(expected[what], np.float64)
        exact = (value[padding] == (-np.inf if what == "lse" else 0.0)).all()
        value, right = value[~padding], right[~padding]
        # Where a query sees one key its gradient is exactly 0: what is left of it then counts beside 0.01.
        error = np.linalg.norm(value - right) / max(np.linalg.norm(right), 1e-2 * right.size**0.5, 1e-30)
        errors[what] = float(error) if exact and np.isfinite(value).all() else float("inf")
    return errors


def _decode(case: DecodeCase, backend: str) -> dict[str, float]:
    """The same of decode attention, against the reference on the numbers that the case has in bfloat16."""
    arrays: dict[str, Any] = case.arrays(jnp.bfloat16)
    wide: dict[str, Any] = {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in arrays.items()}
    step = functools.partial(decode_attention, return_lse=True, **case.options)
    found, expected = step(**arrays, backend=backend), step(**wide, backend="reference")
    empty, errors = np.array(case.lengths) == 0, {}
    for what, value, right in zip(("out", "lse"), found, expected, strict=True):
        value, right = np.asarray(value, np.float64), np.asarray(right, np.float64)
        exact = (value[empty] == (-np.inf if what == "lse" else 0.0)).all()
        error = np.linalg.norm(value[~empty] - right[~empty]) / max(float(np.linalg.norm(right[~empty])), 1e-30)
        errors[what] = float(error) if exact and np.isfinite(value[~empty]).all() else float("inf")
    return errors
