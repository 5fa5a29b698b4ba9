"""Check a dataset folder, or an experiment's sources, and print what is in it; nothing is changed.

Prints counts, lengths, every bad item by file, line and kind, and the first documents as the model will see them: with
placeholders for images, or as real tokens where both tokenizers are in the workdir already, or come from elsewhere.
How the text tokenizer loses text is told first. The exit status is 1 if an item is bad.

  ar-unified validate DIR [--links]                           a folder with captions.jsonl, docs.jsonl and/or vqa.jsonl,
                                                              or of Parquet, Arrow, tar or text files
  ar-unified validate FILE                                    one such file: .jsonl (.gz, .zst), .parquet, .arrow, .tar
  ar-unified validate --config FILE[:arg] [--workdir DIR]     the sources of an experiment
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ar_unified.cli.arguments import refuse_unread
from ar_unified.data.images import NoImages
from ar_unified.data.validate import validate
from ar_unified.errors import NO, UserError
from ar_unified.experiment import config as configs
from ar_unified.experiment.check import check
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.settings import language
from ar_unified.experiment.text_tokenizer import load, told
from ar_unified.language.grammar import Grammar
from ar_unified.language.record import text_in
from ar_unified.workdir import Workdir


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    if (arguments.folder is None) == (arguments.config is None):
        raise UserError("expected a folder or --config, one of the two; --help says more")
    if arguments.folder is not None:
        refuse_unread(arguments, "with a folder", "workdir")
        if overrides:
            raise UserError(f"a folder has no config: {overrides[0]} does nothing")
        found = validate(arguments.folder, links=arguments.links, show=arguments.show)
    else:
        refuse_unread(arguments, "with --config, whose sources say it themselves (links=yes)", "links")
        config = configs.load(arguments.config, overrides)
        check(config, [])
        experiment = Experiment(config, Workdir(arguments.workdir or Path(".cache") / "validate" / config.name))
        trained = (experiment.workdir.image_tokenizer / "config.json").exists()
        text = text_in(experiment.workdir.text_tokenizer, "warn")
        ready = trained or (text is not None and experiment.text_only)
        grammar, images = (experiment.grammar, experiment.image_tokenizer) if ready else (None, None)
        if experiment.bundle is not None and not ready:
            text, grammar = experiment.bundle.text_tokenizer, experiment.bundle.grammar
            images = experiment.bundle.image_tokenizer() or NoImages()
        elif not ready:
            if config.text_tokenizer.model and text is None:
                text = load(config.text_tokenizer)
            if text is not None and (images := experiment.brought) is not None:
                grammar = Grammar(*language(config, images.config, text.size, text.hash, images.hash), text)
        for line in told(text.losses if text else ()):
            print(line)
        found = validate(
            experiment.specs(config.data.train),
            grammar,
            images,
            resize=experiment.resize,
            max_tokens=config.data.max_tokens,
            show=arguments.show,
        )
    print(found)
    return NO if found.bad else 0
