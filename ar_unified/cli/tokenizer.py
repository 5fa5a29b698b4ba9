"""Train the text tokenizer and the image tokenizer of an experiment.

Reads the experiment's training sources. Writes into the workdir:
  text_tokenizer/text.model                            SentencePiece, lossless (or config.text_tokenizer.model)
  text_tokenizer/report.json                           bytes per token and round trip, by source and language
  image_tokenizer/weights.safetensors and config.json  the VQ-VAE (or a copy of config.image_tokenizer.model; or
                                                       nothing, for text alone, if config.image_tokenizer.steps=0)
  image_tokenizer/checkpoints                          from which an interrupted training continues
  image_tokenizer/metrics.jsonl                        the numbers of the training; image_tokenizer/tensorboard has them
                                                       as curves, with a few images above their reconstructions
  image_tokenizer/skipped.jsonl                        the images that were left out, and why; no file if there are none
`ar-unified evaluate --only tokenizer` writes the curves, and images with their reconstructions, as a page and as PNG.
With config.init=FOLDER, both tokenizers come from that bundle, and none is trained. If the bundle is of text alone and
config.image_tokenizer has a model or steps, only the text tokenizer comes from the bundle.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from ar_tokenizers.image.objective import Objective
from ar_tokenizers.image.perceptual import Perceptual
from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified import storage
from ar_unified.checkpoint import steps_in
from ar_unified.data.items import has_images
from ar_unified.data.loader import ImageBatches, NothingReadable
from ar_unified.data.skipped import Skipped
from ar_unified.data.sources import Source
from ar_unified.experiment import config as configs
from ar_unified.experiment.changes import Training, changeable
from ar_unified.experiment.check_opened import HOLD_OUT
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.settings import objective as objective_of
from ar_unified.experiment.settings import short_side, tokenizer_rates, tokenizer_training, whole_batch
from ar_unified.experiment.start import by_first_process, open_experiment
from ar_unified.experiment.text_tokenizer import train_text
from ar_unified.manifests import Json
from ar_unified.metrics import last_validation, read_metrics
from ar_unified.parallel import runtime
from ar_unified.training.loop import fit
from ar_unified.training.tasks import TokenizerTask
from ar_unified.workdir import Stage

_VALIDATION_BATCHES = 4
_SHEET = 8  # number of images in a preview, with their reconstructions below


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Trains both tokenizers, or the one that --only names; returns the exit status. Raises UserError and RunError."""
    stages = [f"{arguments.only}_tokenizer"] if arguments.only else ["text_tokenizer", "image_tokenizer"]
    train_tokenizers(open_experiment(arguments, overrides, stages), arguments.only)
    return 0


def train_tokenizers(experiment: Experiment, only: str | None = None) -> None:
    """Runs the stages `text_tokenizer` and `image_tokenizer`, or the one that `only` ("text" or "image") names."""
    if only != "image":
        train_text(experiment)
    if only == "text":
        return
    if experiment.config.image_tokenizer.model or (experiment.bundle is not None and experiment.bundle.has_images):
        return bring_image(experiment)
    if not experiment.config.image_tokenizer.steps:
        experiment.say("==== image_tokenizer: none is trained, because config.image_tokenizer.steps is 0")
        return
    with experiment.leaving_nothing():
        train_image(experiment)


@by_first_process
def bring_image(experiment: Experiment) -> None:
    """Runs the stage `image_tokenizer` for a tokenizer from a bundle or from elsewhere, which is used as it is."""
    tokenizer = experiment.brought
    assert tokenizer is not None
    stage = experiment.stage("image_tokenizer", brought=tokenizer.hash)
    if stage.done:
        return experiment.skip(stage)
    tokenizer.save(stage.folder)
    experiment.finish(stage, {"codes": tokenizer.codebook_size, "hash": tokenizer.hash})


def _held_out(experiment: Experiment, check: Callable[[Source], None]) -> list[Source]:
    """The held-out sources that have images. Prints a line for each source in which `check` finds none, and a line if
    no source is left."""
    held_out = []
    for source in filter(has_images, experiment.held_out["validation"]):
        try:
            check(source)
            held_out.append(source)
        except NothingReadable as error:
            experiment.say(f"validation: {error}")
    if not held_out:
        experiment.say(f"no image is held out: training goes on without a validation loss. {HOLD_OUT}")
    return held_out


