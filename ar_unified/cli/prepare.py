"""Turn an experiment's documents into token shards, on all processes of a job.

Reads the sources and both tokenizers. Leaves in the workdir:
  data/train, data/validation   ArrayRecord shards, an index of lengths, manifest.json with the vocabulary
  data/*/skipped.jsonl          every item that was left out: where it stands, its kind, what was wrong
  data/filters.json             with config.data.filters that compare items: what they leave out, and why
  image_codes                   the codes of all images so far: another text tokenizer or source does not change them
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import jax
from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified import storage
from ar_unified.data import prepare as preparing
from ar_unified.data.filters import filtered
from ar_unified.data.images import NoImages
from ar_unified.data.items import Source
from ar_unified.data.prepare.claims import Team
from ar_unified.data.prepare.encoder import Tokenizers
from ar_unified.data.prepare.image_codes import ImageCodes
from ar_unified.experiment import config as configs
from ar_unified.experiment import settings
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.start import open_experiment
from ar_unified.parallel import runtime
from ar_unified.workdir import Stage


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Makes the token shards of the experiment; returns the exit status. Raises UserError."""
    prepare(open_experiment(arguments, overrides, ["data"]))
    return 0


def prepare(experiment: Experiment) -> None:
    """Stage data, by all processes: train and validation, each of which continues where it was interrupted."""
    filters = settings.filters(experiment.config)
    keys = ("image_size", "resize", "layout", "max_tokens", *(("filters",) if filters.used else ()))
    with experiment.leaving_nothing():
        stage = experiment.stage(
            "data",
            data={key: configs.plain(experiment.config.data[key]) for key in keys},
            sources=experiment.fingerprints(held_out=True),
            text_hash=experiment.text_tokenizer.hash,
            image_hash=experiment.image_tokenizer.hash,
            together=True,
        )
        if stage.done:
            return experiment.skip(stage)
        _prepare(experiment, stage)


def _prepare(experiment: Experiment, stage: Stage) -> None:
    known = _codes(experiment, refresh=True) if runtime.first() else None  # before the others open it
    splits = {"train": _filtered(experiment, stage), "validation": experiment.held_out["validation"]}
    codes = known if known is not None else _codes(experiment, refresh=False)
    if runtime.first():
        for split in splits:  # left by a job that has ended: nobody works here yet
            storage.remove_tree(stage.folder / split / preparing.CLAIMS)
    tokenizer, summary = experiment.image_tokenizer, dict[str, object]()
    tokenizers = Tokenizers(_replicas(tokenizer), codes)
    with runtime.apart() as alive:
        team = Team(jax.process_index(), jax.process_count(), alive=alive)
        for split, sources in splits.items():
            if not sources:
                continue
            report = preparing.prepare(
                sources,
                experiment.grammar,
                tokenizer,
                stage.folder / split,
                max_tokens=experiment.config.data.max_tokens,
                resize=experiment.resize,
                may_be_lost=split == "validation",
                tokenizers=tokenizers,
                team=team,
            )
            experiment.say(f"{split}:\n{report}")
            summary[split] = {name: asdict(counts) for name, counts in report.sources.items()}
        if tokenizers.encoded or tokenizers.known:
            experiment.say(f"images: {tokenizers.encoded} encoded here, {tokenizers.known} known ({tokenizers})")
    experiment.finish(stage, summary)


def _filtered(experiment: Experiment, stage: Stage) -> list[Source]:
    """The sources of the training without what the filters leave out. Process 0 compares, the others read its
    verdicts.
    """
    held_out = [source for those in experiment.held_out.values() for source in those]

    def decided() -> list[Source]:
        return filtered(experiment.train, held_out, settings.filters(experiment.config), stage.folder / "filters.json")

    found = decided() if runtime.first() else []
    runtime.barrier("filters", timeout=runtime.ALONE)
    return found if runtime.first() else decided()


def _replicas(tokenizer: ImageTokenizer | NoImages) -> list[ImageTokenizer | NoImages]:
    """One replica for each device of this process; one alone on a CPU, because its faked devices share its cores."""
    devices = jax.local_devices()
    if isinstance(tokenizer, NoImages) or len(devices) == 1 or devices[0].platform == "cpu":
        return [tokenizer]
    return [tokenizer.on(device) for device in devices]


def _codes(experiment: Experiment, refresh: bool) -> ImageCodes:
    tokenizer = experiment.image_tokenizer
    return ImageCodes(experiment.workdir.image_codes, tokenizer.hash, tokenizer.codebook_size, refresh=refresh)
