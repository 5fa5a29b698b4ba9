"""Converts the published file of an image tokenizer (without a model) into a folder that this project loads, and back.

    weights.safetensors  config.json       as `ImageTokenizer.save` writes them
    published.safetensors                  tensors that the network does not use, if there are any
    published.json                         the name and dialect of the published file, and the settings beside it

`ImageTokenizer.load` opens the folder; `--config.image_tokenizer.model=FOLDER` uses it instead of training one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ar_tokenizers.files import whole_folder, write_bytes
from ar_tokenizers.image.published import not_read, settings_of, to_published
from ar_tokenizers.image.tokenizer import WEIGHTS, ImageTokenizer

from ar_unified.errors import UserError, about, in_words
from ar_unified.interop import DIALECTS
from ar_unified.interop.images import SETTINGS, Images, open_images, settings_file, tensors_of
from ar_unified.interop.sources import ALONE, DTYPES, open_source, read_json
from ar_unified.tensors import Kind, TensorWriter
from ar_unified.workdir import write_json

PUBLISHED = "published.json"
_RECORD = {"image_dialect": str, "image_prefix": str, "image_dtypes": dict, "file": str, "settings": dict}


def is_one(folder: Path) -> bool:
    """Whether this is the folder of an image tokenizer, and not a bundle."""
    return (folder / WEIGHTS).exists()


def import_tokenizer(system: str, path: Path, output: str) -> tuple[ImageTokenizer, list[str]]:
    """Writes the folder, whole or not at all.

    Args:
        system: one of `interop.IMAGE_SYSTEMS`.
        path: a .safetensors file or its folder.

    Returns:
        The tokenizer, and notes for a person, one sentence each.

    Raises UserError if `output` exists or the file is not from such a tokenizer. Raises OSError if reading or writing
    fails.
    """
    images = open_images(system, path)
    settings = settings_file(system, path)
    beside = {} if settings is None else {settings.name: settings.read_text(encoding="utf-8")}
    record = {"system": system, **images.record, "file": _file(path), "settings": beside}
    with _new(output) as here:
        images.tokenizer.save(here)
        write_json(here / PUBLISHED, record)
    return images.tokenizer, list(_notes(images, path))


def _file(path: Path) -> str:
    """The name of the file that an export writes. It is one file, even if the tokenizer was read from several."""
    there = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return there[0].name if len(there) == 1 else ALONE


def _notes(images: Images, path: Path) -> Iterator[str]:
    if why := images.tokenizer.no_decoder:
        yield why
    names = open_source(path).names()
    own = [name.removeprefix(images.prefix) for name in names if name.startswith(images.prefix)]
    if lost := not_read(own, images.dialect):
        yield f"Left out: {len(lost)} tensors that the network does not use, such as {lost[0]}."
    if others := len(names) - len(own):
        yield f"Left out: {others} tensors of the model in the same file."


def export_tokenizer(folder: Path, dialect: str, output: str) -> None:
    """Writes the published file, and its settings beside it, whole or not at all.

    Args:
        dialect: one of `interop.DIALECTS`; "" means the dialect of the published file.

    Raises UserError if `output` exists, `folder` is no image tokenizer, or the dialect is for another network.
    """
    with about(str(folder)):
        tokenizer = ImageTokenizer.load(folder)
    record = _record(folder) if (folder / PUBLISHED).exists() else None
    expected = f"{folder}: --to: expected one of {', '.join(DIALECTS)}, because this is an image tokenizer"
    if dialect and dialect not in DIALECTS:
        raise UserError(f"{expected}; found {dialect}")
    if not dialect and record is None:
        raise UserError(f"{expected} that was not imported; found none")
    with about(str(folder)):
        if record is not None and dialect in ("", record["image_dialect"]):
            tensors, file, settings = tensors_of(tokenizer, record), record["file"], dict(record["settings"])
        else:
            tensors, file = to_published(tokenizer, dialect), ALONE
            said = settings_of(tokenizer.config, dialect)
            settings = {"config.json": json.dumps(said, indent=2) + "\n"} if said else {}
    kinds = {name: Kind(array.shape, str(array.dtype)) for name, array in tensors.items()}
    size = sum(array.nbytes for array in tensors.values()) + 1
    with _new(output) as here:
        with TensorWriter(here, kinds, size, alone=True, stem=Path(file).stem, metadata={"format": "pt"}) as writer:
            for name, array in tensors.items():
                writer.put(name, array)
        for name, content in settings.items():
            write_bytes(here / name, content.encode())


def _record(folder: Path) -> dict[str, Any]:
    """The content of published.json. Raises UserError if it is not what an import writes."""
    path = folder / PUBLISHED
    found = read_json(path)
    for key, kind in _RECORD.items():
        if not isinstance(found.get(key), kind):
            raise UserError(
                f"{path}: {key}: expected a value that `ar-unified import` wrote, found {found.get(key)!r:.80}"
            )
    known = [name for names in SETTINGS.values() for name in names]
    wrong = [
        *(name for name in (found["file"],) if Path(name).name != name or Path(name).suffix != ".safetensors"),
        *(name for name, content in found["settings"].items() if name not in known or not isinstance(content, str)),
        *(kind for kind in found["image_dtypes"].values() if kind not in DTYPES),
        *(name for name in (found["image_dialect"],) if name not in DIALECTS),
    ]
    if wrong or "" not in found["image_dtypes"]:
        raise UserError(
            f"{path}: expected only values that `ar-unified import` wrote, found {[*wrong, 'no dtype'][0]!r:.80}"
        )
    return found


@contextmanager
def _new(output: str) -> Iterator[Path]:
    try:
        with whole_folder(output) as here:
            yield here
    except FileExistsError as error:
        raise UserError(f"{in_words(error)}: name another folder, or remove this one") from error
