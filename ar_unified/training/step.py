"""One training step: (state, batch) -> (state, metrics), compiled once for a mesh.

The loss of a step is sum(weight * loss) / sum(weight) over the whole global batch, across microbatches and devices. So
neither the mesh nor the accumulation changes the objective (the weight of a row depends on its tokens and is not
1/rows). If the gradient is not finite, the step changes nothing and names the leaf and layer at fault.

A task may have several losses, each of which trains its own group of parameters, as for an autoencoder and its
discriminator. Then there is one forward pass, and one backward pass per loss (as in MAGVIT, google-research/magvit).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from ar_tokenizers.trees import Metrics, Totals
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath

from ar_unified.parallel.rules import batch_spec, on_mesh, shardings
from ar_unified.tensors import Params
from ar_unified.training.optimizer import state_shardings
from ar_unified.training.rates import UNIFORM, Rates
from ar_unified.training.selection import EVERYTHING, Selection

# A pytree of jax.Arrays [B, ...]: a batch of data.batch, a PolicyBatch, or {"pixels"}.
Batch = TypeVar("Batch")
Made = TypeVar("Made", covariant=True)  # such a batch, of numpy arrays if it is loaded, of jax.Arrays if it is drawn
Losses: TypeAlias = jax.Array | dict[str, jax.Array]
Parts: TypeAlias = tuple[Losses, jax.Array, Metrics, Params]  # losses, weight, metrics, gradients
Sums = TypeVar("Sums")  # a pytree of sums over the rows of a batch

STATISTICS = "statistics"
STACKED = ("layers", "lora")  # top-level keys of parameters with a first axis of layers


class BatchOfStep(Protocol[Made]):
    """Makes the batch of a step. It is a pure function of the step."""

    def __call__(self, step: int, index: int = 0, count: int = 1, /) -> Made:
        """Divides the rows of the global batch into `count` equal parts, and returns part `index`."""


class Drawing(abc.ABC, Generic[Made]):
    """Batches of samples that are drawn from the model. The batch of a step is a function of (data, seed, step,
    parameters).

    Attributes:
      every: the number of steps for which samples are drawn at once. A run can only be resumed at the first of them.
    """

    every: int

    @abc.abstractmethod
    def __call__(self, step: int, params: Params) -> Made:
        """The batch of a step on the mesh. At the first of `every` steps, it draws from the model with the parameters
        before this step. All processes call it at the same time.
        """


class TrainingTask(Protocol[Batch]):
    """What is trained: a model, its loss, its data, and the metrics of a step (training/tasks.py).

    Metrics are sums, never means. A (sum, count) pair is divided after it was summed over microbatches, devices and
    steps. A single array is a plain sum (a count of tokens, a histogram of codes). The sums in the dict STATISTICS are
    only for `update_state` and are not reported.

    `model_state` contains values that no gradient changes: averaged weights, statistics of a codebook.
    """

    @property
    def name(self) -> str:
        """The name of what is trained, for messages and file names."""

    @property
    def unit(self) -> str:
        """The metric that counts work: "tokens" or "images"."""

    @property
    def products(self) -> str | None:
        """The dtype of a transformer's matrix products (parallel/compiler.py); None for other models."""

    @property
    def batch(self) -> BatchOfStep[object] | Drawing[object]:
        """A function that gives the global batch of a step or a part of it; or a `Drawing`, which also uses the
        parameters."""

    @property
    def validation(self) -> Sequence[object]:
        """Held-out batches, always the same. They may be numpy arrays, like the batches from `batch`."""

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""

    def logical_axes(self, params: Params) -> Params:
        """A tree like params, of tuples of logical axis names (parallel/rules.py)."""

    def selection(self, params: Params) -> Selection:
        """Which parameters are trained. params: the parameters, or only their shapes."""

    def rates_of(self, params: Params) -> Rates:
        """How fast each part is trained, and in which steps."""

    def init_state(self, params: Params) -> Params:
        """The model state before the first step."""

    def state_axes(self, params: Params, model_state: Params) -> Params:
        """A tree like model_state, of tuples of logical axis names. params: the parameters of this state, or their
        shapes.
        """

    def of_whole(self, batch: Batch) -> TrainingTask[Batch]:
        """A copy of this task that contains facts about the whole global batch. `loss` needs these facts if it gets
        only a part of the batch. If it gets the whole batch, it finds them itself.
        """

    def loss(
        self, params: Params, model_state: Params, batch: Batch, keys: jax.Array | None
    ) -> tuple[Losses, jax.Array, Metrics]:
        """(sum of weight * loss, sum of weight, metric sums). keys [B]: one for each row; None: held-out data, no
        dropout.

        Several losses are a dict. The key of a loss is the top-level key of the parameters that it trains.
        """

    def update_state(self, params: Params, model_state: Params, sums: Params) -> tuple[Params, Params]:
        """(params, model_state) after the optimizer has updated `params`. sums: the step's sums under STATISTICS."""

    def inference_params(self, params: Params, model_state: Params) -> Params:
        """The parameters for validation, previews and later use: the trained ones, or their averages."""

    def inspect(self, params: Params, model_state: Params, batch: Batch) -> Metrics:
        """Metric sums of a held-out batch, from an extra pass, because the loss does not compute them. {} if there are
        none.
        """

    def warning(self, line: Mapping[str, float]) -> str:
        """A warning about a log line (the `summary` of some steps), or ""."""

    def summary(self, totals: Totals) -> dict[str, float]:
        """The numbers to log, from metric sums on the host."""

    def flops(self, totals: Totals) -> float | None:
        """Matrix-multiply FLOPs of training for the work that `totals` counts; None if not known."""

    def describe(self) -> dict[str, object]:
        """JSON for the checkpoint, from which the model can be built again."""


