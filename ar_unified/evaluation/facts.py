"""Describes a run in a few lines: its config, and everything else that its numbers depend on."""

from __future__ import annotations

import dataclasses
import math
import platform
import subprocess
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
from ar_tokenizers.image.config import AutoencoderConfig

from ar_unified.evaluation.charts import number
from ar_unified.manifests import Json

PARTS = ("data", "images", "text", "training", "sampling")


def summary(config: Mapping[str, Json], parts: Collection[str] = PARTS) -> dict[str, str]:
    """A summary of a config in a few lines.

    parts: those of PARTS that decided what is reported. Parts that the config lacks, or that it says nothing about
        because they were brought from elsewhere, are left out.
    """

    def part(name: str) -> Mapping[str, Any]:
        found = config.get(name)
        return found if isinstance(found, Mapping) else {}

    data, image, text, train, sampling = map(
        part, ("data", "image_tokenizer", "text_tokenizer", "training", "sampling")
    )
    lines: dict[str, str] = {}
    if data.get("train"):
        sources = [str(s.get("name") or Path(str(s.get("path", ""))).name or s.get("kind")) for s in data["train"]]
        lines["data"] = ", ".join(dict.fromkeys(sources))
    if "image_size" in data and "factor" in image:
        height, width = data["image_size"]
        known = {field.name for field in dataclasses.fields(AutoencoderConfig)}
        shape = AutoencoderConfig.from_dict({key: value for key, value in image.items() if key in known})
        h, w = shape.grid(height, width)
        grid = f"{h} x {w} codes of {shape.codebook_size}"
        about = "of any shape, with the area of " if data.get("resize") == "aspect" else ""
        lines["images"] = f"{about}{height} x {width} pixels as {grid} ({shape.quantizer.upper()})"
    if "vocab_size" in text:
        lines["text"] = f"at most {text['vocab_size']} pieces ({text.get('model_type', '')})"
    if {"steps", "batch_size", "sequence_length"} <= train.keys():
        lines["training"] = _batches(train)
    if "guidance" in sampling:
        lines["sampling"] = f"guidance {sampling['guidance']:g}, batches of {sampling.get('batch_size', '?')}"
    if not (image.get("steps", 1) or image.get("model") or config.get("init")):
        lines.pop("images", None)  # an experiment of text alone
    if text.get("model") or config.get("init"):
        lines.pop("text", None)
    return {name: line for name, line in lines.items() if name in parts}


def _batches(train: Mapping[str, Any]) -> str:
    """The batches of a training: the number of steps for each size of batches, and the total number of tokens."""
    shape = train["batch_size"], train["sequence_length"]
    found = [(0, *shape)]  # for each part of the training: first step, rows of a batch, tokens of a row
    for change in train.get("phases", ()):
        shape = change.get("batch_size", shape[0]), change.get("sequence_length", shape[1])
        if shape != found[-1][1:]:
            found.append((math.ceil(change["begin"] * train["steps"]), *shape))
    ends = [*(first for first, _, _ in found[1:]), train["steps"]]
    parts = [(end - first, rows, length) for (first, rows, length), end in zip(found, ends, strict=True)]
    said = ", then ".join(f"{steps} steps of {rows} rows of {length} tokens" for steps, rows, length in parts)
    return f"{said}: {number(sum(math.prod(part) for part in parts))} in all"


def environment() -> dict[str, str]:
    """What the numbers depend on in addition to the config: versions, devices, revision of the code."""
    devices = jax.devices()
    found = {
        "devices": f"{len(devices)} x {devices[0].device_kind}, {jax.process_count()} process",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return found
    return found | ({"revision": revision.stdout.strip()} if revision.returncode == 0 else {})
