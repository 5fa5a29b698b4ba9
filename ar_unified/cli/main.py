"""`ar-unified VERB --config FILE[:arg] --workdir DIR [--config.key=value ...]`"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from ar_unified.errors import RunError, UserError

VERBS = {
    "run": "every stage of an experiment in order: tokenizer, prepare, train, sample, evaluate",
    "tokenizer": "train the text and the image tokenizer",
    "prepare": "turn the experiment's documents into token shards",
    "train": "train the transformer on the shards",
    "sample": "write interleaved documents for the prompts of a JSONL file",
    "evaluate": "score the tokenizer and the model on held-out documents; write evaluation.json and report.html",
    "plan": "compile the training or sampling for a TPU slice or GPUs that are not here: memory, traffic, time",
    "validate": "check a dataset folder or a config and print what is in it, bad items by file and line",
}


def _overview() -> str:
    lines = [f"  {verb:<10} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: ar-unified VERB --config FILE[:arg] --workdir DIR [--config.key=value ...]",
            "",
            "Train and sample autoregressive image+text models.",
            "",
            *lines,
            "",
            "`ar-unified VERB --help` says what a verb reads, what it leaves in the workdir, and its options.",
            "Every verb can be killed and started again: what is finished is skipped, what was interrupted continues.",
            "Many hosts: the same command on each (BUILD.md, Many processes).",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the process's exit status (2 for a call that cannot be understood)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        print(f"ar-unified: unknown verb {verb!r}; expected one of {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    _quiet_libraries()
    from ar_unified.parallel import runtime  # not before the switches above, nor for --help

    module = importlib.import_module(f"ar_unified.cli.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"ar-unified {verb}",
        description=module.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(rest)
    stray = [word for word in unknown if not (word.startswith("--config.") and "=" in word)]
    if stray:
        parser.error(f"unknown arguments {' '.join(stray)} (a config key is changed by --config.KEY=VALUE)")
    try:
        with runtime.ending():
            return int(module.main(arguments, unknown) or 0)
    except (UserError, RunError) as error:
        if os.environ.get("AR_UNIFIED_DEBUG"):
            raise
        print(f"ar-unified {verb}: {error}", file=sys.stderr)
        return error.exit_status


def _quiet_libraries() -> None:
    """Our lines are the ones to read: the libraries' informational logs start at warnings."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    from absl import logging

    logging.set_verbosity(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
