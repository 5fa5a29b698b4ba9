"""Settings of a process that runs JAX on a CPU: one for right results, three for speed.

Measured on 2 cores with jaxlib 0.10.2 (experiments/benchmarks/cpu_vs_transformers.py):

* XLA CPU fuses some reductions into YNNPACK calls that return wrong numbers in jaxlib 0.10.2 (jax issue 39103).
  Versions 0.10.1 and 0.12 return right numbers; a related crash (issue 39257) is also in 0.11.0. The gradient of an
  RMSNorm under `vmap` was off by 0.24 without an error. With one XLA flag, XLA computes reductions itself. Importing
  ar_tokenizers or ar_unified sets this flag.
* XLA allocates all temporaries of a step as one block, which glibc maps from the system and gives back each time.
  This caused 130,000 page faults and took a quarter of the time of the demo's step. The three `mallopt` values make
  glibc keep the block. They suit a process that does nothing else, so only importing ar_unified.cli sets them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path

_NO_YNN_REDUCE = "--xla_cpu_experimental_ynn_fusion_type=-library_fusion_type_reduce"
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # numbers from glibc's malloc.h


def right_reductions() -> None:
    """Adds the flag to XLA_FLAGS if jaxlib needs it. JAX may be imported already, but must not have computed yet.

    If the user has set the flag, it stays as it is. Warns (RuntimeWarning) if JAX already runs on a CPU, because JAX
    reads flags only once.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    version = _jaxlib_version()
    if "ynn_fusion_type" in flags or version is None or version >= (0, 12):
        return
    os.environ["XLA_FLAGS"] = f"{flags} {_NO_YNN_REDUCE}".strip()
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized() and sys.modules["jax"].default_backend() == "cpu":
        warnings.warn(
            f"JAX has run before ar_unified or ar_tokenizers was imported: jaxlib {'.'.join(map(str, version))} may "
            f"compute wrong sums on this CPU. Import one of them first, or start with XLA_FLAGS={_NO_YNN_REDUCE}",
            RuntimeWarning,
            stacklevel=2,
        )


def keep_memory() -> None:
    """Makes glibc keep all memory it has allocated, so the process stays at its peak size. Does nothing without
    glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (an AttributeError here means: not glibc)
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(option, value)
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        pass


def _jaxlib_version() -> tuple[int, ...] | None:
    """jaxlib's version, read from its file. Importing jaxlib, or using importlib.metadata, would take most of the time
    of a command with --help."""
    found = importlib.util.find_spec("jaxlib")
    if found is None or found.origin is None:
        return None
    text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    version = re.search(r"""^_version = ["'](\d+(?:\.\d+)*)""", text, re.MULTILINE)
    return tuple(map(int, version[1].split("."))) if version else None
