"""Training steps on random documents: tokens per second, MFU as a training logs it, peak memory."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from ar_unified.data.batch import PackedBatch
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import config_from
from ar_unified.parallel.compiler import compiler_options
from ar_unified.parallel.mesh import make_mesh
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.step import abstract_state, make_state, make_train_step
from ar_unified.training.tasks import TransformerTask
from ar_unified.training.telemetry import Meter, device_memory, peak_flops
from experiments.benchmarks.gpu.measure import Check
from experiments.benchmarks.gpu.sizes import Size

WARM, STEPS = 2, 5
CHUNK = 4096  # tokens per chunk of the loss, as in experiments/pretrain.py


def checks(size: Size) -> list[Check]:
    """Tokens per second, MFU and peak memory of each training."""
    return [
        (name, functools.partial(_measure, Vocabulary(*size.vocabulary), size.document, *what))
        for name, what in size.training.items()
    ]


def _measure(
    vocabulary: Vocabulary,
    document: int,
    preset: str,
    layers: int | None,
    rows: int,
    T: int,
    remat: str,
    own_options: list[str],
) -> dict[str, Any]:
    config = config_from(preset, vocabulary.size, remat=remat)
    config = dataclasses.replace(config, n_layers=layers or config.n_layers)
    batch = _batch(vocabulary, rows, T, document)
    task: TransformerTask = TransformerTask(config, vocabulary, lambda step, index=0, count=1: batch, chunk=CHUNK)
    tx, mesh = make_optimizer(OptimizerConfig(), 1000), make_mesh({}, jax.devices()[:1])
    placement = jax.tree.map(lambda x: x.sharding, abstract_state(task, tx, mesh))
    options = compiler_options(mesh, own_options)
    step = make_train_step(task, tx, mesh, seed=0, clip_norm=1.0, compiler_options=options)
    meter, seconds = Meter(), []
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: make_state(task, tx, 0), out_shardings=placement)()
        batch = jax.device_put(batch)
        for number in range(WARM + STEPS):
            began = time.perf_counter()
            state, report = step(state, batch)
            loss = float(report.loss)  # ready when the step is done
            seconds.append(time.perf_counter() - began)
            if number >= WARM:
                meter.add(jax.device_get(report.values))
    timed = sum(seconds[WARM:])
    mfu = task.flops(meter.totals) / timed / peak_flops()[0]
    figures = {
        "MFU": f"{mfu:.1%}",
        "tokens/s": round(rows * T * STEPS / timed),
        "step": f"{timed / STEPS:.3f} s",
        "first step": f"{seconds[0]:.1f} s",
        "peak GiB": round(device_memory().get("hbm_peak_gib", 0.0), 1),
    }
    return dict(
        figures=figures, mfu=mfu, step_seconds=seconds, loss=loss, wrong=not np.isfinite(loss),
        rows=rows, sequence_length=T, remat=remat, layers=config.n_layers, preset=preset,
        compiler_options=options,
    )  # fmt: skip


def _batch(vocabulary: Vocabulary, rows: int, T: int, document: int) -> PackedBatch[np.ndarray]:
    """Rows of documents of one length, which contain random image codes."""
    ids = np.random.default_rng(0).integers(0, vocabulary.codebook_size, (rows, T + 1)) + vocabulary.image_offset
    at = np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T))
    return dataclasses.replace(
        PackedBatch.padding(rows, T, vocabulary.pad),
        tokens=ids[:, :-1].astype(np.int32),
        targets=ids[:, 1:].astype(np.int32),
        roles=vocabulary.role(ids[:, 1:]).astype(np.int8),
        positions=at % document,
        doc_start=at // document * document,
        segment_ids=at // document + 1,
    )
