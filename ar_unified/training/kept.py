"""Decides which parameters a checkpoint stores: all of them, or only the trained ones if the rest can be read
elsewhere.

If an adapter of a few megabytes is trained with a model of many gigabytes, every save would write the unchanged model
again, although the bundle that training started from already contains it.
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
        read: a function of shapes, dtypes and shardings. It returns the parameters that training started from, with
            fresh values for the trained parts. None if they cannot be read again; then a checkpoint stores everything.
    """

    def __init__(self, task: TrainingTask, mesh: Mesh, read: Callable[[Params], Params] | None):
        self._task, self._mesh, self._read = task, mesh, read

    def abstract(self, params: Params) -> Params:
        """Shapes, dtypes and shardings of the stored parameters, selected from those of all parameters."""
        return params if self._read is None else abstract_trained(self._task, params, self._mesh)

    def stored(self, params: Params) -> Any:
        """The parameters that a checkpoint stores."""
        return params if self._read is None else self._task.selection(params).take(params)

    def whole(self, abstract: Params, stored: Params) -> Params:
        """All parameters, restored from the result of `stored`."""
        if self._read is None:
            return stored
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        put = self._task.selection(abstract).put
        return jax.jit(put, donate_argnums=0, out_shardings=places)(self._read(abstract), stored)
