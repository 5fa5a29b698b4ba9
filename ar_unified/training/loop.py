"""The one training loop, for every task. Read it once from top to bottom.

A run is a folder, and `fit` continues what it finds there. If training has finished, it only returns the parameters. An
interrupted training continues from its last checkpoint. It ends with the same parameters as without the interruption
(bit for bit in fp32 on a CPU): the state contains everything except the data, and the data is a function of the step.
Every process of a job runs this loop. Only process 0 writes the shared files and prints.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ar_tokenizers.trees import Totals
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ar_unified import interrupts
from ar_unified.checkpoint import Checkpoints
from ar_unified.errors import RunError, outside
from ar_unified.interrupts import Interrupted, Preempted
from ar_unified.metrics import VALIDATION, VALIDATION_LOSS, losses_of, read_metrics, turned
from ar_unified.parallel import runtime
from ar_unified.parallel.compiler import compiler_options
from ar_unified.parallel.rules import batch_part, place_batch
from ar_unified.training import goodput
from ar_unified.training.divergence import Watch
from ar_unified.training.kept import Kept
from ar_unified.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from ar_unified.training.profiler import Profiler
from ar_unified.training.step import (
    STACKED,
    Batch,
    Drawing,
    Params,
    StepReport,
    TrainingTask,
    TrainState,
    abstract_state,
    make_eval_step,
    make_inspection,
    make_state,
    make_train_step,
)
from ar_unified.training.telemetry import (
    Meter,
    Telemetry,
    Warnings,
    console_line,
    device_memory,
    peak_flops,
    straggler,
)

Preview = Callable[[int, Params], Mapping[str, np.ndarray] | None]


_INTERVALS = ("log_every", "validate_every", "preview_every", "checkpoint_every", "keep_every")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The length, intervals and seed of training. Intervals are in steps; 0 means never. The last step has a
    checkpoint.

    Raises ValueError, which names the field, if a number is out of range.
    """

    steps: int
    seed: int = 0
    accumulation: int = 1  # microbatches per step
    optimizer: OptimizerConfig = OptimizerConfig()
    compiler_options: tuple[str, ...] = ()  # NAME=VALUE for the training step; they override parallel/compiler.py
    log_every: int = 20
    validate_every: int = 200
    preview_every: int = 0
    checkpoint_every: int = 200
    keep: int = 3  # how many of the newest checkpoints are kept
    keep_every: int = 0  # also keeps the checkpoint of every keep_every steps; a multiple of checkpoint_every; 0: none
    keep_best: bool = True  # also keep the one with the lowest validation loss; it is saved at once

    def __post_init__(self) -> None:
        whole = dict.fromkeys(("steps", "accumulation", "keep"), "[1, inf)")
        if problems := outside(self, **whole, **dict.fromkeys(_INTERVALS, "[0, inf)")):
            raise ValueError(problems[0])
        for option in self.compiler_options:
            if not all(option.partition("=")):
                raise ValueError(f"compiler_options: expected NAME=VALUE, as in xla_foo=true; found {option!r}")
        if self.keep_every and (self.checkpoint_every < 1 or self.keep_every % self.checkpoint_every):
            raise ValueError(
                f"keep_every: expected a multiple of checkpoint_every, which is {self.checkpoint_every}, "
                f"found {self.keep_every}"
            )


class NonFinite(RunError):
    """A step had a loss or gradient that is not finite. The step changed no parameters, and training stopped."""


