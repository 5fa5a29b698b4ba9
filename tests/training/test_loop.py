"""The loop: a killed run equals an uninterrupted one, a bad batch stops it, nothing is redone, SIGTERM saves a
checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.checkpoint import Checkpoints, restore_params
from ar_unified.data.batch import PackedBatch
from ar_unified.evaluation.report import transformer_charts, write_report
from ar_unified.manifests import ManifestMismatch
from ar_unified.metrics import read_metrics
from ar_unified.parallel.compiler import compiler_options
from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch
from ar_unified.training.loop import NonFinite, Preempted
from ar_unified.training.optimizer import make_optimizer
from ar_unified.training.step import TrainState, make_train_step
from ar_unified.training.tasks import TransformerTask
from tests.moments import random_moments
from tests.training import tiny


def same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def curve(folder, *keys):
    return [[row.get(key) for key in ("step", *keys)] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run without interruption, and its final state."""
    folder = tmp_path_factory.mktemp("whole")
    lines = []
    seen = {}

    def preview(step, params):
        seen[step] = jax.device_get(params)
        return {"square": np.zeros((8, 8, 3), np.uint8)}

    task = tiny.task(attention_share=True)
    params = tiny.run(folder, task=task, validate_every=4, preview_every=6, preview=preview, logger=lines.append)
    return folder, jax.device_get(params), lines, seen


def test_each_line_has_the_time_of_its_steps(tmp_path):
    """This includes the last step, and steps with a validation. On a CPU, such a step is over when the step before it
    is read."""

    @dataclasses.dataclass(frozen=True, eq=False)
    class Slow(TransformerTask):
        def loss(self, params, model_state, batch, keys):
            fixed = jax.lax.stop_gradient(params["norm"][0])
            waited = jax.pure_callback(slowly, jax.ShapeDtypeStruct((), jnp.float32), fixed)
            loss, weight, metrics = super().loss(params, model_state, batch, keys)
            return loss + 0 * waited, weight, metrics

    def slowly(_):
        time.sleep(0.05)
        return np.float32(0)

    fields = {field.name: getattr(tiny.task(), field.name) for field in dataclasses.fields(TransformerTask)}
    tiny.run(tmp_path, task=Slow(**fields), steps=5, log_every=1, validate_every=3)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "step_seconds" in row]
    assert len(rows) == 5 and all(row["step_seconds"] >= 0.05 for row in rows)


class Killed(Exception):
    pass


def dying(step):
    """batch(step) for a run that ends at `step` without a message."""

    def batch(s, *part):
        if s == step:
            raise Killed
        return tiny.packed(s, *part)

    return batch


