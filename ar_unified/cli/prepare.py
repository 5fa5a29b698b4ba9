"""Turn an experiment's documents into token shards.

Reads the sources and both tokenizers. Leaves in the workdir:
  data/train, data/validation   ArrayRecord shards, an index of lengths, manifest.json with the vocabulary
  data/*/skipped.jsonl          every item that was left out: where it stands, its kind, what was wrong
  data/filters.json             with config.data.filters that compare items: which are left out for others
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from ar_unified.data import prepare as preparing
from ar_unified.data.filters import filtered
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.start import by_first_process, open_experiment


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    prepare(open_experiment(arguments, overrides, ["data"]))
    return 0


@by_first_process
def prepare(experiment: Experiment) -> None:
    """Stage data: train and validation, each of which continues where it was interrupted."""
    filters = settings.filters(experiment.config)
    keys = ("image_size", "resize", "layout", "max_tokens", *(("filters",) if filters.used else ()))
    stage = experiment.stage(
        "data",
        data={key: configs.plain(experiment.config.data[key]) for key in keys},
        sources=experiment.fingerprints(held_out=True),
        text_hash=experiment.text_tokenizer.hash,
        image_hash=experiment.image_tokenizer.hash,
    )
    if stage.done:
        return experiment.skip(stage)
    summary, held_out = {}, [source for those in experiment.held_out.values() for source in those]
    train = filtered(experiment.train, held_out, filters, stage.folder / "filters.json")
    for split, sources in (("train", train), ("validation", experiment.held_out["validation"])):
        if not sources:
            continue
        report = preparing.prepare(
            sources,
            experiment.grammar,
            experiment.image_tokenizer,
            stage.folder / split,
            max_tokens=experiment.config.data.max_tokens,
            resize=experiment.resize,
            may_be_lost=split == "validation",
        )
        experiment.say(f"{split}:\n{report}")
        summary[split] = {name: asdict(counts) for name, counts in report.sources.items()}
    experiment.finish(stage, summary)
