"""Turn an experiment's documents into token shards, on all processes of a job or in an Apache Beam pipeline.

Reads the sources and both tokenizers. Writes into the workdir:
  data/train, data/validation   ArrayRecord shards, an index of lengths, and manifest.json with the vocabulary
  data/*/skipped.jsonl          every item that was left out: its place, the kind of problem, and the problem
  data/filters.json             items left out by filters that compare items (config.data.filters), and why
  image_codes                   the codes of all images so far; still valid if the text tokenizer or a source changes
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ar_unified.experiment.data import prepare
from ar_unified.experiment.start import open_experiment


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Makes the token shards of the experiment; returns the exit status. Raises UserError, RunError."""
    prepare(open_experiment(arguments, overrides, ["data"]), arguments.beam)
    return 0
