"""A training by rewards that takes seconds: the tiny transformer of tests/sampling draws images, and dark ones are
good.

As a script, one process of several that train together: python tests/experiment/rewarded.py FOLDER HOST:PORT COUNT I
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_unified.data.items import BadItem
from ar_unified.experiment.prompts import Prompts
from ar_unified.experiment.rollouts import DrawingConfig, Rollouts, fitting
from ar_unified.language.document import CodesPart, Document, ImagePart, TextPart
from ar_unified.parallel import runtime
from ar_unified.parallel.mesh import make_mesh
from ar_unified.rewards.functions import guarded
from ar_unified.rewards.reward import RewardConfig
from ar_unified.sampling.engine import Engine
from ar_unified.training.loop import TrainingConfig
from ar_unified.training.optimizer import OptimizerConfig
from ar_unified.training.policy import PolicyConfig, PolicyTask
from tests.sampling import tiny
from tests.training.tiny import fit

LENGTH, ROWS = 32, 16
POLICY = PolicyConfig(group_size=4)
TRAINING = TrainingConfig(
    steps=6,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    log_every=1,
    validate_every=0,
    checkpoint_every=2,
)


class Source:
    """Ten prompts that ask for an image, and a document that asks for nothing."""

    name, reversible, fingerprint = "source", False, {}

    def __len__(self) -> int:
        return 11

    def origin(self, i: int) -> str:
        return f"source:{i}"

    def texts(self, i: int) -> list[str]:
        return []

    def __getitem__(self, i: int) -> Document:
        if i == 4:
            raise BadItem("bad_row", self.origin(i), "it is none")
        image = CodesPart(np.zeros((2, 3), np.int32))
        parts = (TextPart("abcdefghijk"[i] + "a" * (i % 3)), image)
        return Document.of(parts, prompt=None if i == 7 else 1, id=f"d{i}", meta={"number": i})


class Pixels:
    """Stands in for an image tokenizer: a code is a pixel of that grey."""

    factor = 1

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return pixels[..., 0].astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.repeat(codes[..., None], 3, axis=-1).astype(np.uint8)


def dark(prompt: Document, answer: Document) -> float:
    (image,) = answer.parts
    assert isinstance(image, ImagePart)
    return float(np.mean(image.pixels < 12))


def rollouts(
    mesh: Any = None,
    policy: PolicyConfig = POLICY,
    drawing: DrawingConfig | None = None,
    rewarding: RewardConfig | None = None,
    reward: Any = dark,
    source: Any = None,
    batch_size: int = ROWS,
    config: Any = tiny.CONFIG,
    **more: Any,
) -> Rollouts:
    drawing, rewarding = drawing or DrawingConfig(), rewarding or RewardConfig(function="dark")
    engine = Engine(config, None, tiny.GRAMMARS["grid"], batch_size=8, max_length=LENGTH, logprobs=True)
    drawn = drawing.request("drawing")
    prompts = Prompts([source or Source()], [1.0], drawn, fitting(engine, LENGTH), Pixels(), lambda pixels: pixels, 0)
    return Rollouts(
        prompts,
        engine,
        Pixels(),
        guarded(reward, rewarding.timeout),
        rewarding,
        policy,
        mesh=mesh or one(),
        batch_size=batch_size,
        length=LENGTH,
        contexts=drawn.contexts,
        chunk=64,
        **{"say": lambda line: None} | more,
    )


def one() -> Any:
    return make_mesh({}, jax.devices()[:1])


def task(batch: Any, policy: PolicyConfig = POLICY, config: Any = tiny.CONFIG, **more: Any) -> PolicyTask:
    return PolicyTask(config, tiny.GRAMMARS["grid"].vocabulary, batch, chunk=64, policy=policy, **more)


def weights() -> Any:
    """Parameters as a model initialises them. Those of tests/sampling are so large that attention amplifies rounding
    errors to 2e-5."""
    return jax.tree.map(lambda p: p / 6 if p.ndim > 1 else p, tiny.random_params())


def run(folder: Path, batch: Any, policy: PolicyConfig = POLICY, mesh: Any = None, **changes: Any) -> Any:
    """The parameters, on the host."""
    logger = changes.pop("logger", lambda line: None)
    config = dataclasses.replace(TRAINING, **changes)

    def begin(abstract: Any) -> Any:
        return jax.tree.map(
            lambda x, of: jax.make_array_from_callback(x.shape, of.sharding, lambda where: np.asarray(x)[where]),
            weights(),
            abstract,
        )

    found = fit(task(batch, policy), config, folder, mesh=mesh or one(), begin=begin, logger=logger)
    return jax.device_get(found) if jax.process_count() == 1 else None


def main(folder: str, coordinator: str, processes: str, process: str) -> None:
    with runtime.ending():
        runtime.start(coordinator, int(processes), int(process), logs=f"{folder}/logs")
        mesh = make_mesh(dict(fsdp=-1))
        policy = dataclasses.replace(POLICY, epochs=2)
        run(Path(folder), rollouts(mesh, policy), policy, mesh, steps=4, logger=runtime.say)


if __name__ == "__main__":
    main(*sys.argv[1:])
