"""Check a dataset, or all data of an experiment, and show on a page what is in it. No data are changed.

Prints counts, lengths, every bad item with its file, line and kind, and the items that occur twice or are also held
out. Then it prints the first documents as the model will see them: as tokens if both tokenizers exist already, else
with placeholders for images. If the text tokenizer loses text, the output says so first. All of this is also written
to an HTML page, with images. The exit status is 1 if an item is bad.

  ar-unified validate DIR [--links]                           a folder with captions.jsonl, docs.jsonl and/or vqa.jsonl,
                                                              or of Parquet, Arrow, tar or text files
  ar-unified validate FILE                                    one such file: .jsonl (.gz, .zst), .parquet, .arrow, .tar
  ar-unified validate '{"kind": "tfds", "name": "mnist"}'     a source as in config.data, or several in [ ]
  ar-unified validate WORKDIR/data [--workdir WORKDIR]        what `prepare` wrote, decoded with that workdir's files
  ar-unified validate --config FILE[:arg] [--workdir DIR]     training, validation and tests of an experiment,
                                                              without what its data.filters leave out
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ar_unified import storage
from ar_unified.cli.arguments import refuse_unread
from ar_unified.data.checks import page, prepared
from ar_unified.data.checks.validate import Validation, validate
from ar_unified.data.images import NoImages
from ar_unified.errors import NO, UserError, about
from ar_unified.experiment import config as configs
from ar_unified.experiment.check import check
from ar_unified.experiment.experiment import Experiment
from ar_unified.experiment.settings import extension, filters, language, longest
from ar_unified.experiment.text_tokenizer import load, told
from ar_unified.experiment.unread import unread
from ar_unified.language.grammar import Grammar
from ar_unified.language.record import FILE as LANGUAGE
from ar_unified.language.record import text_in
from ar_unified.manifests import Json
from ar_unified.workdir import Workdir


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prints what is in the data and writes the page; returns 1 if an item is bad. Raises UserError."""
    if (arguments.data is None) == (arguments.config is None):
        raise UserError("expected either a folder or --config; see --help")
    if arguments.first is not None and arguments.first < 1:
        raise UserError(f"--first: expected at least 1, found {arguments.first}")
    if arguments.data is None:
        name, found = _of_config(arguments, overrides)
    else:
        name, found = _of_data(arguments, overrides)
    print(found)
    output = Path(arguments.output or Path(".cache") / "validate" / f"{name}.html")
    with about(f"--output {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        page.write(output, found, name)
    print(f"page: {output}")
    return NO if any(not bad.filtered for bad in found.bad) else 0


def _of_data(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[str, Validation]:
    """Returns a name for the page, and what is in the data: a folder, a file, or sources as JSON."""
    if overrides:
        raise UserError(f"{overrides[0]} does nothing without --config: leave it out")
    options = dict(show=arguments.show, first=arguments.first)
    if arguments.data.lstrip()[:1] in ("{", "["):
        refuse_unread(arguments, "with sources as JSON, which have their own key `links`", "links")
        refuse_unread(arguments, "with sources as JSON", "workdir")
        return "sources", validate(_specs(arguments.data), **options)
    folder = storage.path(arguments.data)
    name = folder.resolve().name or "data"
    if isinstance(folder, storage.Remote):
        refuse_unread(arguments, "with an object store, which has no links", "links")
        if {"plan.json", "manifest.json"} <= set(storage.names_in(folder) if folder.is_dir() else ()):
            raise UserError(f"{folder}: a prepared folder can only be checked on disk: copy it from the store first")
        refuse_unread(arguments, "with a folder of sources", "workdir")
        return name, validate(str(folder), **options)
    if parts := prepared.parts(folder):
        refuse_unread(arguments, "with a prepared folder", "links")
        # WORKDIR/data, or WORKDIR/data/train
        around = [path for path in (folder.resolve().parent, folder.resolve().parent.parent) if _has_tokenizers(path)]
        workdir = Path(arguments.workdir) if arguments.workdir else around[0] if around else None
        if workdir is None:
            return name, prepared.look(parts, **options)
        experiment = Experiment(configs.recorded(workdir / "config.json"), Workdir(workdir, reader=True))
        _, rows = longest(experiment.config.training)
        with about(f"the tokenizers of {workdir}"):
            seen = experiment.grammar, experiment.image_tokenizer
        return name, prepared.look(parts, *seen, sequence_length=rows, **options)
    refuse_unread(arguments, "with a folder", "workdir")
    if (folder / LANGUAGE).is_file() and (folder / "config.json").is_file():
        raise UserError(f"{folder}: expected data, found a bundle, which is a model; give the data to look at")
    if _has_tokenizers(folder):
        raise UserError(f"{folder}: expected data, found a workdir; `prepare` writes its data into {folder / 'data'}")
    return name, validate(folder, links=arguments.links, **options)


def _has_tokenizers(workdir: Path) -> bool:
    return (workdir / "config.json").exists() and (workdir / "text_tokenizer").exists()


def _specs(text: str) -> list[dict[str, Json]]:
    """One source or several, as JSON. Raises UserError."""
    try:
        specs = json.loads(text)
    except ValueError as error:
        raise UserError(f"expected a source as JSON, found {text[:60]!r}: {error}") from error
    specs = specs if isinstance(specs, list) else [specs]
    if not specs or not all(isinstance(spec, dict) for spec in specs):
        raise UserError(f"expected a source or a list of sources as JSON, found {text[:60]!r}")
    return specs


def _of_config(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[str, Validation]:
    """The name of an experiment, and what is in its sources."""
    refuse_unread(arguments, "with --config, whose sources have their own key `links` (folder.py: links=yes)", "links")
    config = configs.load(arguments.config, overrides)
    check(config, [])
    experiment = Experiment(config, Workdir(arguments.workdir or Path(".cache") / "validate" / config.name))
    for line in unread(config, lambda: experiment.bundle, overrides):
        print(f"note: {line}")
    trained = (experiment.workdir.image_tokenizer / "config.json").exists()
    text = text_in(experiment.workdir.text_tokenizer, "warn")
    ready = trained or (text is not None and experiment.text_only)
    grammar, images = (experiment.grammar, experiment.image_tokenizer) if ready else (None, None)
    if experiment.bundle is not None and experiment.extends and not ready:
        text, images = experiment.bundle.text_tokenizer, experiment.brought
        if images is not None:
            grammar = extension(config, experiment.bundle.grammar, images.config, images.hash)
    elif experiment.bundle is not None and not ready:
        text, grammar = experiment.bundle.text_tokenizer, experiment.bundle.grammar
        images = experiment.bundle.image_tokenizer() or NoImages()
    elif not ready:
        if config.text_tokenizer.model and text is None:
            text = load(config.text_tokenizer)
        if text is not None and (images := experiment.brought) is not None:
            grammar = Grammar(*language(config, images.config, text.size, text.hash, images.hash), text)
    for line in told(text.losses if text else ()):
        print(line)
    if grammar is None:
        print(
            "note: config.data.max_tokens is not checked, because there are no tokenizers yet (`ar-unified tokenizer`)"
        )
    found = validate(
        experiment.all_specs(),
        grammar,
        images,
        resize=experiment.resize,
        filters=filters(config),
        max_tokens=config.data.max_tokens,
        sequence_length=longest(config.training)[1],
        show=arguments.show,
        first=arguments.first,
    )
    return config.name, found
