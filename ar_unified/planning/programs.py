"""The programs of a job as they would run. They are traced from the real code, placed on a mesh and compiled, but never
executed.

Axes: B batch, T position, R requests, P prompt, S cache length, L layers.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ar_unified.data.batch import PackedBatch, PreferenceBatch
from ar_unified.language.automaton import Opened, Wanted
from ar_unified.language.grammar import Grammar
from ar_unified.language.spans import spans
from ar_unified.language.syntax import ImageLayout
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model import transformer
from ar_unified.model.config import TransformerConfig, offloaded_bytes
from ar_unified.model.lora import LoraConfig
from ar_unified.parallel.compiler import compiler_options
from ar_unified.parallel.rules import batch_shardings, on_mesh
from ar_unified.sampling import pairs, steps, window
from ar_unified.sampling.head import Weights
from ar_unified.sampling.pace import Pace
from ar_unified.sampling.prompts import KEPT, prefill_rows
from ar_unified.sampling.weights import read_as
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.policy import PolicyBatch, PolicyConfig, PolicyTask
from ar_unified.training.preference import PreferenceConfig, PreferenceTask
from ar_unified.training.step import abstract_state, abstract_trained, make_train_step
from ar_unified.training.tasks import TransformerTask


@dataclasses.dataclass(frozen=True)
class Run:
    """The part of a config that determines its programs and their cost.

    Attributes:
      model, vocabulary, layout: the model that is trained and sampled, and its ids.
      mesh: the size of each axis; one may be -1, which means the devices that are left.
      batch_size, sequence_length, accumulation: packed rows per step on all devices together; tokens per row;
        microbatches per step.
      loss_chunk: the number of positions for which a device has logits in memory at one time.
      softmax: one of language.syntax.SOFTMAXES.
      document: tokens in the longest document, for the FLOPs of attention.
      optimizer, steps, compiler_options: settings of the training.
      only: what is trained, as places for training.selection.select; () means everything.
      lora: the adapter that is trained instead of everything; None if there is none.
      preference: settings of training on preference pairs; None for other training.
      policy: settings of training by rewards; None for other training.
      drawn_contexts: contexts per answer; 2 if answers are drawn with guidance.
      requests, max_length, contexts: samples that a process decodes at once; the length of the KV cache; contexts per
        sample, 2 with guidance.
      kv_dtype: the dtype of the KV cache, one of sampling.engine.KV_DTYPES.
      weights_dtype: the dtype of the layers' matrices in sampling, one of sampling.weights.WEIGHT_DTYPES.
      window: one of sampling.pace.WINDOWS; "auto" is planned as the widest.
    """

    model: TransformerConfig
    vocabulary: Vocabulary
    layout: ImageLayout
    mesh: Mapping[str, int]
    batch_size: int
    sequence_length: int
    accumulation: int = 1
    loss_chunk: int = 1024
    softmax: str = "joint"
    document: int = 1024
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 100_000
    only: tuple[str, ...] = ()
    lora: LoraConfig | None = None
    preference: PreferenceConfig | None = None
    compiler_options: tuple[str, ...] = ()
    policy: PolicyConfig | None = None
    drawn_contexts: int = 1
    requests: int = 64
    max_length: int = 4096
    contexts: int = 1
    kv_dtype: str | None = None
    weights_dtype: str | None = None
    window: str = "1"


class OutOfMemory(Exception):
    """The program needs too much memory. The message is the compiler's. `used` and `capacity` are the bytes that the
    message states; None if it states none.
    """

    def __init__(self, message: str):
        super().__init__(message.splitlines()[0])
        said = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
        said = said or re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
        sizes = [float(said[i]) * 1024 ** " KMGT".index(said[i + 1] or " ") for i in (1, 3)] if said else [None, None]
        self.used, self.capacity = sizes


@dataclasses.dataclass(frozen=True)
class Compiled:
    """
    Attributes:
      hlo: the text of the optimised module.
      arguments, outputs, aliased, temporaries, code: bytes per device, as the compiler counts them.
      host: bytes of host memory per device.
      seconds: how long the compilation took.
    """

    hlo: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    host: int
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes of a device's memory that the program needs. An output that is stored in place of an argument counts
        once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function and its arguments.

    Attributes:
      name: "train", "prefill" or "decode".
      arguments: trees of ShapeDtypeStructs with shardings, by name ("parameters", "optimizer", ...).
      held: a tree of the other arrays that are in the devices' memory while it runs.
      options: compiler options (parallel/compiler.py).
    """

    name: str
    mesh: Mesh
    arguments: Mapping[str, Any]
    _trace: Callable[[], Any]
    held: Any = ()
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def local_bytes(self) -> dict[str, int]:
        """Exact bytes of each argument on one device, by arithmetic, without the padding that layouts add."""
        return {name: local_bytes(tree) for name, tree in self.arguments.items()}

    def lower(self) -> jax.stages.Lowered:
        """Traces the program for the devices of the mesh, without compiling it."""
        platform = self.mesh.devices.flat[0].platform
        with jax.set_mesh(self.mesh):
            return self._trace().lower(lowering_platforms=(platform,))

    def compile(self) -> Compiled:
        """Compiles the program. Raises OutOfMemory if the compiler finds that it does not fit."""
        start = time.perf_counter()
        lowered = self.lower()
        with jax.set_mesh(self.mesh):
            try:
                compiled: Any = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" in str(error) and "emory" in str(error):
                    raise OutOfMemory(str(error)) from error
                raise
        stats = compiled.memory_analysis()
        return Compiled(
            compiled.as_text(),
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes,
            stats.alias_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.generated_code_size_in_bytes,
            stats.host_temp_size_in_bytes,
            time.perf_counter() - start,
        )


