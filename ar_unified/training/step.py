"""One training step: (state, batch) -> (state, metrics), compiled once for a mesh.

The loss of a step is sum(weight * loss) / sum(weight) over the whole global batch: over microbatches and over devices
alike, so that neither the mesh nor the accumulation changes what is optimised (ragged rows weigh what they hold, not
1/rows each). A step whose gradient is not finite changes nothing and says which leaf and layer was to blame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ar_unified.parallel.rules import batch_spec, shardings
from ar_unified.training.optimizer import state_shardings

Params = dict[str, Any]
Batch = Mapping[str, Any]
Metrics = dict[str, Any]


class BatchOfStep(Protocol):
    """A pure function of the step."""

    def __call__(self, step: int, index: int = 0, count: int = 1, /) -> Mapping[str, np.ndarray]:
        """Part `index` of `count` equal parts of the rows of a global batch."""


class Task(Protocol):
    """What is trained: a model, its loss, its data, and what is worth saying about a step (training/tasks.py).

    Metrics are sums, never means: a (sum, count) pair is divided after it was added over microbatches, devices and
    steps; a bare array is a plain sum (a count of tokens, a histogram of codes).
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str:
        """The metric that counts work: "tokens" or "images"."""

    @property
    def batch(self) -> BatchOfStep:
        """The global batch of a step, or a part of it."""

    @property
    def validation(self) -> Sequence[Mapping[str, np.ndarray]]:
        """Held-out batches, the same every time."""

    def init(self, key: jax.Array) -> Params: ...

    def logical_axes(self, params: Params) -> Any:
        """A tree like params, of tuples of logical axis names (parallel/rules.py)."""

    def loss(self, params: Params, batch: Batch, keys: jax.Array | None) -> tuple[jax.Array, jax.Array, Metrics]:
        """(sum of weight * loss, sum of weight, metric sums); keys [B], one for each row; None: no dropout."""

    def summary(self, totals: Metrics) -> dict[str, float]:
        """The numbers to write down, from metric sums on the host."""

    def flops(self, totals: Metrics) -> float | None:
        """Matrix-multiply FLOPs of training on what `totals` counts; None: not known."""

    def describe(self) -> dict[str, Any]:
        """JSON for the checkpoint: enough to build the model again."""


class TrainState(NamedTuple):
    """All that a run is; with the data a function of `step`, restoring it resumes exactly."""

    step: jax.Array  # i32 [], steps taken
    params: Params
    optimizer: optax.OptState


class StepReport(NamedTuple):
    """What one step says. `values` holds sums, (sum, count) pairs and histograms; the rest is the NaN guard."""

    values: Metrics
    loss: jax.Array  # f32 []
    grad_norm: jax.Array  # f32 [], before clipping
    finite: jax.Array  # bool [], False: the step was not taken
    finite_leaves: dict[str, jax.Array]  # by leaf: bool [], or bool [L] for stacked layers


def make_state(task: Task, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. Jittable, and the same on every mesh."""
    params = task.init(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(task: Task, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on `mesh`; nothing is allocated."""
    shapes = jax.eval_shape(lambda: make_state(task, tx, 0))
    whole = NamedSharding(mesh, P())
    params = shardings(mesh, task.logical_axes(shapes.params), shapes.params)
    places = TrainState._make((whole, params, state_shardings(tx, shapes.params, params, whole)))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def split_microbatches(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """[B, ...] -> [count, B / count, ...], microbatch i being rows i, i + count, ...

    Strided, because a device holds consecutive rows: each microbatch is spread over all devices without moving a row.
    """

    def split(name: str, array: jax.Array) -> jax.Array:
        rows = array.shape[0]
        if rows % count:
            raise ValueError(f"batch of {rows} rows does not split into {count} microbatches")
        array = array.reshape(rows // count, count, *array.shape[1:]).swapaxes(0, 1)
        where = P(None, *batch_spec(mesh, array.shape[1:], f"microbatch[{name!r}]"))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, where))

    return {name: split(name, array) for name, array in batch.items()}


def gradients(
    task: Task, params: Params, batch: Batch, key: jax.Array, *, accumulation: int, mesh: Mesh
) -> tuple[jax.Array, Params, Metrics]:
    """(loss, gradients, metric sums) of one global batch, in `accumulation` sequential parts of it.

    What is random is keyed by row, fold_in(key, row of the global batch), and so the same in any number of parts.
    """
    rows = next(iter(batch.values())).shape[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))

    def objective(params: Params, batch: Batch, keys: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        loss, weight, metrics = task.loss(params, batch, keys)
        return loss, (weight, metrics)

    places = shardings(mesh, task.logical_axes(params), params)
    part = jax.value_and_grad(objective, has_aux=True)

    def summed(batch: Batch, keys: jax.Array) -> Any:
        (loss, (weight, metrics)), grads = part(params, batch, keys)
        # Without this the compiler may keep gradients whole, and the memory that fsdp saves is lost.
        return loss, weight, metrics, jax.lax.with_sharding_constraint(grads, places)

    if accumulation == 1:
        loss, weight, metrics, grads = summed(batch, keys)
    else:
        parts = split_microbatches(batch, accumulation, mesh)
        keys = split_microbatches({"keys": keys}, accumulation, mesh)["keys"]

        def add(total: Any, each: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, summed(*each)), None

        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(summed, *first))
        (loss, weight, metrics, grads), _ = jax.lax.scan(add, zeros, (parts, keys))
    scale = jnp.where(weight > 0, 1.0 / weight, 0.0)  # a batch without weight moves nothing
    return loss * scale, jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), metrics


def squared_norms(grads: Params) -> dict[str, jax.Array]:
    """Sum of squares by leaf, f32 []; by leaf and layer, f32 [L], under `layers`."""

    def one(path: Any, g: jax.Array) -> jax.Array:
        first = 1 if path[0].key == "layers" else 0
        return jnp.sum(jnp.square(g.astype(jnp.float32)), axis=tuple(range(first, g.ndim)))

    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return {jax.tree_util.keystr(path, simple=True, separator="."): one(path, leaf) for path, leaf in leaves}


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    clip_norm: float = 0.0,
    accumulation: int = 1,
) -> jax.stages.Wrapped:
    """The jitted (state, batch) -> (state, report). State is donated; the key of step s is fold_in(key(seed), s)."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads, values = gradients(task, state.params, batch, key, accumulation=accumulation, mesh=mesh)
        squares = squared_norms(grads)
        norm = jnp.sqrt(sum(jnp.sum(s) for s in squares.values()))
        leaves = {name: jnp.isfinite(s) for name, s in squares.items()}
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        if clip_norm:
            shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: (g * shrink).astype(g.dtype), grads)
        updates, optimizer = tx.update(grads, state.optimizer, state.params)
        moved = (optax.apply_updates(state.params, updates), optimizer)
        params, optimizer = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), moved, (state.params, state.optimizer)
        )
        return TrainState(state.step + 1, params, optimizer), StepReport(values, loss, norm, finite, leaves)

    places = jax.tree.map(lambda x: x.sharding, abstract_state(task, tx, mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, NamedSharding(mesh, P())))


def make_eval_step(task: Task, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted (params, batch) -> metric sums of a held-out batch: no dropout, no gradient."""
    return jax.jit(lambda params, batch: task.loss(params, batch, None)[2], out_shardings=NamedSharding(mesh, P()))