class Stateless(Generic[Batch]):
    """A base class for tasks that have no model state and whose loss is a sum over rows."""

    @property
    def products(self) -> str | None:
        """No transformer."""
        return None

    def of_whole(self, batch: Batch) -> Self:
        """Returns the task itself, because the loss of a part of a batch does not depend on the whole batch."""
        return self

    def selection(self, params: Params) -> Selection:
        """Everything is trained."""
        return EVERYTHING

    def rates_of(self, params: Params) -> Rates:
        """All parameters have the same rate."""
        return UNIFORM

    def init_state(self, params: Params) -> Params:
        """No state: {}."""
        return {}

    def state_axes(self, params: Params, model_state: Params) -> Params:
        """No state, so no axes: {}."""
        return {}

    def update_state(self, params: Params, model_state: Params, sums: Params) -> tuple[Params, Params]:
        """Changes nothing."""
        return params, model_state

    def inference_params(self, params: Params, model_state: Params) -> Params:
        """The parameters themselves."""
        return params

    def inspect(self, params: Params, model_state: Params, batch: Batch) -> Metrics:
        """No further metrics: {}."""
        return {}

    def warning(self, line: Mapping[str, float]) -> str:
        """No warning: ""."""
        return ""


class TrainState(NamedTuple):
    """The whole state of a run. The data is a function of `step`, so a restored state resumes exactly."""

    step: jax.Array  # i32 [], steps taken
    params: Params
    optimizer: optax.OptState  # for the trained part
    model_state: Params  # the task's values that no gradient changes


class StepReport(NamedTuple):
    """What one step reports. `values`: sums, (sum, count) pairs and histograms. The other fields detect NaN."""

    values: Metrics
    loss: jax.Array  # f32 []; the sum if there are several
    grad_norm: jax.Array  # f32 [], before clipping
    finite: jax.Array  # bool []; False: the step changed nothing
    finite_leaves: dict[str, jax.Array]  # for each leaf: bool [], or bool [L] for stacked layers


def make_state(
    task: TrainingTask[Batch], tx: optax.GradientTransformation, seed: int, params: Params | None = None
) -> TrainState:
    """The state before the first step, with fresh or given parameters. Jittable, and the same on every mesh."""
    params = task.init(jax.random.key(seed)) if params is None else params
    model_state = jax.tree.map(jnp.copy, task.init_state(params))  # no shared buffers, because the state is donated
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(task.selection(params).take(params)), model_state)