def test_it_learns_and_says_so(whole):
    folder, params, lines, seen = whole
    rows = read_metrics(folder / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    training = next(row for row in rows if "loss" in row)
    wanted = "loss/role/image loss/task/text_to_image bits_per_image_token bits_per_text_byte grad_norm log_z fill mfu"
    assert set(f"{wanted} learning_rate tokens_per_second step_seconds input_seconds goodput".split()) <= set(training)
    last = [row for row in rows if "loss" in row][-1]
    shares = {key: value for key, value in last.items() if key == "goodput" or key.startswith("time/")}
    assert sum(shares.values()) == pytest.approx(1) and {"goodput", "time/compile", "time/checkpoint"} <= set(shares)
    assert lines[-1].startswith("transformer: goodput ")
    assert [row["step"] for row in rows if "validation/loss" in row] == [4, 8]
    assert list(seen) == [6, 8]
    same_bits(seen[8], params)
    assert any("step 8/8  loss" in line and "tokens/s" in line and "ETA" in line for line in lines)


def test_the_report_draws_every_chart_of_what_is_written(whole, tmp_path):
    path = whole[0] / "metrics.jsonl"
    rows = read_metrics(path)
    written = {key for row in rows for key in row}
    for title, _, metrics, _ in transformer_charts(rows):
        assert metrics and set(metrics) <= written, title
    write_report(tmp_path / "report.html", title="tiny", evaluation={}, telemetry={"transformer": path})
    html = (tmp_path / "report.html").read_text()
    curves = [[name for name, _ in json.loads(unescape(series))] for series in re.findall('data-series="(.*?)"', html)]
    assert ["image", "text"] in curves and ["image to text", "text to image"] in curves


@pytest.mark.parametrize(
    "deaths", [pytest.param((2,), marks=pytest.mark.exact_later), pytest.param((5, 7), marks=pytest.mark.exact)]
)
def test_killed_is_uninterrupted(whole, tmp_path, deaths):
    folder, expected, _, _ = whole
    for step in deaths:
        with pytest.raises(Killed):
            tiny.run(tmp_path, task=tiny.task(batch=dying(step)), validate_every=4)
    same_bits(tiny.run(tmp_path, validate_every=4), expected)
    assert curve(tmp_path, "validation/loss") == curve(folder, "validation/loss")


def test_a_finished_training_is_recognised(whole):
    folder, expected, _, _ = whole
    lines = []
    same_bits(tiny.run(folder, task=tiny.task(batch=dying(0)), logger=lines.append), expected)
    assert lines == ["transformer: finished already, 8 of 8 steps"]


@pytest.mark.exact
@pytest.mark.slow
def test_another_mesh_takes_over(whole, tmp_path):
    with pytest.raises(Killed):
        tiny.run(tmp_path, task=tiny.task(batch=dying(5)))
    params = tiny.run(tmp_path, mesh=make_mesh(dict(data=2, fsdp=2, tensor=2)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), y, atol=2e-5), params, whole[1])


@pytest.mark.exact
@pytest.mark.slow
def test_muon_is_resumed_bit_for_bit_and_on_another_mesh(tmp_path):
    changes = dict(optimizer=dataclasses.replace(tiny.TRAINING.optimizer, optimizer="muon"))
    expected = jax.device_get(tiny.run(tmp_path / "whole", **changes))
    for name, mesh in {"same": None, "other": make_mesh(dict(data=2, fsdp=2, tensor=2))}.items():
        with pytest.raises(Killed):
            tiny.run(tmp_path / name, task=tiny.task(batch=dying(5)), **changes)
        params = tiny.run(tmp_path / name, mesh=mesh, **changes)
        compare = np.testing.assert_array_equal if mesh is None else partial(np.testing.assert_allclose, atol=2e-5)
        jax.tree.map(lambda x, y, compare=compare: compare(np.asarray(x), y), params, expected)