def fit(
    task: TrainingTask[Batch],
    config: TrainingConfig,
    folder: str | Path,
    *,
    mesh: Mesh,
    manifest: Mapping[str, Any] | None = None,
    preview: Preview | None = None,
    checkpoint_folder: str | Path | None = None,
    begin: Callable[[Params], Params] | None = None,
    kept_elsewhere: bool = False,
    profile: tuple[int, int] | None = None,
    logger: Callable[[str], Any] = runtime.say,
) -> Params:
    """Trains `task` to `config.steps` in `folder` and returns the parameters on `mesh`.

    Args:
      manifest: the vocabulary's manifest. It is stored in every checkpoint, and a checkpoint with another manifest is
        refused.
      preview: called with (steps taken, params); returns images, uint8 [H, W, 3], for TensorBoard. In a job of many
        processes, process 0 calls it with the parameters as numpy arrays.
      checkpoint_folder: the folder of checkpoints, or a URL such as gs://bucket/run; default: `folder`/checkpoints.
      begin: called before the first step with the shapes, dtypes and shardings of the parameters; returns the
        parameters to start from. None: fresh parameters.
      kept_elsewhere: if True, `begin` provides the untrained parameters at every start, and checkpoints store only the
        trained ones.
      profile: (first, last): a trace begins after `first` steps and ends after `last` steps. It is written to
        `folder`/profile. None: no trace.
      logger: receives the console lines.

    Raises NonFinite, divergence.Diverged, Preempted, checkpoint.SaveFailed, manifests.ManifestMismatch,
    checkpoint.CheckpointMismatch.
    """
    folder = Path(folder)
    # ---------------------------------------------------------------------- State: shapes first, then values
    tx = make_optimizer(config.optimizer, config.steps)
    rate = jax.jit(learning_rate(config.optimizer, config.steps))
    abstract = abstract_state(task, tx, mesh)
    checkpoints = Checkpoints(
        checkpoint_folder or folder / "checkpoints",
        keep=config.keep,
        keep_every=config.keep_every,
        keep_best=config.keep_best,
    )
    start = checkpoints.latest() or 0
    runtime.barrier(f"{task.name} from step {start}")  # fails instead of hanging if checkpoints differ
    clock = goodput.Goodput(folder / "goodput.json", start, active=runtime.first())
    finished = start >= config.steps
    kept = Kept(task, mesh, begin if kept_elsewhere else None)
    # A finished run restores only the parameters: the optimizer may now be another, or there may be no room for it.
    if finished and not abstract.model_state:
        params = checkpoints.restore(start, manifest=manifest, params=kept.abstract(abstract.params))["params"]
        state = TrainState(abstract.step, kept.whole(abstract.params, params), abstract.optimizer, {})
    elif start:
        rest, stored = _rest(abstract), kept.abstract(abstract.params)
        found = checkpoints.restore(start, manifest=manifest, params=stored, optimizer=rest)
        model_state, params = found["optimizer"].get("model_state", {}), kept.whole(abstract.params, found["params"])
        state = TrainState(found["optimizer"]["step"], params, found["optimizer"]["state"], model_state)
    else:
        placement = jax.tree.map(lambda x: x.sharding, abstract)
        given = begin(abstract.params) if begin else None
        with jax.set_mesh(mesh):
            made = jax.jit(partial(make_state, task, tx, config.seed), out_shardings=placement, donate_argnums=0)
            state = made(given)
    if finished:
        checkpoints.close()
        logger(f"{task.name}: finished already, {start} of {config.steps} steps")
        return task.inference_params(state.params, state.model_state)
    options = compiler_options(mesh, config.compiler_options, task.products)
    train_step = make_train_step(
        task,
        tx,
        mesh,
        seed=config.seed,
        clip_norm=config.optimizer.clip_norm,
        accumulation=config.accumulation,
        compiler_options=options,
    )
    eval_step = make_eval_step(task, mesh, config.accumulation)
    inspection = make_inspection(task, mesh, config.accumulation)

    # ---------------------------------------------------------------------- Telemetry
    telemetry = Telemetry(folder, resume_step=start, console=logger)
    peak, peak_source = peak_flops()
    alone = jax.process_count() == 1
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
    axes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
    telemetry.say(
        f"{task.name}: {size / 1e6:.2f}M parameters on {axes}; step {start} of {config.steps}; "
        f"peak {peak / 1e12:.3g} TFLOP/s ({peak_source})"
    )
    if selected := task.selection(abstract.params).told(abstract.params):
        telemetry.say(f"{task.name}: {selected}")
    if config.compiler_options:  # our own options mean nothing to most users; a checkpoint's metadata has all of them
        telemetry.say(f"{task.name}: compiled with training.compiler_options {', '.join(config.compiler_options)}")
    meter, warnings = Meter(), Warnings(telemetry.say)
    metrics_file = folder / "metrics.jsonl"
    rows = losses_of(read_metrics(metrics_file, until=start) if start and metrics_file.exists() else ())
    watch, turning, best = Watch(rows), Warnings(telemetry.say), checkpoints.best()
    profiler = Profiler(profile, folder / "profile")

    def good() -> int | None:
        checkpoints.wait()
        return checkpoints.latest()

    def read(taken: int, report: StepReport) -> None:
        """Waits for a dispatched step, checks it, and writes the log line if one is due."""
        values, loss, norm, finite = jax.device_get((report.values, report.loss, report.grad_norm, report.finite))
        if not finite:
            raise NonFinite(_diagnosis(taken, report, float(loss), float(norm), good()))
        meter.add(values | {"grad_norm": (norm, np.float32(1))})
        watch.add(taken - 1, float(values["loss"][0] / max(values["loss"][1], 1e-9)), good)
        if _due(taken, config.log_every, config.steps):
            line = task.summary(meter.totals) | {"learning_rate": float(rate(taken - 1))}
            line |= meter.rates(task.unit, task.flops(meter.totals), peak) | device_memory() | clock.write(taken)
            telemetry.log(taken, line)
            rows.extend(losses_of([line | {"step": taken}]))
            telemetry.say(console_line(taken, config.steps, line, task.unit))
            found = {"task": f"{task.name}: {warning}"} if (warning := task.warning(line)) else {}
            if not alone:
                waits = multihost_utils.process_allgather(np.float32(line["input_seconds"]))
                found |= straggler(waits.tolist(), line["step_seconds"])
            warnings.update(found)
            meter.reset()

    # ---------------------------------------------------------------------- Data: this process's rows of a global batch
    source = task.batch
    every = source.every if isinstance(source, Drawing) else 1  # a run is saved only before new samples are drawn
    part = (0, 1) if isinstance(source, Drawing) else batch_part(mesh, len(jax.tree.leaves(source(start))[0]))
    hand = concurrent.futures.ThreadPoolExecutor(1, "batches")  # prepares the next batch while the devices work

    def fetch(step: int, params: Params) -> concurrent.futures.Future:
        if not isinstance(source, Drawing):
            return hand.submit(lambda: place_batch(mesh, source(step, *part), part))
        drawn: concurrent.futures.Future = concurrent.futures.Future()
        began = time.perf_counter()
        drawn.set_result(source(step, params))  # on this thread, so that all processes run programs in the same order
        meter.waited += time.perf_counter() - began
        clock.add("drawing", time.perf_counter() - began)
        return drawn

    # ---------------------------------------------------------------------- Signals: stop after the current step
    # In a job of many processes, all must agree on the step. JAX's SIGTERM handler and runtime.preempted ensure this.
    listening = contextlib.ExitStack()
    asked = listening.enter_context(interrupts.noted()) if alone else lambda: 0

    # ---------------------------------------------------------------------- Programs: one for each shape of batches
    programs: dict[tuple[tuple[int, ...], ...], Callable[[TrainState, Any], tuple[TrainState, StepReport]]] = {}

    def program(step: int, batch: Any) -> Callable[[TrainState, Any], tuple[TrainState, StepReport]]:
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in programs:
            began = time.perf_counter()
            with clock.during("compile"), jax.set_mesh(mesh):  # set only here, because previews may use other devices
                programs[shapes] = train_step.lower(state, batch).compile()
            new = f" for batches of {' x '.join(map(str, shapes[0]))}" if len(programs) > 1 else ""
            telemetry.say(f"{task.name}: compiled in {time.perf_counter() - began:.1f} s{new}")
            # gloo gives up on a process that reaches the first collective 30 s late
            runtime.barrier(f"compiled for step {step}", timeout=3600)
            meter.skip(began)
        return programs[shapes]

    # ---------------------------------------------------------------------- Steps
    try:
        following = fetch(start, state.params)
        program(start, following.result())
        pending: tuple[int, StepReport] | None = None
        meter.reset()
        for step in range(start, config.steps):
            if profiler.at(step, state):
                telemetry.say(f"{task.name}: steps {profile} are traced in {profiler.folder}")
            waiting = time.perf_counter()
            batch = following.result()
            if pending is None or pending[1].loss.is_ready():  # type: ignore[attr-defined]  # devices were idle
                waited = time.perf_counter() - waiting
                meter.waited += waited
                clock.add("input", waited)
            run = program(step, batch)
            dispatched = time.perf_counter()
            state, report = run(state, batch)
            following = fetch(step + 1, state.params) if step + 1 < config.steps else following
            taken = step + 1
            checkpoints.check()
            # The devices work on this step while the host reads the previous step.
            if pending:
                read(*pending)
                if not meter.steps and report.loss.is_ready():  # type: ignore[attr-defined]
                    meter.started = dispatched  # on a CPU, this step ran before the previous one was read
            pending = (taken, report)

            border = taken % every == 0
            # After a signal only the checkpoint is written, without validation and previews.
            came = border and (asked() or (signal.SIGTERM if runtime.preempted() else 0))
            validate = _due(taken, config.validate_every, config.steps) and len(task.validation) > 0 and not came
            show = _due(taken, config.preview_every, config.steps) and preview is not None and not came
            save = border and (_due(taken, config.checkpoint_every, config.steps) or taken == config.steps or came)
            if not (validate or show or save):
                continue

            # The code below uses the parameters, so they must be checked first.
            read(*pending)
            pending = None
            paused = time.perf_counter()
            if validate:
                with clock.during("validation"), jax.set_mesh(mesh):
                    totals = _held_out(task, eval_step, mesh, state.params, state.model_state)
                    first = place_batch(mesh, task.validation[0])  # only one batch, because this needs an extra pass
                    inspected = jax.device_get(inspection(state.params, state.model_state, first))
                scores = task.summary(totals | inspected)
                telemetry.log(taken, {VALIDATION + name: value for name, value in scores.items()})
                telemetry.say(f"step {taken}/{config.steps}  validation loss {scores['loss']:.4f}")
                validation_loss = _agreed(scores["loss"])
                if config.keep_best and math.isfinite(validation_loss) and (best is None or validation_loss < best[1]):
                    best, save = (taken, validation_loss), True
                rows.append({"step": taken, VALIDATION_LOSS: scores["loss"]})
                ends = taken == config.steps
                words = turned(rows, finished=ends, kept=best[0] if config.keep_best and best else None)
                if words and ends:  # printed after the last step, even if printed before
                    telemetry.say(f"{task.name}: {words}")
                else:
                    turning.update({"turned": f"{task.name}: {words}"} if words else {})
            if show and preview is not None:
                with clock.during("preview"):
                    params = task.inference_params(state.params, state.model_state)
                    params = params if alone else runtime.to_host(params)
                    if runtime.first():
                        telemetry.images(taken, preview(taken, params) or {})
                    runtime.barrier("preview", timeout=3600)
            if save:  # after the lines of this step, so that metrics.jsonl has them once if the run is killed here
                story = {"model": task.describe(), "training": dataclasses.asdict(config), "compiler_options": options}
                with clock.during("checkpoint"):
                    telemetry.keep()  # before the checkpoint, so that a run resumed from it finds all lines
                    checkpoints.save(
                        taken,
                        params=kept.stored(state.params),
                        optimizer=_rest(state),
                        metadata={"manifest": dict(manifest or {}), **story},
                        validation_loss=validation_loss if validate and math.isfinite(validation_loss) else None,
                    )
            if came:
                telemetry.say(
                    f"{task.name}: {Interrupted(came).name}, stopped after step {taken} with a checkpoint; the same "
                    "command continues from there"
                )
                raise Preempted(came)
            meter.skip(paused)
    finally:
        listening.close()
        hand.shutdown(cancel_futures=True)
        profiler.close()
        telemetry.close()
        with clock.during("checkpoint"):
            checkpoints.close()  # waits for the disk; raises if the last save failed
    runtime.barrier("last checkpoint", timeout=runtime.ALONE)  # process 0 may still be copying it to a store
    logger(f"{task.name}: {goodput.describe(clock.write(config.steps, finished=True))}")
    return task.inference_params(state.params, state.model_state)


