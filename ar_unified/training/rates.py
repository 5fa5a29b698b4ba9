"""How fast each part of the parameters is trained: factors on the learning rate, and phases in which parts are frozen.

    rates=("layers.*=0.1", "embedding[new]=2")        the last match counts; without a match, the factor is 1
    phases=((0, ("embedding[new]", "head[new]")), (200, ()))    from step 0 only these are trained, from step 200 all

A factor scales the whole update, including decoupled weight decay, as a learning rate does. A part that is frozen in a
phase has a gradient of zero there: its moments stay or decay, and its values do not change. It still has optimizer
state, because it is trained in another phase. Parts that are never trained are left out by `selection`.

Axes: P phases, V rows of a table.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath

from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.leaves import named
from ar_unified.tensors import Params
from ar_unified.training.selection import Rows, Selection, select


def read_rate(rate: str) -> tuple[str, float]:
    """The place and the factor of "PLACE=FACTOR". Raises ValueError."""
    place, equals, factor = rate.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    if not equals or not place or not 0 < value < float("inf"):
        raise ValueError(f"rates: expected PLACE=FACTOR, as in layers=0.1, with a factor above 0; found {rate!r}")
    return place, value


def trained_in(only: Sequence[str], phases: Sequence[tuple[int, Sequence[str]]]) -> tuple[str, ...]:
    """The places that are trained in any step: the places of all phases, or those of `only` if there are no phases. ()
    means everything.
    """
    if not phases:
        return tuple(only)
    places = [tuple(places) for _, places in phases]
    return tuple(dict.fromkeys(itertools.chain(*places))) if all(places) else ()


@dataclass(frozen=True)
class Rates:
    """
    Attributes:
        begins: the first step of each phase; (0,) if there is only one.
        factors: maps the path of a trained parameter to f32 [P], or [P, trained rows] if rows differ. None: all factors
            are always 1.
    """

    begins: tuple[int, ...] = (0,)
    factors: Mapping[str, np.ndarray] | None = None

    def moving(self, tree: Any, step: jax.Array) -> Any:
        """The gradients of trained parameters, with zeros for the parts that are frozen in the phase of a step."""
        if len(self.begins) == 1:
            return tree
        return self._each(tree, step, lambda leaf, factor: jnp.where(factor > 0, leaf, 0))

    def scaled(self, updates: Any, step: jax.Array) -> Any:
        """The updates of trained parameters, times their factors in the phase of a step."""
        return self._each(updates, step, lambda leaf, factor: (leaf * factor).astype(leaf.dtype))

    def _each(self, tree: Any, step: jax.Array, change: Any) -> Any:
        if not self.factors:
            return tree
        phase = jnp.sum(step >= jnp.array(self.begins)) - 1

        def one(path: KeyPath, leaf: jax.Array) -> jax.Array:
            factor = jnp.asarray(self.factors[jax.tree_util.keystr(path, simple=True, separator=".")])[phase]  # type: ignore[index]
            return change(leaf, factor.reshape(*factor.shape, *(1,) * (leaf.ndim - factor.ndim)))

        return jax.tree_util.tree_map_with_path(one, tree)


UNIFORM = Rates()


def make_rates(
    rates: Sequence[str],
    phases: Sequence[tuple[int, Sequence[str]]],
    axes: Params,
    shapes: Params,
    vocabulary: Vocabulary,
    selection: Selection,
    new: Collection[int] = (),
) -> Rates:
    """The rates of the parameters that `selection` trains.

    Args:
        rates, phases: as in the docstring of this module; () for none.
        axes, shapes: axes and shapes of all parameters.
        vocabulary, new: as in `select`.

    Raises ValueError, which names the rate, if it is not PLACE=FACTOR, or if no trained parameter matches it.
    """
    if not rates and not phases:
        return UNIFORM
    count = max(1, len(phases))
    factors = {path: np.ones((count, 1), np.float32) for path in named(shapes)}
    rows = {path: leaf.shape[0] for path, leaf in named(shapes).items()}

    def put(path: str, runs: Rows, value: float, at: Any) -> None:
        if runs and factors[path].shape[1] == 1:
            factors[path] = np.repeat(factors[path], rows[path], axis=1)
        for begin, end in runs or ((0, rows[path]),):
            factors[path][at, begin:end] = value

    def parts(places: Sequence[str]) -> Mapping[str, Rows]:
        found = select(places, axes, vocabulary, new).parts
        return {path: () for path in factors} if found is None else found

    for rate in rates:
        place, factor = read_rate(rate)
        try:
            found = parts((place,))
        except ValueError as error:
            raise ValueError(f"rates: {error}") from error
        if not _meet(found, selection):
            raise ValueError(
                f"rates: {place!r}: these parameters are not trained, because `only` or `phases` leaves them out: "
                "leave out this rate too"
            )
        for path, runs in found.items():
            put(path, runs, factor, slice(None))
    for at, (_, places) in enumerate(phases):
        moving = {path: np.zeros(factor.shape[1:], bool) for path, factor in factors.items()}
        for path, runs in parts(tuple(places)).items():
            if runs:
                moving[path] = np.resize(moving[path], rows[path])
            for begin, end in runs or ((0, rows[path]),):
                moving[path][begin:end] = True
        for path, mask in moving.items():
            if mask.shape[0] > factors[path].shape[1]:
                factors[path] = np.repeat(factors[path], rows[path], axis=1)
            factors[path][at] *= mask
    begins = tuple(begin for begin, _ in phases) or (0,)
    trained = {path: () for path in factors} if selection.parts is None else selection.parts
    return Rates(begins, {path: _taken(factors[path], runs) for path, runs in trained.items()})


def _taken(factor: np.ndarray, runs: Rows) -> np.ndarray:
    """Takes the factors of the trained rows from [P, V] or [P, 1]. The result is [P, trained rows], or [P] if all rows
    have the same factors."""
    if factor.shape[1] > 1 and runs:
        factor = np.concatenate([factor[:, begin:end] for begin, end in runs], axis=1)
    return factor[:, 0] if (factor == factor[:, :1]).all() else factor


def _meet(found: Mapping[str, Rows], selection: Selection) -> bool:
    if selection.parts is None:
        return True
    for path in found.keys() & selection.parts.keys():
        a, b = found[path], selection.parts[path]
        if not a or not b or any(x < end and begin < y for x, y in a for begin, end in b):
            return True
    return False