def test_the_checkpoint_says_what_it_is(tmp_path):
    lines: list[str] = []
    with pytest.raises(Killed):
        own = dict(compiler_options=("xla_backend_optimization_level=0",), logger=lines.append)
        tiny.run(tmp_path, manifest=tiny.VOCABULARY.manifest(), task=tiny.task(batch=dying(4)), **own)
    stored = Checkpoints(tmp_path / "checkpoints", readonly=True).metadata()
    assert stored["step"] == 3 and stored["model"]["d_model"] == 32 and stored["training"]["steps"] == 8
    options = compiler_options(make_mesh(), ("xla_backend_optimization_level=0",), tiny.MODEL.dtype)
    assert stored["compiler_options"] == options and options["xla_backend_optimization_level"] == "0"
    assert len(options) > 1, "one of them is ours"
    (line,) = [line for line in lines if "xla_" in line]
    assert line.endswith("compiled with training.compiler_options xla_backend_optimization_level=0"), (
        "no option of ours"
    )
    other = dataclasses.replace(tiny.VOCABULARY, text_size=41).manifest()
    with pytest.raises(ManifestMismatch, match="'text_size': this run has 41, checkpoint checkpoints/3 has 40"):
        tiny.run(tmp_path, manifest=other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoisonedBatch(PackedBatch):
    poison: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Poisoned(TransformerTask):
    """If a batch is poisoned, the gradient of one matrix of layer 0 is not finite, although the loss is."""

    def loss(self, params, model_state, batch, key):
        loss, weight, metrics = super().loss(params, model_state, batch, key)
        gate = params["layers"]["mlp"]["gate"]
        zero = jnp.abs(gate[0] - jax.lax.stop_gradient(gate[0]))
        hurt = jnp.sqrt(jnp.where(batch.poison[0, 0], zero, 1.0))  # the derivative of a root at zero
        return loss + hurt.sum(), weight, metrics


def test_a_poisoned_batch_stops_the_run_and_costs_nothing(tmp_path):
    """The bad step is the last before a checkpoint is due, so it must be noticed before the save."""

    def batch(step, *part):
        return PoisonedBatch(**vars(tiny.packed(step)), poison=np.full((tiny.ROWS, tiny.LENGTH), step == 5))

    task = tiny.task()
    settings = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    poisoned = Poisoned(**settings | {"batch": batch})
    at_three = {}

    def preview(step, params):
        at_three.setdefault(step, jax.device_get(params))

    def run():
        tiny.run(tmp_path, task=poisoned, preview_every=3, preview=preview)

    with pytest.raises(NonFinite) as error:
        run()
    message = str(error.value)
    assert "at step 5: gradient of layers.mlp.gate, layer 0 (1 of 14 leaves" in message
    assert "step 3 is the last good checkpoint" in message and "learning rate" in message
    same_bits(restore_params(tmp_path / "checkpoints"), at_three[3])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row] == [2, 4]
    with pytest.raises(NonFinite, match="at step 5"):  # the same batch comes again, because nothing is skipped silently
        run()


def test_the_bad_step_is_not_taken(params):
    task, mesh = tiny.task(), make_mesh({}, jax.devices()[:1])
    tx = make_optimizer(tiny.TRAINING.optimizer, tiny.TRAINING.steps)
    head = params["head"].copy()
    head[0, 0] = np.nan
    broken = params | {"head": head}
    with jax.set_mesh(mesh):
        state = TrainState(jnp.int32(0), jax.tree.map(jnp.array, broken), tx.init(broken), {})
        before = jax.device_get(state)
        step = make_train_step(task, tx, mesh, seed=0, clip_norm=1.0)
        after, report = step(state, place_batch(mesh, tiny.packed(0)))
    same_bits((after.params, after.optimizer), (before.params, before.optimizer))
    assert not report.finite and after.step == 1 and not report.finite_leaves["layers.mlp.gate"].any()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.exact),
        *(
            pytest.param(number, marks=[pytest.mark.slow, pytest.mark.exact_later])
            for number in (signal.SIGINT, signal.SIGHUP)
        ),
    ],
)
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(whole, tmp_path, number):
    def batch(step, *part):
        if step == 4:
            os.kill(os.getpid(), number)
        return tiny.packed(step)

    lines: list[str] = []
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Preempted) as stop:
        tiny.run(tmp_path, task=tiny.task(batch=batch), logger=lines.append)
    latest = Checkpoints(tmp_path / "checkpoints", readonly=True).latest()
    assert stop.value.code == 128 + number and latest in (4, 5)  # a batch is made before its step
    assert f"stopped after step {latest} with a checkpoint; the same command continues from there" in lines[-1]
    same_bits(tiny.run(tmp_path), whole[1])


@pytest.mark.exact
@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tokenizers'}", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, str(root / "tests/training/tiny.py")]
    random = random_moments()
    for moment in sorted(random.sample(range(6, 60), 3)):  # after that many steps and a moment, saves included
        process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"step ") and int(line.split()[1].split(b"/")[0]) >= moment:
                break
        time.sleep(random.uniform(0.0, 0.02))
        process.kill()
        process.communicate()
    subprocess.run([*command, str(tmp_path / "killed")], env=environment, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, stdout=subprocess.DEVNULL)
    same_bits(restore_params(tmp_path / "killed/checkpoints"), restore_params(tmp_path / "whole/checkpoints"))
    assert curve(tmp_path / "killed", "loss") == curve(tmp_path / "whole", "loss")
