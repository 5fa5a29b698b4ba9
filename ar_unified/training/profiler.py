"""A trace of a few steps, for xprof or Perfetto: where the time inside a step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces the steps of `window` (steps taken when it begins and when it ends; None: nothing) into `folder`."""

    def __init__(self, window: tuple[int, int] | None, folder: str | Path):
        self.window, self.folder = window, Path(folder)
        self._tracing = False

    def at(self, taken: int, state: Any) -> bool:
        """Call it before every step, with the number of steps taken and their state. Returns whether a trace was
        finished just now. Both ends of a trace wait for `state`, so that it holds its own steps and no others.
        """
        if self.window is None:
            return False
        first, last = self.window
        if first <= taken < last and not self._tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self._tracing = True
        elif taken >= last and self._tracing:
            jax.block_until_ready(state)
            self.close()
            return True
        return False

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
