"""The image tokenizer of a published system, from the model's own file or from a file beside it."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from ar_tokenizers.image.published import config_of, dialect_in, from_published, to_published
from ar_tokenizers.image.tokenizer import ImageTokenizer

from ar_unified.errors import UserError, about, in_words
from ar_unified.interop.sources import DTYPES, Source, inside, open_source, read_json
from ar_unified.manifests import Json

# The possible names of the file with an image tokenizer's settings. A system without a name here has published no
# settings.
SETTINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "chameleon_vq": ("vqgan.json", "vqgan.yaml", "config.json"),
        "ibq": ("config.yaml", "config.json"),
        "llamagen_vq": ("config.json",),
        "janus_vq": ("config.json",),
        "emu3_vq": ("config.json",),
        "showo_vq": (),
        "lwm_vq": (),
        "movqgan": (),
    }
)


@dataclass(frozen=True)
class Images:
    """An image tokenizer that was read from published files.

    Attributes:
        usual: side of the images that the tokenizer was published for, in pixels.
        dialect: the kind of names that the tensors have in its file.
        prefix: the beginning of its tensors' names in the file; "" if the file has only these tensors.
        dtypes: dtypes of the file's floats. The key "" has the most common dtype; only tensors of another dtype have a
            key of their own.
    """

    tokenizer: ImageTokenizer
    usual: int
    dialect: str
    prefix: str
    dtypes: Mapping[str, str]

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width, in codes, of an image with sides of `usual` pixels."""
        return (self.usual // self.tokenizer.factor,) * 2

    @property
    def record(self) -> dict[str, Json]:
        """What `tensors_of` needs to give the file's tensors back, as JSON values."""
        return {"image_dialect": self.dialect, "image_prefix": self.prefix, "image_dtypes": dict(self.dtypes)}


def open_images(system: str, path: Path, otherwise: Mapping[str, Json] = MappingProxyType({})) -> Images:
    """Reads an image tokenizer from a file of its own, or from a model's file without reading the rest of it.

    Args:
        system: a key of SETTINGS.
        path: the file or its folder.
        otherwise: the settings that are used if no file has any.

    Raises UserError if settings or tensors do not belong to such a tokenizer.
    """
    found = settings_file(system, path)
    settings = read_settings(found) if found is not None else otherwise
    source = open_source(path)
    with about(str(path)):
        dialect, prefix = dialect_in(system, source.names())
    return read_images(system, settings, source, dialect, str(path), prefix)


def read_images(
    system: str, settings: Mapping[str, Json], source: Source, dialect: str, where: str, prefix: str = ""
) -> Images:
    """Makes the tokenizer from a file's tensors.

    Args:
        system: a key of SETTINGS.
        settings: the settings published with the tokenizer; {} if there are none.

    Raises UserError for settings or tensors that are not such a tokenizer's.
    """
    names = {name.removeprefix(prefix): name for name in sorted(source.names()) if name.startswith(prefix)}
    kinds = {short: source.dtype(name) for short, name in names.items()}
    tensors = {short: source.read(name) for short, name in names.items()}
    with about(f"{where}: image tokenizer"), _settings():
        tokenizer = from_published(config_of(system, settings, names), tensors, dialect)
    (most, _), *_ = collections.Counter(kind for kind in kinds.values() if kind != "I64").most_common(1) or [("F32", 0)]
    others = {short: kind for short, kind in kinds.items() if kind not in (most, "I64")}
    return Images(tokenizer, _resolution(settings) or 512, dialect, prefix, {"": most} | others)


def tensors_of(tokenizer: ImageTokenizer, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of the file that a tokenizer was imported from. `record` is `Images.record`. Raises the same errors
    as `to_published`."""
    dtypes = record["image_dtypes"]
    return {
        record["image_prefix"] + name: array
        if np.issubdtype(array.dtype, np.integer)
        else array.astype(DTYPES[dtypes.get(name, dtypes[""])], copy=False)
        for name, array in to_published(tokenizer, record["image_dialect"]).items()
    }


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """A context for using settings that are not trusted. It turns the errors of unexpected values into a ValueError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected the settings that were published with the tokenizer: {type(error).__name__}: {error}"
        ) from error


def _resolution(settings: Mapping[str, Json]) -> int:
    """The side of the images that a tokenizer was made for, from its settings; 0 if they do not say it."""
    found = settings.get("resolution")
    if type(found) is int and found > 0:
        return found
    return next((side for part in settings.values() if isinstance(part, Mapping) and (side := _resolution(part))), 0)


def settings_file(system: str, path: Path) -> Path | None:
    """The first of a system's settings files that exists in an image tokenizer's folder, or None. Raises UserError
    if that file leads out of the folder."""
    folder = path if path.is_dir() else path.parent
    return next((inside(folder, name) for name in SETTINGS[system] if (folder / name).exists()), None)


def read_settings(path: Path) -> dict[str, Json]:
    """The settings in a .json or .yaml file. Raises UserError if the file cannot be read."""
    if path.suffix == ".json":
        return read_json(path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = in_words(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: expected YAML: {said}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected keys and values, found {found!r:.80}")
    return found
