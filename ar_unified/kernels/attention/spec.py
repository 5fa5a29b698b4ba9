"""The static settings of attention. A kernel is compiled for these and for the shapes."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """
    Attributes:
      scale: factor of the scores.
      soft_cap: scores become soft_cap * tanh(score / soft_cap); None: no cap.
      shift: q_offset - kv_offset, if both are known when tracing; else None.
      interpret: emulate the kernel on a CPU; for tpu.py it may be the settings of the emulation, pltpu.InterpretParams.
    """

    scale: float
    soft_cap: float | None = None
    shift: int | None = None
    interpret: Any = False
