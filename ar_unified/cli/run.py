"""Run every stage of an experiment in order: tokenizers, data, training, samples, evaluation.

Each stage writes its own folder in the workdir (see the other verbs' --help). A finished stage is skipped, and an
interrupted one continues, so the same command can be started again after any interruption; the result is the same.
For a model of text alone, set config.image_tokenizer.steps=0 and use sources of text alone (kind="text", or rows
without an image).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ar_unified.cli.evaluate import evaluate
from ar_unified.cli.sample import sample_held_out
from ar_unified.cli.tokenizer import train_tokenizers
from ar_unified.cli.train import train
from ar_unified.experiment.data import prepare
from ar_unified.experiment.start import open_experiment
from ar_unified.experiment.tokenizer_evaluation import evaluate_held_out


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs every stage that is not done; returns the exit status. Raises UserError and RunError, as the stages do."""
    experiment = open_experiment(arguments, overrides)
    if experiment.text_only:
        experiment.say("text alone: no image tokenizer, no images in samples and report")
    for stage in (train_tokenizers, prepare, train, sample_held_out, evaluate_held_out, evaluate):
        if stage is not prepare or experiment.config.training.objective != "reward":  # answers are sampled
            stage(experiment)
    return 0
