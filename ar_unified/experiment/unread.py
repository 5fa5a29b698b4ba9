"""Says which keys that a person gave do nothing with the rest of the config.

A command may repeat the keys of other stages, so a key is told only if no stage of this config reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ar_tokenizers.image.config import AutoencoderConfig
from ml_collections import ConfigDict

from ar_unified.bundle import Bundle

_SHAPE = {field.name for field in dataclasses.fields(AutoencoderConfig)}  # read also if nothing is trained


def unread(config: ConfigDict, bundle: Bundle | None, overrides: Sequence[str]) -> list[str]:
    """A remark for each "--config.key=value" that has no effect. bundle: that of config.init, if there is one."""
    given = [override.removeprefix("--config.").partition("=")[0] for override in overrides]
    rules = dict(_rules(config, bundle))
    return [
        f"config.{key} does nothing here, because {rules[found]}"
        for key in dict.fromkeys(given)
        for found in rules
        if key == found or key.startswith(f"{found}.")
    ]


def _rules(config: ConfigDict, bundle: Bundle | None) -> Iterator[tuple[str, str]]:
    """Keys or sections that nothing reads, each with the reason."""
    text, image = config.text_tokenizer, config.image_tokenizer
    if bundle is not None or text.model:
        where = "config.init" if bundle is not None else "config.text_tokenizer.model"
        for name in ("vocab_size", "model_type", "max_bytes", "temperature"):
            yield f"text_tokenizer.{name}", f"the text tokenizer of {where} is used as it is"
    brought = "config.image_tokenizer.model" if image.model else ""
    if not brought and bundle is not None and bundle.has_images:
        brought = "config.init"
    if brought or not image.steps:
        why = f"the image tokenizer of {brought} is used as it is" if brought else "config.image_tokenizer.steps is 0"
        for name in {*image.keys()} - _SHAPE - {"model", *(() if image.steps else ("steps",))}:
            yield f"image_tokenizer.{name}", why
    elif not image.crop:
        yield "image_tokenizer.short_side", "config.image_tokenizer.crop is 0, so images are not cropped at random"
    if not config.lora.rank:
        for name in {*config.lora.keys()} - {"rank", "init"}:
            yield f"lora.{name}", "config.lora.rank is 0, so no adapter is trained"
    for section in ("preference", "reward"):  # each has the name of its objective
        if config.training.objective != section:
            yield section, f"config.training.objective is {config.training.objective!r}"
