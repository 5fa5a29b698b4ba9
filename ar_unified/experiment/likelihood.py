"""The objective "likelihood": next-token prediction on documents, as in pretraining and instruction tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ar_unified.data.loader import PackedBatches
from ar_unified.data.phases import Phase
from ar_unified.experiment import objective
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.objective import Objective
from ar_unified.training.tasks import TransformerTask


def likelihood(experiment: Experiment) -> Objective:
    """Learns all tokens of the documents that `prepare` has made ready."""
    batches = objective.training_batches(experiment, PackedBatches)

    def task(_: Path) -> TransformerTask:
        objective.tell(experiment, batches)
        held_out = held_out_batches(experiment, batches.phases)
        return TransformerTask(
            batch=batches.batch,
            validation=objective.validation(held_out),
            prompt_weight=experiment.config.loss.prompt,
            **objective.task_settings(experiment),
        )

    return Objective(objective.facts(experiment, batches.order), (), task)


def held_out_batches(experiment: Experiment, phases: Sequence[Phase]) -> PackedBatches | None:
    """Batches of data/validation. Documents are unchanged, but if a phase of the training flips pairs, text-image pairs
    come in both directions. Returns None and prints a line if no document is held out.
    """
    both = any(phase.flip_pairs for phase in phases)  # so that both directions have the same weight
    as_it_stands = Phase(flip_pairs=0.5 if both else 0.0, condition_dropout=0.0)
    return objective.held_out_batches(experiment, PackedBatches, as_it_stands)
