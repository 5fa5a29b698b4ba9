"""The parameters that a training begins with: a bundle's parameters, and random ones for new parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ar_unified.bundle import Bundle
from ar_unified.data.images import NoImages
from ar_unified.experiment.adapter import First, first_adapter, grown, read_base, tables_before
from ar_unified.experiment.experiment import Experiment
from ar_unified.interop.peft import own_rows
from ar_unified.language.extension import rows_of
from ar_unified.language.grammar import Grammar
from ar_unified.language.vocabulary import Role
from ar_unified.model.own_rows import TABLES
from ar_unified.model.transformer import Params
from ar_unified.training.selection import Selection
from ar_unified.training.tasks import TransformerTask

_ROWS = {
    "mean": "as the mean of the text rows",
    "random": "at random",
    "codebook": "like the codebook's vectors",
}


def beginning(
    experiment: Experiment, task: TransformerTask, fresh: Selection | None
) -> Callable[[Params], Params] | None:
    """Returns a function that makes the first parameters from the bundle in config.init, with random values for the
    parts that begin at random; None if config.init names no bundle.
    """
    bundle = experiment.bundle
    if bundle is None:
        return None

    def begin(abstract: Params) -> Params:
        experiment.say(f"model: begins with the weights of {bundle.folder}")
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        if experiment.before is not None:
            params = _extended(experiment, bundle, abstract)
        else:
            params = read_base(bundle, abstract)
        key = jax.random.key(experiment.config.seed)
        if task.lora is not None:
            if (first := first_adapter(experiment.config, experiment.bundle)) is not None:
                experiment.say(f"model: the adapter begins as {experiment.config.lora.init}")
                params = with_adapter(params, first, experiment.grammar, places)
            else:
                params |= jax.jit(partial(_adapter, task), out_shardings={"lora": places["lora"]})(key)
        if fresh is None:
            return params
        experiment.say(f"model: {', '.join(experiment.config.training.fresh)} begin at random")
        renewed = jax.jit(
            lambda params: fresh.put(params, fresh.take(task.init(key))), donate_argnums=0, out_shardings=places
        )
        return renewed(params)

    return begin


def _extended(experiment: Experiment, bundle: Bundle, abstract: Params) -> Params:
    """The parameters of a language model with rows for images."""
    before, vocabulary = experiment.before, experiment.grammar.vocabulary
    assert before is not None
    how = experiment.config.training.code_embedding_init
    experiment.say(f"model: {len(experiment.new_ids)} ids are new; rows of image codes begin {_ROWS[how]}")
    vectors = None
    if how == "codebook" and not isinstance(experiment.image_tokenizer, NoImages):
        vectors = jnp.asarray(experiment.image_tokenizer.vectors())
    params = read_base(bundle, tables_before(bundle, abstract))
    return params | grown(
        {name: params[name] for name in TABLES if name in params},
        rows_of(before, vocabulary),
        {name: abstract[name].sharding for name in TABLES if name in params},
        before.text_size,
        vocabulary.ids(Role.IMAGE),
        how=how,
        vectors=vectors,
        key=jax.random.key(experiment.config.seed),
    )


def with_adapter(params: Params, first: First, grammar: Grammar, places: Any) -> Params:
    """The parameters with the adapter added. If the adapter has rows of ids, they replace the rows in the parameters.

    `places` has the shardings of the tables of ids and of the adapter.
    """
    params = params | {"lora": _hand_out(first.matrices, places["lora"])}
    for table, (ids, values) in own_rows(first.adapter, grammar).items():
        put = jax.jit(lambda old, at, new: old.at[at].set(new.astype(old.dtype)), out_shardings=places[table])
        params[table] = put(params[table], ids, values)
    return params


def _hand_out(tree: Any, places: Any) -> Any:
    """Puts numpy arrays on devices; this process fills only its own devices."""
    return jax.tree.map(
        lambda leaf, place: jax.make_array_from_callback(leaf.shape, place, lambda at: leaf[at]), tree, places
    )


def _adapter(task: TransformerTask, key: jax.Array) -> Params:
    """The adapter's random values. Under jit, the rest of `init` is not computed, because nothing uses it."""
    return {"lora": task.init(key)["lora"]}