def held_out_scores(task: TrainingTask[Batch], params: Params, mesh: Mesh, accumulation: int = 1) -> dict[str, float]:
    """The validation scores of parameters on `mesh`, as `fit` writes them, but without those of `task.inspect`."""
    eval_step = make_eval_step(task, mesh, accumulation)
    with jax.set_mesh(mesh):
        return task.summary(_held_out(task, eval_step, mesh, params, task.init_state(params)))


def _held_out(
    task: TrainingTask[Batch], eval_step: jax.stages.Wrapped, mesh: Mesh, params: Params, model_state: Params
) -> Totals:
    """Metric sums of all held-out batches."""
    held_out = Meter()
    for batch in task.validation:
        held_out.add(jax.device_get(eval_step(params, model_state, place_batch(mesh, batch))))
    return held_out.totals


def _rest(state: TrainState) -> dict[str, object]:
    """The state that a checkpoint stores besides the parameters."""
    model_state = {"model_state": state.model_state} if state.model_state else {}
    return {"step": state.step, "state": state.optimizer, **model_state}


def _agreed(loss: float) -> float:
    """Process 0's value of a loss, in float32, because all processes must decide from the same bits."""
    value = np.float32(loss)
    return float(value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value))


def _due(taken: int, every: int, steps: int) -> bool:
    return every > 0 and (taken % every == 0 or taken == steps)


