"""The variants of the shipped Hopper kernels, as one list for the tests that lower and the check that compiles them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ar_unified.kernels.attention import hopper
from ar_unified.kernels.attention.bounds import make_bounds
from ar_unified.kernels.attention.spec import Spec


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant of a kernel. `group`: query heads per KV head."""

    head_dim: int
    dtype: str
    group: int
    soft_cap: float | None

    def __str__(self) -> str:
        return f"H={self.head_dim} {self.dtype} G={self.group}{' soft cap' if self.soft_cap else ''}"

    def functions(self) -> list[tuple[Callable, list[jax.ShapeDtypeStruct]]]:
        """The forward and backward functions, each with the shapes of its arguments."""
        B, T, N = 2, 512, 8
        dtype, spec = jnp.dtype(self.dtype), Spec(self.head_dim**-0.5, self.soft_cap)
        q = jax.ShapeDtypeStruct((B, T, N, self.head_dim), dtype)
        k = jax.ShapeDtypeStruct((B, T, N // self.group, self.head_dim), dtype)
        row = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
        doc_start = jax.ShapeDtypeStruct((B, T), jnp.int32)

        def forward(q, k, v, doc_start):
            return hopper.forward(spec, q, k, v, make_bounds(doc_start, T))

        def backward(q, k, v, doc_start, lse, delta, dout):
            return hopper.backward(spec, q, k, v, make_bounds(doc_start, T), lse, delta, dout)

        return [(forward, [q, k, k, doc_start]), (backward, [q, k, k, doc_start, row, row, q])]


# Both dtypes and the smallest and largest group with every head_dim, with and without soft cap, but not every pair of
# dtype and group.
VARIANTS = [
    Variant(head_dim, dtype, group, soft_cap)
    for head_dim, (dtype, group), soft_cap in itertools.product(
        hopper.HEAD_DIMS, (("bfloat16", 8), ("float16", 1)), (None, 30.0)
    )
]
