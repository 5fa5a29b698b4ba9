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
      interpret: what Pallas kernels pass to `pallas_call(interpret=...)`: True or pltpu.InterpretParams to emulate.
    """

    scale: float
    soft_cap: float | None = None
    shift: int | None = None
    interpret: Any = False
