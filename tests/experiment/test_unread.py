"""A key that a person gave, and that nothing reads with the rest of the config, is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ar_unified.bundle import Bundle
from ar_unified.experiment import config as configs
from ar_unified.experiment.unread import unread
from tests import bundles
from tests.experiment.test_check import SHAPES


def told(**changes: Any) -> list[str]:
    """The keys that are told."""
    overrides = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    config = configs.load(SHAPES, overrides)

    def bundle() -> Bundle | None:
        return Bundle(config.init) if config.init else None

    return [line.partition(" ")[0].removeprefix("config.") for line in unread(config, bundle, overrides)]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        (dict(image_tokenizer__steps=0, image_tokenizer__mirror=True), ["image_tokenizer.mirror"]),
        (dict(image_tokenizer__steps=0, image_tokenizer__adversary__kind="patch"), ["image_tokenizer.adversary.kind"]),
        (dict(image_tokenizer__steps=0, image_tokenizer__factor=16), []),
        (dict(image_tokenizer__crop=0, image_tokenizer__short_side=99), ["image_tokenizer.short_side"]),
        (dict(image_tokenizer__crop=32, image_tokenizer__short_side=99), []),
        (dict(text_tokenizer__model="a", text_tokenizer__vocab_size=99), ["text_tokenizer.vocab_size"]),
        (dict(text_tokenizer__vocab_size=99, image_tokenizer__mirror=True, training__steps=9), []),
        (dict(lora__alpha=3.0), ["lora.alpha"]),
        (dict(lora__alpha=3.0, lora__rank=2), []),
        (dict(preference__beta=0.5, reward__group_size=4), ["preference.beta", "reward.group_size"]),
        (dict(preference__beta=0.5, training__objective="preference"), []),
    ],
)
def test_keys_that_nothing_reads(changes: dict[str, Any], keys: list[str]) -> None:
    assert told(**changes) == keys


def test_what_a_bundle_brings_is_not_trained(tmp_path: Path) -> None:
    bundles.write(tmp_path / "bundle")
    keys = dict(text_tokenizer__vocab_size=99, image_tokenizer__steps=9, image_tokenizer__learning_rate=0.1)
    expected = [key.replace("__", ".") for key in keys]
    assert told(init=str(tmp_path / "bundle"), **keys) == expected and told(**keys) == []


def test_a_bundle_that_is_gone_is_opened_for_no_other_key(tmp_path: Path) -> None:
    gone = dict(init=str(tmp_path / "gone"))
    keys = ["text_tokenizer.vocab_size", "lora.alpha"]
    assert told(**gone, training__steps=9, text_tokenizer__vocab_size=99, lora__alpha=3.0) == keys