def abstract_trained(task: TrainingTask[Batch], params: Params, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings on `mesh` of the trained part. params: the parameters, or only their shapes."""
    selection = task.selection(params)
    shapes = jax.eval_shape(selection.take, params)
    return on_mesh(shapes, shardings(mesh, selection.axes(task.logical_axes(params)), shapes))


def abstract_state(task: TrainingTask[Batch], tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on `mesh`; nothing is allocated."""
    shapes = jax.eval_shape(lambda: make_state(task, tx, 0))
    whole = NamedSharding(mesh, P())
    params = shardings(mesh, task.logical_axes(shapes.params), shapes.params)
    model_state = shardings(mesh, task.state_axes(shapes.params, shapes.model_state), shapes.model_state)
    trained = abstract_trained(task, shapes.params, mesh)
    moments = state_shardings(tx, trained, jax.tree.map(lambda x: x.sharding, trained), whole)
    placement = TrainState._make((whole, params, moments, model_state))
    return on_mesh(shapes, placement)


def split_microbatches(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """Reshapes [B, ...] to [count, B / count, ...]; microbatch i has rows i, i + count, ...

    A device holds consecutive rows, so with this stride each microbatch is on all devices and no row is moved.
    """

    def split(path: KeyPath, array: jax.Array) -> jax.Array:
        rows = array.shape[0]
        if rows % count:
            raise ValueError(
                f"batch of {rows} rows does not split into {count} microbatches; "
                f"choose an accumulation that divides {rows}"
            )
        array = array.reshape(rows // count, count, *array.shape[1:]).swapaxes(0, 1)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        where = P(None, *batch_spec(mesh, array.shape[1:], f"microbatch[{name!r}]"))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, where))

    return jax.tree_util.tree_map_with_path(split, batch)


def _in_microbatches(summed: Callable[[Batch], Sums], batch: Batch, count: int, mesh: Mesh) -> Sums:
    """The sums `summed(batch)`, computed one after another from `count` parts of the batch, so that only one part needs
    memory at a time.
    """
    if count == 1:
        return summed(batch)
    parts = split_microbatches(batch, count, mesh)

    def add(total: Sums, each: Batch) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, summed(each)), None

    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(summed, first))
    return jax.lax.scan(add, zeros, parts)[0]


def gradients(
    task: TrainingTask[Batch],
    params: Params,
    model_state: Params,
    batch: Batch,
    key: jax.Array,
    *,
    accumulation: int,
    mesh: Mesh,
) -> tuple[Losses, Params, Metrics]:
    """Returns (loss or losses, gradients of the trained part, metric sums) of one global batch, computed in
    `accumulation` sequential parts.

    Each row has its own random key, fold_in(key, row of the global batch), so the random numbers do not depend on
    `accumulation`.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))

    task = task.of_whole(batch)
    selection = task.selection(params)
    trained = selection.take(params)
    placement = jax.tree.map(lambda x: x.sharding, abstract_trained(task, params, mesh))

    def summed(batch: Batch, keys: jax.Array) -> Parts:
        def objective(trained: Params) -> tuple[Losses, tuple[jax.Array, Metrics]]:
            loss, weight, metrics = task.loss(selection.put(params, trained), model_state, batch, keys)
            return loss, (weight, metrics)

        loss, pull_back, (weight, metrics) = jax.vjp(objective, trained, has_aux=True)
        if isinstance(loss, dict):
            one = {name: jnp.ones_like(value) for name, value in loss.items()}
            none = jax.tree.map(jnp.zeros_like, one)
            grads = {name: pull_back(none | {name: one[name]})[0][name] for name in trained}
        else:
            (grads,) = pull_back(jnp.ones_like(loss))
        # Without the constraint, the compiler may not shard the gradients, and the memory that fsdp saves is lost.
        return loss, weight, metrics, jax.lax.with_sharding_constraint(grads, placement)

    loss, weight, metrics, grads = _in_microbatches(lambda part: summed(*part), (batch, keys), accumulation, mesh)
    scale = jnp.where(weight > 0, 1.0 / weight, 0.0)  # a batch without weight changes nothing
    loss, grads = jax.tree.map(lambda x: (x * scale).astype(x.dtype), (loss, grads))
    return loss, grads, metrics


def squared_norms(grads: Params) -> dict[str, jax.Array]:
    """The sum of squares of each leaf, f32 []; under `layers` and `lora`, of each leaf and layer, f32 [L]."""

    def one(path: KeyPath, g: jax.Array) -> jax.Array:
        first = 1 if path[0].key in STACKED else 0
        return jnp.sum(jnp.square(g.astype(jnp.float32)), axis=tuple(range(first, g.ndim)))

    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return {jax.tree_util.keystr(path, simple=True, separator="."): one(path, leaf) for path, leaf in leaves}


def clipped(grads: Params, norm: jax.Array, largest: float) -> Params:
    """Gradients with the given norm, scaled down so that the norm is at most `largest`."""
    shrink = jnp.minimum(1.0, largest / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: (g * shrink).astype(g.dtype), grads)


def make_train_step(
    task: TrainingTask[Batch],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    clip_norm: float = 0.0,
    accumulation: int = 1,
    compiler_options: Mapping[str, str] | None = None,
) -> jax.stages.Wrapped:
    """The jitted function (state, batch) -> (state, report). State is donated. The key of step s is fold_in(key(seed),
    s).

    compiler_options: options from parallel/compiler.py for the devices of the mesh.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads, values = gradients(
            task, state.params, state.model_state, batch, key, accumulation=accumulation, mesh=mesh
        )
        statistics = values.pop(STATISTICS, {})
        assert isinstance(statistics, dict)
        rates = task.rates_of(state.params)
        grads = rates.moving(grads, state.step)
        squares = squared_norms(grads)
        norm = jnp.sqrt(sum(jnp.sum(s) for s in squares.values()))
        leaves = {name: jnp.isfinite(s) for name, s in squares.items()}
        if clip_norm and isinstance(loss, dict):  # the group of each loss is clipped by its own norm
            grads = {name: clipped(part, optax.global_norm(part), clip_norm) for name, part in grads.items()}
        elif clip_norm:
            grads = clipped(grads, norm, clip_norm)
        total = jnp.sum(jnp.stack(jax.tree.leaves(loss)))
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        selection = task.selection(state.params)
        trained = selection.take(state.params)
        updates, optimizer = tx.update(grads, state.optimizer, trained)
        updates = rates.scaled(updates, state.step)
        params = selection.put(state.params, optax.apply_updates(trained, updates))
        params, model_state = task.update_state(params, state.model_state, statistics)
        moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, optimizer, model_state), state[1:])
        return TrainState(state.step + 1, *moved), StepReport(values, total, norm, finite, leaves)

    placement = jax.tree.map(lambda x: x.sharding, abstract_state(task, tx, mesh))
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(placement, NamedSharding(mesh, P())),
        compiler_options=dict(compiler_options or {}),
    )