def local_bytes(tree: Any) -> int:
    """Bytes of a tree of ShapeDtypeStructs on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def programs(run: Run, mesh: Mesh, job: str) -> list[Program]:
    """The programs of a job on a mesh. They are traced when they are compiled. Raises ValueError if the mesh does not
    fit the run.
    """
    return [train_program(run, mesh)] if job == "train" else sample_programs(run, mesh)


# ---- training ----------------------------------------------------------------------------------------------------


def make_task(run: Run) -> TransformerTask:
    """The task of the planned training, without data."""
    return _task(run.model, run.vocabulary, run.loss_chunk, *_trained(run))


class _OfTask(NamedTuple):
    """Arguments of the task: where the softmax is split, what is trained, and the settings of preference pairs or of
    the policy gradient.
    """

    split: int | None
    only: tuple[str, ...]
    lora: LoraConfig | None
    preference: PreferenceConfig | None
    policy: PolicyConfig | None


def _trained(run: Run) -> _OfTask:
    split = run.layout.split(run.vocabulary, run.softmax)
    return _OfTask(split, run.only, run.lora, run.preference, run.policy)


def _task(
    model: TransformerConfig,
    vocabulary: Vocabulary,
    chunk: int,
    split: int | None,
    only: tuple[str, ...],
    lora: LoraConfig | None,
    preference: PreferenceConfig | None,
    policy: PolicyConfig | None,
) -> TransformerTask:
    def no_batch(step: int, index: int = 0, count: int = 1) -> Any:
        raise RuntimeError("a plan has no data")

    settings: dict[str, Any] = dict(split=split, chunk=chunk, only=only, lora=lora)
    if policy is not None:
        return PolicyTask(model, vocabulary, no_batch, policy=policy, **settings)
    if preference is not None:
        return PreferenceTask(model, vocabulary, no_batch, preference=preference, **settings)
    return TransformerTask(model, vocabulary, no_batch, **settings)


class _Rows(NamedTuple):
    """What the rows of a batch contain.

    Attributes:
      pairs: preference pairs per row if all documents have the longest length; 0 if there are no pairs.
      contexts, ranges: the number of contexts per drawn answer, and the number of ranges of ids from which a token is
        drawn; 0 if nothing is drawn.
      old: whether the batch includes the log-probabilities under the policy that drew the answers.
    """

    rows: int
    length: int
    pairs: int = 0
    contexts: int = 0
    ranges: int = 0
    old: bool = False


def _rows(run: Run, rows: int) -> _Rows:
    if run.policy is not None:
        contexts, ranges = _drawn(run)
        return _Rows(rows, run.sequence_length, contexts=contexts, ranges=ranges, old=run.policy.steps > 1)
    pairs = 0 if run.preference is None else max(1, run.sequence_length // (2 * run.document))
    return _Rows(rows, run.sequence_length, pairs)


def _batch(
    of: _Rows,
) -> PackedBatch[jax.ShapeDtypeStruct] | PreferenceBatch[jax.ShapeDtypeStruct] | PolicyBatch[jax.ShapeDtypeStruct]:
    if of.contexts:
        return PolicyBatch.shapes(of.rows, of.length, of.contexts, of.ranges, old=of.old)
    if of.pairs:
        return PreferenceBatch.shapes(of.rows, of.length, of.pairs)
    return PackedBatch.shapes(of.rows, of.length)


def _drawn(run: Run) -> tuple[int, int]:
    """The number of contexts per answer, and the number of ranges of ids from which a token is drawn."""
    machine = _grammar(run).automaton
    state = jax.eval_shape(lambda: machine.resume(Opened(jnp.zeros(1, jnp.int32)), Wanted()))
    return run.drawn_contexts, jax.eval_shape(partial(spans, machine), state).shape[1]


def train_program(run: Run, mesh: Mesh) -> Program:
    """The real training step for a mesh, with abstract arguments. It is ready to compile; nothing is run."""
    task, tx = make_task(run), make_optimizer(run.optimizer, run.steps)
    # `abstract_state` and `make_train_step` run small programs. They must not see the mesh, because nothing can run on
    # it.
    state = abstract_state(task, tx, mesh)
    options = compiler_options(mesh, run.compiler_options, task.products)
    step = make_train_step(
        task,
        tx,
        mesh,
        seed=0,
        clip_norm=run.optimizer.clip_norm,
        accumulation=run.accumulation,
        compiler_options=options,
    )
    shapes = _batch(_rows(run, run.batch_size))
    batch = on_mesh(shapes, batch_shardings(mesh, shapes))
    arguments = {"parameters": state.params, "optimizer": (state.step, state.optimizer), "batch": batch}
    if state.model_state:
        arguments["reference"] = state.model_state
    held = _resident(run, mesh) if run.policy is not None else ()
    return Program("train", mesh, arguments, lambda: step.trace(state, batch), held, options)


def _resident(run: Run, mesh: Mesh) -> Any:
    """The sampler's weights. In training by rewards, each process keeps these weights on its devices, together with the
    trained parameters."""
    axes = dict(data=mesh.size // mesh.shape["tensor"], fsdp=1, tensor=mesh.shape["tensor"], context=1)
    sampler = Mesh(mesh.devices.reshape([axes[name] for name in mesh.axis_names]), mesh.axis_names)
    params = transformer.abstract_params(run.model)
    weights = _prepared(run, _grammar(run), params, sampler)
    specs = steps.weight_specs(sampler, weights)
    return on_mesh(weights, jax.tree.map(lambda spec: NamedSharding(sampler, spec), specs))


def _prepared(run: Run, grammar: Grammar, params: transformer.Params, mesh: Mesh) -> Weights:
    """Shapes and dtypes of the sampler's weights. On a TPU, some are larger than in the model."""
    with jax.set_mesh(mesh):
        return jax.eval_shape(partial(steps.prepare, run.model, grammar, run.weights_dtype), params)


