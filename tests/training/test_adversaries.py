"""Tasks with several losses and with state that no gradient changes: one forward pass, and each loss trains its own
parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.checkpoint import Checkpoints
from ar_unified.metrics import read_metrics
from ar_unified.parallel.mesh import make_mesh
from ar_unified.training.divergence import Diverged, Watch
from ar_unified.training.step import STATISTICS, Stateless, gradients
from tests.training import tiny


@dataclasses.dataclass(frozen=True, eq=False)
class Duel(Stateless):
    """`maker` minimises judge * (maker - x), `judge` maximises it; the running mean of x is kept."""

    name: str = "duel"
    unit: str = "images"
    validation: tuple = ()

    def init(self, key: jax.Array) -> Any:
        return {"maker": {"a": jnp.ones(4)}, "judge": {"b": jnp.arange(4.0)}}

    def init_state(self, params: Any) -> Any:
        return {"mean": jnp.zeros(4), "steps": jnp.zeros((), jnp.int32)}

    def state_axes(self, params: Any, model_state: Any) -> Any:
        return self.logical_axes(model_state)

    def logical_axes(self, params: Any) -> Any:
        return jax.tree.map(lambda x: (None,) * x.ndim, params)

    def batch(self, step: int, index: int = 0, count: int = 1) -> Any:
        x = np.random.default_rng(step).normal(size=(8, 4)).astype(np.float32)
        return {"x": x[index * 8 // count : (index + 1) * 8 // count]}

    def loss(self, params: Any, model_state: Any, batch: Any, keys: Any) -> Any:
        a, b, x = params["maker"]["a"], params["judge"]["b"], batch["x"]
        won = jnp.sum(b * jnp.square(a - x), axis=1)
        rows = jnp.float32(len(x))
        metrics = {"loss": (won.sum(), rows), "images": rows, STATISTICS: {"x": x.sum(0), "rows": rows}}
        return {"maker": won.sum(), "judge": -won.sum() + jnp.sum(jnp.square(b)) * rows}, rows, metrics

    def update_state(self, params: Any, model_state: Any, sums: Any) -> Any:
        mean = 0.5 * model_state["mean"] + 0.5 * sums["x"] / sums["rows"]
        return params, {"mean": mean, "steps": model_state["steps"] + 1}

    def inference_params(self, params: Any, model_state: Any) -> Any:
        return {**params, "mean": model_state["mean"]}

    def summary(self, totals: Any) -> dict[str, float]:
        return {k: float(v[0] / v[1]) for k, v in totals.items() if isinstance(v, tuple)}

    def flops(self, totals: Any) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"kind": "duel"}


@pytest.mark.parametrize("shape, accumulation", [(dict(), 1), (dict(data=2, fsdp=4), 1), (dict(), 4)])
def test_each_loss_moves_its_own_parameters(shape, accumulation):
    task, mesh = Duel(), make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values()) or [1]))])
    params, batch = task.init(None), task.batch(0)
    with jax.set_mesh(mesh):
        losses, grads, metrics = jax.jit(
            lambda p, b: gradients(
                task, p, task.init_state(p), b, jax.random.key(0), accumulation=accumulation, mesh=mesh
            )
        )(params, batch)
    a, b, x = np.ones(4), np.arange(4.0), batch["x"]
    np.testing.assert_allclose(grads["maker"]["a"], np.mean(2 * b * (a - x), 0), rtol=1e-5)
    np.testing.assert_allclose(grads["judge"]["b"], -np.mean(np.square(a - x), 0) + 2 * b, rtol=1e-5)
    won = np.mean(np.sum(b * np.square(a - x), 1))
    np.testing.assert_allclose([losses["maker"], losses["judge"]], [won, np.sum(b**2) - won], rtol=1e-5)
    np.testing.assert_allclose(metrics[STATISTICS]["x"], x.sum(0), rtol=1e-5)


def test_what_a_task_keeps_is_updated_saved_resumed_and_used(tmp_path):
    options = dict(task=Duel(), steps=6, log_every=1, validate_every=0, checkpoint_every=3)
    whole = tiny.run(tmp_path / "whole", **options)
    mean = np.zeros(4)
    for step in range(6):
        mean = 0.5 * mean + 0.5 * Duel().batch(step)["x"].mean(0)
    np.testing.assert_allclose(whole["mean"], mean, rtol=1e-5)

    class Killed(Exception):
        pass

    @dataclasses.dataclass(frozen=True, eq=False)
    class Mortal(Duel):
        def batch(self, step: int, index: int = 0, count: int = 1) -> Any:
            if step == 5:
                raise Killed
            return super().batch(step, index, count)

    with pytest.raises(Killed):
        tiny.run(tmp_path / "torn", **options | dict(task=Mortal()))
    resumed = tiny.run(tmp_path / "torn", **options)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    jax.tree.map(np.testing.assert_array_equal, tiny.run(tmp_path / "torn", **options), whole)  # finished already


def test_a_loss_far_above_its_beginning_stops_the_run_before_it_is_saved(tmp_path):
    @dataclasses.dataclass(frozen=True, eq=False)
    class Rising(Duel):
        def loss(self, params: Any, model_state: Any, batch: Any, keys: Any) -> Any:
            losses, rows, metrics = super().loss(params, model_state, batch, keys)
            high = jnp.where(model_state["steps"] < 20, 1.0, 50.0)
            return losses, rows, metrics | {"loss": (high * rows, rows)}

    options = dict(task=Rising(), steps=40, log_every=5, validate_every=0, checkpoint_every=10)
    with pytest.raises(Diverged, match="from 1 at the beginning; step 20 is the last good checkpoint"):
        tiny.run(tmp_path, **options)
    assert Checkpoints(tmp_path / "checkpoints", readonly=True).latest() == 20
    with pytest.raises(Diverged, match="from 1 at"):  # a run that resumes remembers where it began
        tiny.run(tmp_path, **options)
    assert max(row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")) <= 25


def test_one_bad_batch_is_no_divergence():
    watch = Watch()
    for step in range(100):
        watch.add(step, 30.0 if step == 50 else 8.0 / (1 + step), lambda: None)
