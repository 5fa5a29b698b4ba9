"""Makes the model with a trained adapter, from the training's checkpoint and the bundle that it began with
(config.init)."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from ml_collections import ConfigDict

from ar_unified.bundle import Bundle
from ar_unified.errors import UserError, about
from ar_unified.experiment import settings
from ar_unified.interop.peft import Adapter, bases, own_rows, read
from ar_unified.language.grammar import Grammar
from ar_unified.language.vocabulary import Role
from ar_unified.model.code_vectors import extended_tables
from ar_unified.model.config import TransformerConfig, summed
from ar_unified.model.lora import MATRICES, LoraConfig, merged
from ar_unified.model.own_rows import TABLES
from ar_unified.model.quantized import Quantized, quantized
from ar_unified.model.transformer import Params, abstract_params
from ar_unified.training.selection import Selection


def require_base(bundle: Bundle, trained: Any) -> None:
    """Raises UserError unless the training began with this bundle. `trained` is the bundle hash that the training
    recorded."""
    if bundle.hash != trained:
        raise UserError(
            f"config.init: the adapter was trained on bundle {str(trained)[:12]}, found {bundle.hash[:12]} in "
            f"{bundle.folder}: name the bundle that the training began with"
        )


def require_not_begun_with(adapters: Mapping[str, Adapter], trained: Any) -> None:
    """Raises UserError for an adapter of the bundle that the training began with, because the trained model is another
    one: after a training of an adapter, it even has that adapter already. `trained` is as in `require_base`."""
    for name, adapter in adapters.items():
        if adapter.base and adapter.base == trained:
            raise UserError(
                f"adapter {name!r:.80}: {adapter.folder} was trained on the bundle with which this workdir's training "
                "began, not on its trained model: use it with --from and that bundle, the workdir's config.init"
            )


class First(NamedTuple):
    """The adapter of config.lora.init. `matrices` are its matrices as numpy arrays, arranged as in params["lora"]."""

    adapter: Adapter
    matrices: Any


def first_adapter(config: ConfigDict, bundle: Bundle | None) -> First | None:
    """The adapter that config.lora.init names, or None if it names none.

    Raises UserError if it belongs to another model, or config.lora describes another adapter.
    """
    lora = settings.lora(config)
    if lora is None or not config.lora.init or bundle is None:
        return None
    with about("config.lora.init"):
        found = read(config.lora.init, bundle.config, *bases(bundle))
    return First(found, beginning_with(found, lora))


def require_rows(first: First, grammar: Grammar, selection: Selection) -> None:
    """Raises UserError if the adapter has rows of ids that `selection` does not train, because checkpoints would lack
    these rows."""
    with about("config.lora.init"):
        own = own_rows(first.adapter, grammar)
    kinds = {role.name.lower(): grammar.vocabulary.ids(role) for role in Role if role != Role.PAD}
    for table, (ids, _) in own.items():
        runs = None if selection.parts is None else selection.parts.get(table, ((0, 0),))
        if not runs:  # all of the table is trained
            continue
        left = [int(id) for id in ids if not any(begin <= id < end for begin, end in runs)]
        if left:
            named = [f"{table}[{kind}]" for kind, those in kinds.items() if any(id in those for id in left)]
            raise UserError(
                f"config.training.only: expected {', '.join(named) or table} in it: the adapter "
                f"{first.adapter.folder} has {len(left)} rows of {table} that this training would lose, because it "
                "does not train them"
            )


def beginning_with(found: Adapter, lora: LoraConfig) -> Any:
    """The matrices of an adapter's file as numpy arrays, arranged as in params["lora"].

    Raises UserError, which names the key of config.lora, if the config describes another adapter than the file has.
    """

    def refused(key: str, path: str, wanted: object, has: object) -> UserError:
        return UserError(
            f"config.lora.{key}: expected {has}, as the adapter {found.folder} has for {path}; found {wanted}"
        )

    other = next((path for path in MATRICES if (path in lora.matrices) != (path in found.matrices)), None)
    if other is not None:
        raise UserError(
            f"config.lora.targets: expected {', '.join(each for each in MATRICES if each in found.matrices)}, as the "
            f"adapter {found.folder} has; found {', '.join(lora.matrices)}"
        )
    made: dict[str, Any] = {}
    for path in lora.matrices:
        ranks, scales = set(found.ranks[path]), set(found.scales[path])
        if len(ranks) > 1 or len(scales) > 1:
            raise UserError(
                f"config.lora.init: expected an adapter that is the same in all layers, as training requires; "
                f"{found.folder} has the ranks {', '.join(map(str, found.ranks[path]))} for {path}. It can still be "
                "served (sample --adapter)"
            )
        (rank,), (scale,) = ranks, scales
        if rank != lora.rank_of(path):
            raise refused("rank (or ranks)", path, lora.rank_of(path), rank)
        if not math.isclose(scale, lora.scale_of(path), rel_tol=1e-6):
            said = f"{lora.alpha_of(path):g}, which scales by {lora.scale_of(path):g}"
            alpha = scale * (rank**0.5 if lora.rslora else rank)
            raise refused("alpha (or alphas, rslora)", path, said, f"{alpha:g}")
        group, _, name = path.partition(".")
        a, b = found.matrices[path]
        made.setdefault(group, {})[name] = {"a": a, "b": b}
    return made


def grown(
    tables: Params, rows: np.ndarray, places: Any, text_size: int = 1, codes: range = range(0), **how: Any
) -> Params:
    """The tables of a language model (embedding and head), extended by rows for new ids
    (`model.code_vectors.extended_tables`) and sharded as in `places`.

    `how`: the other arguments of `extended_tables`. By default all new rows are equal; the caller then sets their
    values.
    """
    how = {"how": "mean", "vectors": None, "key": jax.random.key(0)} | how
    put = jax.jit(
        lambda tables: extended_tables(tables, rows, text_size, codes, **how),
        out_shardings={name: places[name] for name in tables},
    )
    return put(tables)


def read_base(bundle: Bundle, abstract: Params) -> Params:
    """The bundle's parameters in the form that a training uses.

    `abstract` gives their shapes, dtypes and shardings. If it gives a matrix an 8-bit dtype, the matrix is rounded as
    soon as it is read, so that only one matrix at a time is in memory in the file's dtype.
    """

    def rounded(leaf: Any) -> bool:
        return isinstance(leaf, Quantized)

    own = {name: leaf for name, leaf in abstract.items() if name != "lora"}
    places = jax.tree.map(lambda x: x.values.sharding if rounded(x) else x.sharding, own, is_leaf=rounded)
    dtypes = jax.tree.map(lambda x: None if rounded(x) else x.dtype, own, is_leaf=rounded)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(own, is_leaf=rounded)
    }

    def then(name: str, made: jax.Array) -> Any:
        kept = leaves[name]
        if not rounded(kept):
            return made
        places = jax.tree.map(lambda leaf: leaf.sharding, kept)
        small = jax.jit(quantized, static_argnums=(1, 2), out_shardings=places)(
            made, str(kept.values.dtype), summed(name.rpartition(".")[2])
        )
        jax.block_until_ready(small)
        made.delete()
        return small

    return bundle.params(places, dtypes, then)


def tables_before(bundle: Bundle, abstract: Params) -> Params:
    """`abstract`, but the tables of ids have the bundle's sizes, as before the language model is extended by images."""
    place = abstract["embedding"].sharding
    mesh = place.mesh if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh) else None
    before = abstract_params(bundle.config, mesh)

    def table(name: str) -> jax.ShapeDtypeStruct:
        where = place if mesh is None else before[name].sharding
        return jax.ShapeDtypeStruct(before[name].shape, abstract[name].dtype, sharding=where)

    return abstract | {name: table(name) for name in TABLES if name in before}