def make_eval_step(task: TrainingTask[Batch], mesh: Mesh, accumulation: int = 1) -> jax.stages.Wrapped:
    """The jitted function (params, model_state, batch) -> metric sums of a held-out batch, without dropout or
    gradients. `accumulation`: as in `_measured`.
    """

    def measure(task: TrainingTask[Batch], params: Params, model_state: Params, batch: Batch) -> Metrics:
        values = task.loss(params, model_state, batch, None)[2]
        return {name: value for name, value in values.items() if name != STATISTICS}

    return _measured(measure, task, mesh, accumulation)


def make_inspection(task: TrainingTask[Batch], mesh: Mesh, accumulation: int = 1) -> jax.stages.Wrapped:
    """The jitted function (params, model_state, batch) -> metric sums of `task.inspect`. `accumulation`: as in
    `_measured`.
    """
    return _measured(lambda task, *given: task.inspect(*given), task, mesh, accumulation)


def _measured(
    measure: Callable[[TrainingTask[Batch], Params, Params, Batch], Metrics],
    task: TrainingTask[Batch],
    mesh: Mesh,
    accumulation: int,
) -> jax.stages.Wrapped:
    """The jitted function (params, model_state, batch) -> metric sums that `measure` finds with the parameters for
    inference.

    accumulation: the number of parts in which a batch is read, as in training, so that a validation needs no more
        memory than a step. A batch that has too few rows for so many parts is read in fewer. The means differ only by
        rounding, except for losses that depend on all rows of a microbatch together.
    """

    def measured(params: Params, model_state: Params, batch: Batch) -> Metrics:
        params, whole = task.inference_params(params, model_state), task.of_whole(batch)
        count = math.gcd(accumulation, jax.tree.leaves(batch)[0].shape[0])
        return _in_microbatches(lambda part: measure(whole, params, model_state, part), batch, count, mesh)

    return jax.jit(measured, out_shardings=NamedSharding(mesh, P()))
