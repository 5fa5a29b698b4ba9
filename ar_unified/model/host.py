"""What a process sets before it runs JAX on a CPU: one switch for right results, three for speed. Harmless elsewhere.

Measured on 2 cores with jaxlib 0.10.2 (experiments/benchmarks/cpu_vs_transformers.py):

* XLA CPU fuses some reductions into YNNPACK calls that return wrong numbers in jaxlib 0.10.2 (jax issue 39103: 0.10.1
  and 0.12 are right; a related crash, 39257, is also in 0.11.0). The gradient of an RMSNorm under `vmap` was off by
  0.24 without an error. The flag leaves reductions to XLA itself.
* XLA takes all temporaries of a step as one block, which glibc maps from the system and gives back each time: 130,000
  page faults, a quarter of the demo's step. The three `mallopt` values make it keep the block.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os

_NO_YNN_REDUCE = "--xla_cpu_experimental_ynn_fusion_type=-library_fusion_type_reduce"
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc


def prepare_cpu() -> None:
    """Sets the switches above for this process; call before the first JAX computation. Flags a user gave win.

    Memory once taken stays with the process, at its peak. Nothing happens to the allocator where libc is not glibc.
    """
    version = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])
    flags = os.environ.get("XLA_FLAGS", "")
    if version < (0, 12) and "ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_NO_YNN_REDUCE}".strip()
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (an AttributeError here means: not glibc)
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(option, value)
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        pass