def gradient_bytes(run: Run, mesh: Mesh) -> int:
    """Bytes of the gradients of all trained parameters, on one device."""
    task = make_task(run)
    return local_bytes(abstract_trained(task, jax.eval_shape(lambda: task.init(jax.random.key(0))), mesh))


def saved_for_backward(run: Run, mesh: Mesh) -> int:
    """Bytes that a device keeps from the forward pass for the backward pass; parameters do not count.

    JAX's trace gives the arrays that `jax.vjp` of the loss closes over. They are divided among the devices that split
    rows and sequence. XLA may drop or share some; with remat "full" there is little to drop. Arrays that a remat policy
    sends to the host are not counted.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
    rows = run.batch_size // run.accumulation
    return _saved(_rows(run, rows), run.model, run.vocabulary, run.loss_chunk, *_trained(run)) // ways


@lru_cache(maxsize=256)  # cached, because a search needs it for every mesh
def _saved(of: _Rows, model: TransformerConfig, *of_task: Any) -> int:
    """The bytes of `saved_for_backward`, for all devices together. of_task: the other arguments of `_task`."""
    task = _task(model, *of_task)
    batch = _batch(of)
    params = jax.eval_shape(task.init, jax.random.key(0))
    selection, model_state = task.selection(params), jax.eval_shape(task.init_state, params)

    def residuals(params: Any, model_state: Any, batch: Any) -> Any:
        def loss(trained: Any) -> jax.Array:
            return task.loss(selection.put(params, trained), model_state, batch, None)[0]

        return jax.vjp(loss, selection.take(params))[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, params, model_state, batch))
    known = {(x.shape, x.dtype) for x in jax.tree.leaves(params)}
    # A residual without the axis of rows is a parameter, perhaps cast to another dtype. It is counted elsewhere.
    per_row = [x for x in kept if (x.shape, x.dtype) not in known and x.size % of.rows == 0 and of.rows in x.shape]
    offloaded = of.rows * of.length * offloaded_bytes(model) if task.through_layers else 0
    return sum(x.size * x.dtype.itemsize for x in per_row) - offloaded


# ---- sampling ----------------------------------------------------------------------------------------------------


class _Spelling:
    """Stands in for a text tokenizer if a layout writes its marks as text. Its ids do not matter, because compiled code
    never turns text into ids."""

    def __init__(self, size: int):
        self.size = size

    def encode(self, text: str) -> list[int]:
        return [string.printable.index(character) % self.size for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(string.printable[id] for id in ids)


def _grammar(run: Run) -> Grammar:
    return Grammar(run.vocabulary, run.layout, _Spelling(run.vocabulary.text_size))


def sample_programs(run: Run, mesh: Mesh) -> list[Program]:
    """Returns two programs: prefill of as many prompts as the engine reads at once, each half as long as the cache, and
    decode with a full pool.

    The engine keeps the weights that it reads in memory, and also the whole head (for scores) and the prompts that it
    has read. The pool stays in memory while prompts are read (sampling/engine.py).
    """
    config, R, S = run.model, run.requests, run.max_length
    if R < 1 or S < 2:
        raise ValueError(f"sampling: expected batch_size >= 1 and max_length >= 2, found {R} and {S}")
    grammar = _grammar(run)

    def placed(tree: Any, specs: Any) -> Any:
        return on_mesh(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))

    def by_row(tree: Any) -> Any:
        return placed(tree, steps.row_specs(mesh, tree))

    params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    weights = _prepared(run, grammar, params, mesh)
    weights = placed(weights, steps.weight_specs(mesh, weights))
    head = {name: read_as(config, mesh)[name] for name in ("head",) if name in params}
    shape = steps.Shape(run.contexts, S)
    width = Pace(run.window).most
    state = by_row(jax.eval_shape(lambda: steps.empty(config, grammar, shape, R, run.kv_dtype or config.dtype, width)))
    b = prefill_rows(R, mesh.shape["data"] * mesh.shape["fsdp"])
    prompts = by_row((jax.ShapeDtypeStruct((b, S // 2), jnp.int32), jax.ShapeDtypeStruct((b,), jnp.int32)))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, jax.P()))
    table = jax.ShapeDtypeStruct((pairs.SIZE,), jnp.int32, sharding=NamedSharding(mesh, jax.P()))
    chunk = by_row(jax.ShapeDtypeStruct((R,), jnp.bool_)), count, *([table] if width > 1 else [])
    prefill = jax.jit(partial(steps.prefill, config))
    one, several = partial(steps.decode_chunk, config, grammar), partial(window.decode_chunk, config, grammar, width)
    decode = jax.jit(one if width == 1 else several, donate_argnums=1)
    rows = state._replace(cache=None)
    layers = weights._replace(text=None, image=None)
    prefix = by_row(jax.eval_shape(partial(steps.prefill, config), layers, *prompts))
    return [
        Program(
            "prefill",
            mesh,
            {"parameters": weights.layers, "requests": prompts},
            lambda: prefill.trace(layers, *prompts),
            (head, weights.text, weights.image, state, [prefix] * (KEPT - 1)),
        ),
        Program(
            "decode",
            mesh,
            {"parameters": weights, "cache": state.cache, "requests": (rows, chunk)},
            lambda: decode.trace(weights, state, *chunk),
            (head, [prefix] * KEPT),
        ),
    ]
