"""Measures how well a small transformer predicts a tokenizer's image ids. Neither entropy nor rFID shows this.

Two tokenizers may have equally good images, but the ids of one may be far harder to model. So a transformer of a fixed
small size is trained with a fixed small budget on ids of training images, in reading order, and its bits per id are
measured on other images. It uses this repository's transformer, task and training step, on one device, without a
checkpoint: an interrupted probe starts again.

Axes: N images, h and w rows and columns of ids in an image, B rows, T = h * w.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from ar_unified.data.batch import PackedBatch
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import TransformerConfig, parameter_count
from ar_unified.parallel.mesh import make_mesh
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.step import TrainState, abstract_state, make_eval_step, make_state, make_train_step
from ar_unified.training.tasks import TransformerTask

TOKENS = 2048  # ids per step: as many whole images as fit, but at least one
SHAPE: dict[str, Any] = dict(
    d_model=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=32, d_mlp=384, qk_norm="rmsnorm"
)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=50, b2=0.99, weight_decay=0.05)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A trained probe. Call it with ids int32 [N, h, w] that it has not seen. budget: the settings that its
    results depend on.
    """

    task: TransformerTask
    state: TrainState
    mesh: jax.sharding.Mesh
    rows: int
    budget: dict[str, object]

    @functools.cached_property
    def _step(self) -> jax.stages.Wrapped:
        return make_eval_step(self.task, self.mesh)

    def __call__(self, ids: np.ndarray) -> dict[str, Any]:
        """{"bits_per_id": mean negative log2-likelihood of an id, given the ids before it; "budget": `self.budget`}."""
        total = count = 0.0
        for start in range(0, len(ids), self.rows):
            batch = _rows(self.task.vocabulary, ids[start : start + self.rows], self.rows)
            with jax.set_mesh(self.mesh):
                found = self._step(self.state.params, self.state.model_state, batch)
            bits, counted = jax.device_get(found["bits_per_image_token"])
            total, count = total + float(bits), count + float(counted)
        return {"bits_per_id": total / count, "budget": self.budget}


def images_wanted(steps: int, ids_per_image: int) -> int:
    """The number of training images that a probe of `steps` steps sees, each once."""
    return steps * _rows_of(ids_per_image)


def train_probe(ids: np.ndarray, codebook_size: int, *, steps: int, seed: int = 0) -> Probe:
    """Trains on ids int32 [N, h, w] for `steps` steps of about TOKENS ids. The result is deterministic for a `seed`.

    Raises:
        ValueError: if there are no ids, or fewer than 1 step.
        RuntimeError: if the loss or its gradient became infinite or NaN.
    """
    if not ids.size or steps < 1:
        raise ValueError(
            f"probe: expected at least 1 step and 1 image; found {steps} steps and ids of shape {ids.shape}"
        )
    rows = _rows_of(ids[0].size)
    vocabulary = Vocabulary(text_size=1, codebook_size=codebook_size)

    def batch(step: int, index: int = 0, count: int = 1) -> PackedBatch[np.ndarray]:
        epochs, at = np.divmod(np.arange(step * rows, (step + 1) * rows), len(ids))
        orders = {epoch: np.random.default_rng((seed, epoch)).permutation(len(ids)) for epoch in set(epochs.tolist())}
        return _rows(vocabulary, ids[[orders[epoch][i] for epoch, i in zip(epochs.tolist(), at, strict=True)]], rows)

    config = TransformerConfig(vocab_size=vocabulary.size, **SHAPE)
    optimizer = dataclasses.replace(OPTIMIZER, warmup_steps=min(OPTIMIZER.warmup_steps, steps // 10))
    task: TransformerTask = TransformerTask(config, vocabulary, batch)
    tx, mesh = make_optimizer(optimizer, steps), make_mesh({}, jax.local_devices()[:1])
    placement = jax.tree.map(lambda x: x.sharding, abstract_state(task, tx, mesh))
    train_step = make_train_step(task, tx, mesh, seed=seed, clip_norm=optimizer.clip_norm)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: make_state(task, tx, seed), out_shardings=placement)()
        for step in range(steps):
            state, report = train_step(state, batch(step))
    if not report.finite:
        raise RuntimeError(
            f"probe: expected a finite loss and gradient in {steps} steps on image ids; "
            f"the last step had a loss of {float(report.loss)}"
        )
    budget = {
        "parameters": parameter_count(config),
        "shape": f"{config.n_layers} layers of width {config.d_model}",
        "steps": steps,
        "ids_per_step": rows * ids[0].size,
        "images": len(ids),
        "epochs": round(steps * rows / len(ids), 2),
        "learning_rate": optimizer.learning_rate,
        "seed": seed,
    }
    return Probe(task, state, mesh, rows, budget)


def _rows_of(ids_per_image: int) -> int:
    return max(1, TOKENS // ids_per_image)


def _rows(vocabulary: Vocabulary, ids: np.ndarray, count: int) -> PackedBatch[np.ndarray]:
    """A batch of `count` rows with one image each. If there are fewer images, the last rows are empty. Inputs are <boi>
    and all ids except the last; targets are the ids.
    """
    T = ids[0].size
    targets = np.full((count, T), vocabulary.pad, np.int32)
    targets[: len(ids)] = ids.reshape(-1, T) + vocabulary.image_offset
    here = np.broadcast_to((np.arange(count) < len(ids))[:, None], (count, T))
    return dataclasses.replace(
        PackedBatch.padding(count, T, vocabulary.pad),
        tokens=np.concatenate([np.full((count, 1), vocabulary.control("boi"), np.int32), targets[:, :-1]], 1),
        targets=targets,
        roles=vocabulary.role(targets).astype(np.int8),
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), (count, T)),
        doc_start=np.zeros((count, T), np.int32),
        segment_ids=here.astype(np.int32),
    )
