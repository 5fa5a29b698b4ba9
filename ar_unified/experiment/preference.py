"""The objective "preference": pairs of a chosen and a rejected answer, compared with the bundle that training begins
with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ar_unified.data.phases import Phase
from ar_unified.data.preferences import PreferenceBatches
from ar_unified.experiment import objective, settings
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.objective import Objective
from ar_unified.experiment.reference import reference
from ar_unified.training.preference import PreferenceTask


def preference(experiment: Experiment) -> Objective:
    """Learns from the pairs that `prepare` has made ready, and from their log-probabilities under the model of
    config.init."""
    batches = objective.training_batches(experiment, PreferenceBatches)

    def task(_: Path) -> PreferenceTask:
        objective.tell(experiment, batches)
        held_out = objective.held_out_batches(experiment, PreferenceBatches, Phase())
        made = PreferenceTask(
            batch=batches.batch,
            preference=settings.preference(experiment.config),
            **objective.task_settings(experiment),
        )
        if made.preference.uses_reference:
            for split, pairs in {"train": batches, "validation": held_out}.items():
                if pairs is not None:
                    pairs.reference = reference(experiment, made, split, pairs)
        return dataclasses.replace(made, validation=objective.validation(held_out))

    return Objective(objective.facts(experiment, batches.order), ("preference",), task)
