"""Compares the kernels with the reference, on the cases of the tests, in bfloat16."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_unified.kernels.attention import attention
from ar_unified.kernels.decode_attention import decode_attention
from ar_unified.manifests import Json
from experiments.benchmarks.gpu.measure import Check
from experiments.benchmarks.gpu.sizes import Size
from tests.kernels.cases import CASES, Case
from tests.kernels.decode_cases import CASES as DECODE_CASES
from tests.kernels.decode_cases import HOPPER_CASES, DecodeCase

TOLERANCE = 2e-2  # largest |found - expected| / |expected| of bfloat16 outputs and gradients


def checks(size: Size) -> list[Check]:
    """Every case of the kernels' tests that a GPU can run, against the reference."""
    # On a GPU, XLA also handles caches whose slots TMA cannot copy.
    decode = {f"decode: {name}": case for name, case in (DECODE_CASES | HOPPER_CASES).items() if case.S % 8 == 0}
    cases: list[tuple[str, Any, Callable, Callable]] = [
        (name, case, _attention, _attention_programs) for name, case in CASES.items()
    ]
    cases += [(name, case, _decode, _decode_programs) for name, case in decode.items()]
    ahead = _Ahead([functools.partial(programs, case, size.backend) for _, case, _, programs in cases])
    return [
        (name, functools.partial(_check, errors_of, case, functools.partial(ahead, number)))
        for number, (name, case, errors_of, _) in enumerate(cases)
    ]


class _Ahead:
    """Compiles the programs of the next cases on all cores while one case is checked, because one core needs 18 s per
    case."""

    def __init__(self, makers: list[Callable[[], object]]):
        self.makers, self.futures, self.cores = makers, dict[int, Future](), os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(self.cores)

    def __call__(self, number: int) -> Any:
        """The programs of case `number`. The cases before the first one that is asked for are not compiled, so
        cases that ended an earlier process are left out."""
        for each in range(number, min(number + self.cores, len(self.makers))):
            if each not in self.futures:
                self.futures[each] = self.pool.submit(self.makers[each])
        return self.futures[number].result()


def _check(errors_of: Callable, case: Any, programs: Callable[[], Any]) -> dict[str, Json]:
    errors = errors_of(case, *programs())
    figures = {what: f"{error:.1e}" for what, error in errors.items()}
    return dict(wrong=not max(errors.values()) <= TOLERANCE, figures=figures)


def _attention_programs(case: Case, backend: str) -> list[Callable]:
    """Compiled programs for outputs and gradients of a case: the kernel in bfloat16, and the reference in float32."""

    def outputs_and_gradients(backend: str, q, k, v, bar, doc_start) -> dict[str, jax.Array]:
        def run(q, k, v):
            return attention(q, k, v, doc_start=doc_start, return_lse=True, backend=backend, **case.options)

        (out, lse), pull = jax.vjp(run, q, k, v)
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *pull((bar, jnp.zeros_like(lse)))), strict=True))

    arrays = [*case.arrays(jnp.bfloat16), jnp.asarray(case.doc_start)]
    return [
        jax.jit(functools.partial(outputs_and_gradients, name)).lower(*_in(dtype, arrays)).compile()
        for name, dtype in ((backend, jnp.bfloat16), ("reference", jnp.float32))
    ]


def _attention(case: Case, ours: Callable, reference: Callable) -> dict[str, float]:
    """The relative error of each bfloat16 result against the float32 reference; inf if padding is not exact."""
    arrays = [*case.arrays(jnp.bfloat16), jnp.asarray(case.doc_start)]
    found, expected = ours(*arrays), reference(*_in(jnp.float32, arrays))
    padding = case.doc_start == case.T
    errors = {}
    for what, value in found.items():
        value, right = np.asarray(value, np.float64), np.asarray(expected[what], np.float64)
        exact = (value[padding] == (-np.inf if what == "lse" else 0.0)).all()
        value, right = value[~padding], right[~padding]
        # The gradient of a query that sees only one key is exactly 0, so its error is taken relative to at least 0.01.
        error = np.linalg.norm(value - right) / max(np.linalg.norm(right), 1e-2 * right.size**0.5, 1e-30)
        errors[what] = float(error) if exact and np.isfinite(value).all() else float("inf")
    return errors


def _decode_programs(case: DecodeCase, backend: str) -> list[Callable]:
    """Compiled programs for a step of decode attention: the kernel, and the reference on the same numbers in
    float32."""
    arrays = case.arrays(jnp.bfloat16)
    return [
        jax.jit(functools.partial(decode_attention, return_lse=True, backend=name, **case.options))
        .lower(**given)
        .compile()
        for name, given in ((backend, arrays), ("reference", _in(jnp.float32, arrays)))
    ]


def _decode(case: DecodeCase, ours: Callable, reference: Callable) -> dict[str, float]:
    """The relative error of decode attention. The reference gets the case's bfloat16 numbers."""
    arrays = case.arrays(jnp.bfloat16)
    found, expected = ours(**arrays), reference(**_in(jnp.float32, arrays))
    empty, errors = np.array(case.lengths) == 0, {}
    for what, value, right in zip(("out", "lse"), found, expected, strict=True):
        value, right = np.asarray(value, np.float64), np.asarray(right, np.float64)
        exact = (value[empty] == (-np.inf if what == "lse" else 0.0)).all()
        error = np.linalg.norm(value[~empty] - right[~empty]) / max(float(np.linalg.norm(right[~empty])), 1e-30)
        errors[what] = float(error) if exact and np.isfinite(value[~empty]).all() else float("inf")
    return errors


def _in(dtype: Any, arrays: Any) -> Any:
    """The arrays, with bfloat16 ones converted to another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, arrays)
