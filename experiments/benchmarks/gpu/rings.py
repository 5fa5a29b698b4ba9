"""Decode attention with other ring buffers in shared memory. The fastest buffer's sizes should become the kernel's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import jax

from ar_unified.kernels.decode_attention import decode_attention, hopper
from experiments.benchmarks.gpu import decode
from experiments.benchmarks.gpu.measure import Check, Row
from experiments.benchmarks.gpu.sizes import Size

SMS = 132


def checks(size: Size) -> list[Check]:
    """The time of a step over a bfloat16 and an int8 cache with each ring buffer; the first is the shipped one."""
    found: list[Check] = []
    for narrow in (True, False):
        name, work = decode.named(size, narrow)
        contenders = {f"{ring} KiB x {blocks}": _with(size.backend, ring, blocks) for ring, blocks in size.rings}
        row = Row(work, "GB/s", functools.partial(decode.arrays, size, narrow), contenders)
        found.append((f"rings: {name}", functools.partial(row.measure, size.repeats)))
    return found


def _with(backend: str, ring: int, blocks: int) -> Callable:
    def run(q, k, v, lengths, k_scale, v_scale):
        with mock.patch.multiple(hopper, RING_BYTES=ring * 1024, THREAD_BLOCKS=blocks * SMS):
            return decode_attention(q, k, v, lengths=lengths, k_scale=k_scale, v_scale=v_scale, backend=backend)

    return jax.jit(run)
