"""The static settings of an attention: besides shapes, a kernel is compiled for these."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """
    Attributes:
      scale: of the scores.
      soft_cap: scores become soft_cap * tanh(score / soft_cap); None: no cap.
      shift: q_offset - kv_offset, if both are known when tracing; else None.
      interpret: emulate the kernel on a CPU; for tpu.py it may say how (pltpu.InterpretParams).
    """

    scale: float
    soft_cap: float | None = None
    shift: int | None = None
    interpret: Any = False
