"""An image tokenizer from elsewhere: the folder in `image_tokenizer.model` decides the keys of config.image_tokenizer
that describe the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from ar_tokenizers.image.tokenizer import WEIGHTS, saved_config
from ml_collections import ConfigDict

from ar_unified.errors import UserError, about
from ar_unified.interop import IMAGE_SYSTEMS
from ar_unified.recognised import recognised

KEY = "config.image_tokenizer"


def describe(section: ConfigDict, asked: Collection[str]) -> None:
    """Sets the keys of config.image_tokenizer to the shape of the network in the folder `model`, and `steps` to 0,
    because this network is not trained.

    Args:
        asked: keys of the section that a person has set, other than `model`.

    Raises UserError if there is no image tokenizer, or another network was asked for.
    """
    try:
        with about(f"{KEY}.model"):
            theirs = dataclasses.asdict(saved_config(section.model)) | {"steps": 0}
    except UserError as error:
        if why := _instead(Path(section.model)):
            raise UserError(
                f"{KEY}.model: {section.model}: expected the folder of an image tokenizer; it {why}"
            ) from error
        raise
    for name in theirs.keys() & set(asked):
        if section[name] != theirs[name]:
            raise UserError(
                f"{KEY}.{name}: expected {theirs[name]!r}, as the tokenizer in {KEY}.model has; found {section[name]!r}"
            )
    try:
        section.update(theirs)
    except (TypeError, ValueError) as error:  # possible if another program made the tokenizer
        raise UserError(f"{KEY}.model: {section.model}: {error}") from error


def _instead(folder: Path) -> str:
    """What a folder is that is no image tokenizer; "" if nothing is known about it, or if it is a damaged one."""
    if (folder / WEIGHTS).exists():
        return ""
    if ((inner := folder / "image_tokenizer") / "config.json").exists():
        return f"has one inside: name {inner}"
    if why := recognised(folder, model=False):
        return why
    if folder.suffix == ".safetensors" or any(folder.glob("*.safetensors")):
        systems = " | ".join(IMAGE_SYSTEMS)
        return (
            f"has published weights: `ar-unified import --from {folder} --as {systems} --output FOLDER` converts them"
        )
    return ""
