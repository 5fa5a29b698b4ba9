"""A trace of a few steps for xprof or Perfetto. It shows how the time inside a step is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces the steps of `window` into `folder`. `window`: (first, last), for a trace that begins after `first` steps
    and ends after `last` steps, or None for no trace.
    """

    def __init__(self, window: tuple[int, int] | None, folder: str | Path):
        self.window, self.folder = window, Path(folder)
        self._tracing = False

    def at(self, taken: int, state: Any) -> bool:
        """Call this function before every step, with the number of steps taken and the state after them. Returns
        whether a trace was finished by this call. At the start and at the end of a trace it waits for `state`, so that
        the trace contains exactly its own steps.
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
        """Ends a trace that is still running."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