def in_base(
    bundle: Bundle,
    config: TransformerConfig,
    lora: LoraConfig,
    selection: Selection,
    stored: Params,
    target: Params | None,
    rows: np.ndarray | None = None,
    adapted: bool = True,
) -> Params:
    """The parameters of the bundle with the adapter merged in, and with the values of everything else that was trained.

    Args:
        config: the config of the trained model.
        selection: which parameters were trained.
        stored: the trained values, as in a checkpoint.
        target: shapes, dtypes and shardings of the result; None means float32 on this process's first device.
        rows: from `language.extension.rows_of`, if the bundle is a language model that was extended. Rows that the
            bundle lacks are in `stored`.
        adapted: whether the adapter is merged in.
    """
    if target is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        shapes = abstract_params(config)
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
    places = jax.tree.map(lambda leaf: leaf.sharding, target)
    old = target if rows is None else tables_before(bundle, target)
    params = bundle.params(*(jax.tree.map(operator.attrgetter(name), old) for name in ("sharding", "dtype")))
    if rows is not None:
        params |= grown({name: params[name] for name in TABLES if name in params}, rows, places)

    def put(params: Params, stored: Params) -> Params:
        dtypes = {"lora": jax.tree.map(lambda leaf: leaf.dtype, stored["lora"])}
        axes = jax.tree.map(lambda leaf: leaf.dtype, params) | dtypes
        kinds = Selection({path: () for path in selection.parts or ()}).take(axes)
        cast = jax.tree.map(lambda leaf, kind: leaf.astype(kind), stored, kinds)
        whole = selection.put(params | {"lora": stored["lora"]}, cast)
        return merged(lora, whole) if adapted else {name: leaf for name, leaf in whole.items() if name != "lora"}

    return jax.jit(put, donate_argnums=0, out_shardings=places)(params, jax.device_get(stored))