def train_image(experiment: Experiment) -> None:
    """Runs the stage `image_tokenizer`, which trains one."""
    settings = experiment.config.image_tokenizer
    checkpoints = storage.address(experiment.workdir.image_tokenizer / "checkpoints")
    stage = experiment.stage(
        "image_tokenizer",
        "image_tokenizer",
        "mesh",
        image_size=configs.plain(experiment.config.data.image_size),
        sources=experiment.fingerprints(),
        together=True,
        training=Training("image_tokenizer.steps", settings.steps, partial(steps_in, checkpoints), checkpoints, "data"),
        may=changeable(whole_batch=whole_batch(experiment.config)),
    )
    if stage.done:
        return experiment.skip(stage)
    skipped = Skipped(stage.folder)
    shares = [spec.get("image_weight") for spec in experiment.specs(experiment.config.data.train)]

    def images(sources: Sequence[Any], **options: Any) -> ImageBatches:
        options = {"size": tuple(experiment.config.data.image_size), "left_out": skipped, **options}
        return ImageBatches(sources, batch_size=settings.batch_size, seed=experiment.config.seed, **options)

    cropped = dict(size=(settings.crop,) * 2, short_side=short_side(experiment.config))
    batches = images(
        experiment.train,
        weights=[share or 0.0 for share in shares] if any(shares) else None,
        mirror=settings.mirror,
        recolour=settings.recolour,
        **cropped if settings.crop else {},
    )
    batches.check()
    held_out = _held_out(experiment, lambda source: images([source]).check())
    count = min(_VALIDATION_BATCHES, -(-sum(map(len, held_out)) // settings.batch_size))
    seen = images(held_out) if held_out else batches
    validation = [seen.batch(step) for step in range(count)]
    objective = Objective(
        experiment.autoencoder,
        objective_of(experiment.config),
        Perceptual.load(settings.perceptual, settings.perceptual_file, settings.dtype),
    )
    task = TokenizerTask(objective, batches.batch, validation, tokenizer_rates(experiment.config))

    shown = (validation[0] if validation else seen.batch(0))["pixels"][:_SHEET]
    if small := str(seen.enlarged):  # a sample of all images, told before the training
        experiment.say(f"WARNING: of the {'images for validation' if validation else 'first images'}, {small}")

    def preview(step: int, params: Any) -> Mapping[str, np.ndarray]:
        weights = jax.device_get(params["autoencoder"])
        at_once = min(len(shown), settings.batch_size // settings.accumulation)  # no more memory than a step needs
        tokenizer = ImageTokenizer(experiment.autoencoder, weights, batch_size=at_once)
        rows = (shown, tokenizer.decode(tokenizer.encode(shown)))
        return {"reconstructions": np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)}

    try:
        params = fit(
            task,
            tokenizer_training(experiment.config),
            stage.folder,
            mesh=experiment.mesh,
            preview=preview,
            checkpoint_folder=checkpoints,
            logger=experiment.say,
        )
    finally:
        if runtime.first() and not stage.made_nothing():
            skipped.write()
    params = runtime.to_host(params["autoencoder"])
    if runtime.first():
        _finish(experiment, stage, ImageTokenizer(experiment.autoencoder, params), task, skipped)
    runtime.barrier(stage.name)


def _finish(
    experiment: Experiment, stage: Stage, tokenizer: ImageTokenizer, task: TokenizerTask, skipped: Skipped
) -> None:
    """Saves a trained tokenizer, and prints and records what a person should know about it."""
    tokenizer.save(stage.folder)
    summary: dict[str, Json] = {"codes": tokenizer.codebook_size, "hash": tokenizer.hash}
    rows = read_metrics(stage.folder / "metrics.jsonl")  # its last line is a validation, or of the last step
    told, which = (last_validation(rows), "held-out") if task.validation else (rows[-1], "training")
    if warning := task.warning(told):
        experiment.say(f"image_tokenizer: WARNING, on {which} images {warning}")
        summary["warning"] = warning
    if left_out := skipped.counts.kinds:
        experiment.say(f"left out: {skipped.counts}. {skipped.path} lists them all")
        summary["left_out"] = left_out
    if task.objective.perceptual.kind != "none":
        summary["perceptual"] = task.objective.perceptual.name
    experiment.finish(stage, summary)
