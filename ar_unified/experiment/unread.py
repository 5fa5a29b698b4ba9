"""Says which keys that a person gave do nothing with the rest of the config.

A command may repeat the keys of other stages, so a key is told only if no stage of this config reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from ar_tokenizers.image.config import AutoencoderConfig
from ml_collections import ConfigDict

from ar_unified.bundle import Bundle

_SHAPE = {field.name for field in dataclasses.fields(AutoencoderConfig)}  # read also if nothing is trained


def unread(config: ConfigDict, bundle: Callable[[], Bundle | None], overrides: Sequence[str]) -> list[str]:
    """A remark for each "--config.key=value" that has no effect.

    bundle: opens that of config.init. It is called only for keys that need it, because a finished training no longer
    needs the bundle with which it began.
    """
    given = [override.removeprefix("--config.").partition("=")[0] for override in overrides]
    sections = {key.partition(".")[0] for key in given}
    rules = {key: why for name, rule in _RULES.items() if name in sections for key, why in rule(config, bundle)}
    return [
        f"config.{key} does nothing here, because {rules[found]}"
        for key in dict.fromkeys(given)
        for found in rules
        if key == found or key.startswith(f"{found}.")
    ]


def _of_text(config: ConfigDict, _: Callable[[], Bundle | None]) -> Iterator[tuple[str, str]]:
    """Keys or sections that nothing reads, each with the reason. So do the other rules."""
    if config.init or config.text_tokenizer.model:
        where = "config.init" if config.init else "config.text_tokenizer.model"
        for name in ("vocab_size", "model_type", "max_bytes", "temperature"):
            yield f"text_tokenizer.{name}", f"the text tokenizer of {where} is used as it is"


def _of_images(config: ConfigDict, bundle: Callable[[], Bundle | None]) -> Iterator[tuple[str, str]]:
    image = config.image_tokenizer
    brought = "config.image_tokenizer.model" if image.model else ""
    if not brought and (found := bundle()) is not None and found.has_images:
        brought = "config.init"
    if brought or not image.steps:
        why = f"the image tokenizer of {brought} is used as it is" if brought else "config.image_tokenizer.steps is 0"
        for name in {*image.keys()} - _SHAPE - {"model", *(() if image.steps else ("steps",))}:
            yield f"image_tokenizer.{name}", why
    elif not image.crop:
        yield "image_tokenizer.short_side", "config.image_tokenizer.crop is 0, so images are not cropped at random"


def _of_adapter(config: ConfigDict, _: Callable[[], Bundle | None]) -> Iterator[tuple[str, str]]:
    if not config.lora.rank:
        for name in {*config.lora.keys()} - {"rank", "init"}:
            yield f"lora.{name}", "config.lora.rank is 0, so no adapter is trained"


def _of_objective(config: ConfigDict, _: Callable[[], Bundle | None]) -> Iterator[tuple[str, str]]:
    for section in ("preference", "reward"):  # each has the name of its objective
        if config.training.objective != section:
            yield section, f"config.training.objective is {config.training.objective!r}"


# By the section of which they judge keys.
_RULES = {
    "text_tokenizer": _of_text,
    "image_tokenizer": _of_images,
    "lora": _of_adapter,
    "preference": _of_objective,
    "reward": _of_objective,
}
