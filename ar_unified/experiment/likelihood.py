"""The objective "likelihood": next-token prediction on documents, as in pretraining and instruction tuning."""

from __future__ import annotations

from pathlib import Path

from ar_unified.data.loader import PackedBatches
from ar_unified.data.phases import Phase
from ar_unified.experiment import objective
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.objective import Objective
from ar_unified.training.tasks import TransformerTask


def likelihood(experiment: Experiment) -> Objective:
    """All tokens of the documents that `prepare` left."""
    batches = objective.training_batches(experiment, PackedBatches)

    def task(_: Path) -> TransformerTask:
        objective.tell(experiment, batches)
        both = any(phase.flip_pairs for phase in batches.phases)  # then both ways weigh alike
        as_it_stands = Phase(flip_pairs=0.5 if both else 0.0, condition_dropout=0.0)
        held_out = objective.held_out_batches(experiment, PackedBatches, as_it_stands)
        return TransformerTask(
            batch=batches.batch,
            validation=objective.validation(held_out),
            prompt_weight=experiment.config.loss.prompt,
            **objective.task_settings(experiment),
        )

    return Objective(objective.facts(experiment, batches.order), (), task)
