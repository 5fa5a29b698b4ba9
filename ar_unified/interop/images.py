"""The image tokenizer of a published system, out of the model's own file or of one beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from ar_tokenizers.image import movq_weights
from ar_tokenizers.image.published import config_of, from_published
from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified.errors import UserError, about, in_words
from ar_unified.interop.sources import Source, inside, read_json


@dataclass(frozen=True)
class Images:
    """An image tokenizer that was read.

    Attributes:
        usual: side of the images it was published for, in pixels. prefix: of its tensors' names in the model's file;
            "": it has a file of its own.
        record: what an export to that file needs.
    """

    tokenizer: ImageTokenizer
    usual: int
    prefix: str
    record: Mapping[str, Any]

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of such an image."""
        return (self.usual // self.tokenizer.factor,) * 2


def read_images(
    system: str, settings: Mapping[str, Any], source: Source, dialect: str, where: str, prefix: str = ""
) -> Images:
    """The tokenizer of a file's tensors.

    Args:
        system: emu3, movqgan, or one of `ar_tokenizers.image.published`. settings: as published with it, {} where
            nothing was.

    Raises UserError for settings or tensors that are not such a tokenizer's.
    """
    names = [name for name in source.names() if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): source.read(name) for name in sorted(names)}
    dtypes = sorted({source.dtype(name) for name in names if source.dtype(name) != "I64"})
    with about(f"{where}: image tokenizer"), _settings():
        if system == "emu3":
            dialect = movq_weights.dialect_of(tensors)
            config = movq_weights.config_from_emu3(settings)
        elif system == "movqgan":
            config = movq_weights.movqgan_270m()
        else:
            config = config_of(system, settings)
        tokenizer = from_published(config, tensors, dialect)
    usual = _resolution(settings) or 512
    record = {"image_dialect": dialect, "image_prefix": prefix, "image_dtype": dtypes[0] if dtypes else "F32"}
    return Images(tokenizer, usual, prefix, record if prefix else {})


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Around what is made of settings that somebody sent, whose values may be anything."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected the settings that were published with it: {type(error).__name__}: {error}"
        ) from error


def _resolution(settings: Mapping[str, Any]) -> int:
    """Of the images it was made for, wherever in its settings it stands; 0: nowhere."""
    found = settings.get("resolution")
    if type(found) is int and found > 0:
        return found
    return next((side for part in settings.values() if isinstance(part, Mapping) and (side := _resolution(part))), 0)


def read_settings(folder: Path, *names: str) -> dict[str, Any]:
    """The first of these .json and .yaml files that is there; {}: none. Raises UserError."""
    for name in names:
        if not (folder / name).exists():
            continue
        path = inside(folder, name)
        if path.suffix == ".json":
            return read_json(path)
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            said = in_words(error) if isinstance(error, OSError) else str(error)
            raise UserError(f"{path}: expected YAML: {said}") from error
        if not isinstance(found, dict):
            raise UserError(f"{path}: expected keys and values, found {found!r:.80}")
        return found
    return {}
