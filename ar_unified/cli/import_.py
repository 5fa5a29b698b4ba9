"""Make a bundle from a published model's files. `train`, `sample`, `evaluate`, `plan` and `ar_unified.load` can use it.

If the files have only an image tokenizer (--as llamagen_vq, emu3_vq, ...), it makes the same folder as the training of
an image tokenizer does. --config.image_tokenizer.model=FOLDER and `ImageTokenizer.load` can use this folder.

Reads a folder of .safetensors files with the config.json and the tokenizers that were published with them; nothing is
downloaded. Names, shapes and dtypes are checked before anything is written. Files with a missing or an unknown tensor
are refused. Convert pickled files (.pth, .ckpt) with `ar-unified convert-pickle` first. Tensors keep their dtype, and
`ar-unified export --from BUNDLE --to FORMAT` writes them again bit for bit. Only one tensor is in memory at a time.

  ar-unified import --from Emu3-Gen --as emu3 --image Emu3-VisionTokenizer --output BUNDLE
  ar-unified import --from models/7b --as chameleon --text tokenizer --image tokenizer/vqgan --output BUNDLE
  ar-unified import --from vq_ds16_t2i.safetensors --as llamagen_vq --output FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ar_unified.cli.arguments import refuse_unread
from ar_unified.errors import UserError
from ar_unified.interop import IMAGE_SYSTEMS
from ar_unified.interop.files import Files
from ar_unified.interop.image_tokenizer import import_tokenizer
from ar_unified.interop.importing import card, import_model
from ar_unified.interop.systems import OPEN
from ar_unified.model.config import parameter_count
from ar_unified.recognised import recognised, unknown_family


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Makes a bundle or an image tokenizer from published files; returns the exit status. Raises UserError."""
    if overrides:
        raise UserError(f"{overrides[0]} does nothing with import, which reads no config: leave it out")
    if arguments.shard_mib < 1:
        raise UserError(f"--shard-mib: expected at least 1, found {arguments.shard_mib}")
    for flag, path in _paths(arguments):
        if not path.exists():
            raise UserError(f"{flag} {path}: expected a file or a folder, found nothing")
    with _explained(arguments):
        return _image_tokenizer(arguments) if arguments.system in IMAGE_SYSTEMS else _model(arguments)


def _paths(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    given = (("--from", arguments.source), ("--text", arguments.text), ("--image", arguments.image))
    return [(flag, Path(path)) for flag, path in given if path]


@contextmanager
def _explained(arguments: argparse.Namespace) -> Iterator[None]:
    """Says what the files are, if they cannot be imported and are something else that is known."""
    try:
        yield
    except UserError as error:
        for flag, path in _paths(arguments):
            if str(path if path.is_dir() else path.parent) not in str(error):
                continue  # the error is about something else
            model = flag == "--from" and arguments.system not in IMAGE_SYSTEMS
            if why := recognised(path, arguments.system, model=model):
                raise UserError(f"{flag} {path}: it {why}") from error
            # Some publishers give their model a name of its own, so this alone is no reason to refuse it.
            if model and (kind := unknown_family(path)) and repr(kind) not in str(error):
                more = f"its config.json has model_type {kind!r:.40}, which is of none of the systems that import knows"
                raise UserError(f"{error}; {more}") from error
        raise


def _model(arguments: argparse.Namespace) -> int:
    files = Files(
        Path(arguments.source),
        text=Path(arguments.text) if arguments.text else None,
        image=Path(arguments.image) if arguments.image else None,
        theta=arguments.rope_theta,
        size=arguments.size,
    )
    published = OPEN[arguments.system](files)
    files.require_read()
    made = import_model(
        published,
        arguments.output,
        card=card(published, arguments.license),
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_mib << 20,
    )
    count = parameter_count(published.keys.config)
    print(f"{made.folder}: {published.system}, {count / 1e6:.1f}M parameters, {made.size / 1e6:.1f} MB")
    for note in published.notes:
        print(note)
    return 0


def _image_tokenizer(arguments: argparse.Namespace) -> int:
    refuse_unread(arguments, "for an image tokenizer alone", "text", "image", "rope_theta", "size", "dtype", "license")
    made, notes = import_tokenizer(arguments.system, Path(arguments.source), arguments.output)
    print(f"{arguments.output}: {arguments.system}, {made.codebook_size} codes of {made.factor} x {made.factor} pixels")
    for note in notes:
        print(note)
    return 0
