"""The static part of one attention: what a kernel is compiled for, besides shapes."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """
    Attributes:
      scale: of the scores.
      soft_cap: scores become soft_cap * tanh(score / soft_cap); None: they stay.
      shift: q_offset - kv_offset where both are known when tracing; None: only when running.
      interpret: emulate the kernel on a CPU; for tpu.py it may say how (pltpu.InterpretParams).
    """

    scale: float
    soft_cap: float | None = None
    shift: int | None = None
    interpret: Any = False
