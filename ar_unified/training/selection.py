"""Selects the parameters that are trained. Leaves are selected by path, rows of a table by the kind of their ids.

    ("layers.attention", "*.norm")    every leaf below a path, and every leaf with a path that matches
    ("head[image]",)                  only the head's rows of image codes, as Anole trains
    ("embedding[new]", "head[new]")   rows of ids that the original language model did not have (`language.extension`)

Parameters that are not selected are constants of the step. They have no gradient, no optimizer state and no weight
decay, and their bits stay the same. If nothing below a layer is trained, no gradient passes through this layer.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from ar_unified.errors import nearest
from ar_unified.language.vocabulary import Role, Vocabulary
from ar_unified.model.dtypes import held
from ar_unified.model.own_rows import TABLES
from ar_unified.tensors import Params

Rows = tuple[tuple[int, int], ...]  # begin and end of each range of rows, ascending
NEW = "new"
_PLACE = re.compile(r"([\w.*?]+)(?:\[(\w+)\])?")


@dataclass(frozen=True)
class Selection:
    """
    Attributes:
        parts: maps the path of each trained leaf to its trained rows; () means all rows. None: all parameters are
            trained.
    """

    parts: Mapping[str, Rows] | None = None

    def take(self, params: Params) -> Params:
        """The trained part: a tree like `params` with only the selected leaves and the selected rows of tables."""
        return self._taken(params, lambda leaf, rows: jnp.concatenate([leaf[begin:end] for begin, end in rows]))

    def put(self, params: Params, taken: Params) -> Params:
        """`params`, with the trained part replaced by `taken`."""
        if self.parts is None:
            return taken
        whole = _copied(params)
        for path, rows in self.parts.items():
            folder, name = _folder(whole, path)
            leaf, new, at = folder[name], _folder(taken, path)[0][name], 0
            for begin, end in rows:
                leaf = jax.lax.dynamic_update_slice_in_dim(leaf, new[at : at + end - begin], begin, axis=0)
                at += end - begin
            folder[name] = leaf if rows else new
        return whole

    def fixed(self, params: Params, dtype: str) -> Params:
        """`params` with each untrained matrix and table cast to `dtype` by the rules of `dtypes.held`."""
        trained = params if self.parts is None else self.take(params)
        kept = {path for path, _ in _leaves(trained)}

        def cast(path: KeyPath, leaf: Any) -> Any:
            fixed = jax.tree_util.keystr(path, simple=True, separator=".") not in kept
            return held(path, leaf, dtype) if fixed else leaf

        return jax.tree_util.tree_map_with_path(cast, params)

    def axes(self, axes: Params) -> Params:
        """The logical axes of the trained part, from the axes of all parameters. Selected rows are never split."""
        return self._taken(axes, lambda found, rows: (None, *found[1:]))

    def _taken(self, tree: Params, of_rows: Callable[[Any, Rows], object]) -> Params:
        """The selected leaves of a tree like the parameters. If rows of a leaf are selected, `of_rows` gives the new
        leaf."""
        if self.parts is None:
            return tree
        taken: Params = {}
        for path, rows in self.parts.items():
            folder, name = _folder(taken, path)
            leaf = _folder(tree, path)[0][name]
            folder[name] = of_rows(leaf, rows) if rows else leaf
        return taken

    def told(self, shapes: Params) -> str:
        """What is trained, in words; "" if everything is trained. shapes: shapes of all parameters."""
        if self.parts is None:
            return ""
        words, count = list[str](), 0
        for path, rows in self.parts.items():
            leaf = _folder(shapes, path)[0][path.rpartition(".")[2]]
            selected = _count(rows) if rows else leaf.shape[0]
            count += selected * math.prod(leaf.shape[1:])
            shown = "lora" if path.startswith("lora.") else path  # does not list each matrix of an adapter
            shown = f"{selected:,} of {leaf.shape[0]:,} rows of {path}" if rows else shown
            words += [shown] if shown not in words else []
        total = sum(math.prod(leaf.shape) for _, leaf in _leaves(shapes))
        return f"trains {', '.join(words)}: {count:,} of {total:,} parameters"


EVERYTHING = Selection()


def select(places: Sequence[str], axes: Params, vocabulary: Vocabulary, new: Collection[int] = ()) -> Selection:
    """The selection of the parameters that `places` name; without places, all parameters.

    Args:
        places: paths of leaves, or of nodes above them, in which * matches anything. If the path is a table of ids, it
            may end with [text], [control], [size], [image] or [new] to select only these rows.
        axes: logical axes of every parameter. A leaf whose first axis is "vocab" is a table of ids.
        new: the ids that "new" means.

    Raises ValueError if a place matches nothing. The message begins with the place.
    """
    if not places:
        return EVERYTHING
    paths = dict(_leaves(axes))
    parts: dict[str, set[int] | None] = {}
    for place in places:
        match = _PLACE.fullmatch(place)
        found = [path for path in paths if match and _under(path, match[1])]
        if not match or not found:
            above = {path[: dot.start()] for path in paths for dot in re.finditer(r"\.", path)}
            known = ", ".join(dict.fromkeys(path.partition(".")[0] for path in paths))
            near = nearest(match[1] if match else place, sorted({*paths, *above}))
            near = "; its head is its embedding" if match and match[1] == "head" else near
            raise ValueError(f"{place!r} matches no parameter of this model ({known}){near}")
        ids = _ids(place, match[2], [path for path in found if paths[path][0] != "vocab"], vocabulary, new)
        for path in found:
            before = parts.get(path, set())
            parts[path] = None if ids is None or before is None else before | set(ids)
    return Selection({path: () if ids is None else _runs(ids) for path, ids in sorted(parts.items())})


def beside_adapter(places: Sequence[str], params: Params, new: Collection[int]) -> tuple[str, ...]:
    """The places that are trained with an adapter: the adapter, `places`, and the rows of new ids, which have not
    been trained before.

    Args:
        params: the model's parameters, or their axes, which show whether the head is a separate table.
        new: as in `select`.
    """
    rows = [f"{table}[{NEW}]" for table in TABLES if table in params] if new else []
    return ("lora", *rows, *places)


def _ids(
    place: str, kind: str | None, others: Sequence[str], vocabulary: Vocabulary, new: Collection[int]
) -> Collection[int] | None:
    """The ids that a place selects; None if it selects whole leaves. others: the selected leaves that are not tables of
    ids.
    """
    if kind is None:
        return None
    known = [*(role.name.lower() for role in Role if role != Role.PAD), NEW]
    if kind not in known:
        raise ValueError(f"{place!r}: expected one of {', '.join(known)}; found {kind!r}{nearest(kind, known)}")
    if others:
        raise ValueError(f"{place!r}: {others[0]} does not have a row for each id; only embedding and head do")
    if kind == NEW and not new:
        raise ValueError(f"{place!r}: no ids are new, because this training does not extend a language model")
    if not (ids := new if kind == NEW else vocabulary.ids(Role[kind.upper()])):
        raise ValueError(f"{place!r}: this vocabulary has no {kind} tokens")
    return ids


def _under(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def _runs(ids: set[int]) -> Rows:
    begins = sorted(id for id in ids if id - 1 not in ids)
    ends = sorted(id + 1 for id in ids if id + 1 not in ids)
    return tuple(zip(begins, ends, strict=True))


def _count(rows: Rows) -> int:
    return sum(end - begin for begin, end in rows)


def _folder(tree: Params, path: str) -> tuple[Params, str]:
    """The dict that holds a leaf (made if it is missing), and the leaf's name in it."""
    *above, name = path.split(".")
    for key in above:
        tree = tree.setdefault(key, {})
    return tree, name


def _copied(tree: Params) -> Params:
    return {key: _copied(inner) if isinstance(inner, dict) else inner for key, inner in tree.items()}


def _leaves(tree: Params, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in tree.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{above}{key}.")
        else:
            yield f"{above}{key}", inner