def _diagnosis(taken: int, report: StepReport, loss: float, norm: float, good: int | None) -> str:
    """What a person needs to know after a NaN."""
    leaves = {name: np.atleast_1d(flags) for name, flags in jax.device_get(report.finite_leaves).items()}
    bad = {name: np.flatnonzero(~flags) for name, flags in leaves.items() if not flags.all()}
    if bad:
        # The backward pass runs from the last layer to the first, so the highest bad layer is nearest to the cause.
        stacked = tuple(f"{name}." for name in STACKED)
        name = max(bad, key=lambda name: (name.startswith(stacked), bad[name][-1]))
        where = f"gradient of {name}" + (f", layer {bad[name][-1]}" if name.startswith(stacked) else "")
        where += f" ({len(bad)} of {len(leaves)} leaves are not finite)"
    else:
        where = "the loss itself, or the total norm although each gradient is finite"
    kept = f"step {good} is the last good checkpoint" if good else "there is no checkpoint yet"
    return (
        f"not finite at step {taken - 1}: {where}; loss {loss}, gradient norm {norm}. The step was not taken; {kept}. "
        f"Look at the batch of step {taken - 1}, then try a lower learning rate, a longer warm-up, a lower clip_norm, "
        "qk_norm or z_loss, or float32. Starting again resumes from the checkpoint and comes to the same batch."
    )
