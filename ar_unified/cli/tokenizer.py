"""Train the text tokenizer and the image tokenizer of an experiment.

Reads the experiment's training sources. Leaves in the workdir:
  text_tokenizer/text.model                            SentencePiece, lossless (or text_tokenizer.model of the config)
  text_tokenizer/report.json                           bytes per token and round trip, by source and language
  image_tokenizer/weights.safetensors and config.json  the VQ-VAE; its checkpoints, curves and pictures beside them
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified.cli import config as configs
from ar_unified.cli.experiment import Experiment, add_experiment_arguments, open_experiment
from ar_unified.cli.text_tokenizer import train_text
from ar_unified.data.loader import ImageBatches
from ar_unified.parallel import runtime
from ar_unified.training.loop import TrainingConfig, fit
from ar_unified.training.optimizer import OptimizerConfig
from ar_unified.training.tasks import TokenizerTask

_VALIDATION_BATCHES = 4
_SHEET = 8  # pictures and their reconstructions, one above the other


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_arguments(parser)


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    train_tokenizers(open_experiment(arguments, overrides))
    return 0


def train_tokenizers(experiment: Experiment) -> None:
    train_text(experiment)
    if experiment.config.image_tokenizer.steps:
        train_image(experiment)


def train_image(experiment: Experiment) -> None:
    """Stage image_tokenizer."""
    settings = experiment.config.image_tokenizer
    stage = experiment.stage(
        "image_tokenizer",
        "image_tokenizer",
        image_size=configs.plain(experiment.config.data.image_size),
        sources=experiment.fingerprints(),
        together=True,
    )
    if stage.done:
        return experiment.skip(stage)
    size = (settings.crop, settings.crop) if settings.crop else tuple(experiment.config.data.image_size)

    def pictures(sources: Sequence[Any], random_crop: bool) -> ImageBatches:
        seed = experiment.config.seed
        return ImageBatches(sources, size=size, batch_size=settings.batch_size, seed=seed, random_crop=random_crop)

    held_out = pictures(experiment.held_out["validation"] or experiment.train, False)
    validation = [held_out.batch(step) for step in range(_VALIDATION_BATCHES)]
    task = TokenizerTask(experiment.autoencoder, pictures(experiment.train, bool(settings.crop)).batch, validation)

    def preview(step: int, params: Any) -> Mapping[str, np.ndarray]:
        shown = validation[0]["pixels"][:_SHEET]
        tokenizer = ImageTokenizer(experiment.autoencoder, jax.device_get(params), batch_size=_SHEET)
        rows = (shown, tokenizer.decode(tokenizer.encode(shown)))
        return {"reconstructions": np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)}

    steps = settings.steps
    every = max(1, steps // 4)
    training = TrainingConfig(
        steps=steps,
        seed=experiment.config.seed,
        optimizer=OptimizerConfig(
            learning_rate=settings.learning_rate,
            warmup_steps=min(50, steps // 10),
            final_fraction=0.02,
            b2=0.99,
            weight_decay=0.0,
        ),
        log_every=max(1, steps // 40),
        validate_every=every,
        preview_every=every,
        checkpoint_every=every,
        keep=1,
    )
    params = fit(task, training, stage.folder, mesh=experiment.mesh, preview=preview, logger=experiment.say)
    params = runtime.to_host(params)
    if runtime.first():
        tokenizer = ImageTokenizer(experiment.autoencoder, params)
        tokenizer.save(stage.folder)
        experiment.finish(stage, {"codes": tokenizer.codebook_size, "hash": tokenizer.hash})
    runtime.barrier(stage.name)
