"""Train on your own folder, starting from a bundle, and write the result as another bundle.

    python examples/train_on_your_folder.py BUNDLE FOLDER WORKDIR NEW --config.training.steps=500

FOLDER holds images and captions.jsonl, vqa.jsonl or docs.jsonl (experiments/folder.py says more). Any key of the
experiment may follow. If it is killed and started again, it continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import ar_unified
from ar_unified.cli.main import main as ar_unified_command

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "folder.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and exports; returns the exit status of the first verb that fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("folder")
    parser.add_argument("workdir")
    parser.add_argument("new", help="the bundle to write")
    given, changes = parser.parse_known_args(argv)

    config = ["--config", f"{EXPERIMENT}:path={given.folder},init={given.bundle}"]
    for verb in ("tokenizer", "prepare", "train"):  # the bundle's tokenizers, token shards, the transformer
        if status := ar_unified_command([verb, *config, "--workdir", given.workdir, *changes]):
            return status
    if status := ar_unified_command(["export", "--workdir", given.workdir, "--output", given.new]):
        return status
    vocabulary = ar_unified.load(given.new).vocabulary
    print(f"{given.new}: a model of {vocabulary.text_size} text pieces and {vocabulary.codebook_size} image codes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
