"""Which parameters a checkpoint holds: all of them, or only the trained ones if the rest can be read elsewhere.

If an adapter of a few megabytes is trained beside a model of many gigabytes, every save would write the unchanged model
again. The bundle that the training began with has it already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ar_unified.training.step import Params, TrainingTask, abstract_trained


class Kept:
    """
    Args:
        read: gives the parameters that the training began with, by their shapes, dtypes and shardings; trained parts
            are fresh in them. None: they cannot be read again, and a checkpoint holds all.
    """

    def __init__(self, task: TrainingTask, mesh: Mesh, read: Callable[[Params], Params] | None):
        self._task, self._mesh, self._read = task, mesh, read

    def abstract(self, params: Params) -> Params:
        """Shapes, dtypes and shardings of what is stored, from those of all parameters."""
        return params if self._read is None else abstract_trained(self._task, params, self._mesh)

    def stored(self, params: Params) -> Any:
        """What goes into a checkpoint."""
        return params if self._read is None else self._task.selection(params).take(params)

    def whole(self, abstract: Params, stored: Params) -> Params:
        """All parameters again, from the result of `stored`."""
        if self._read is None:
            return stored
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        put = self._task.selection(abstract).put
        return jax.jit(put, donate_argnums=0, out_shardings=places)(self._read(abstract), stored)
