"""What a run was, in a few lines: its config, and what its numbers depend on beside it."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
from ar_tokenizers.image.config import AutoencoderConfig

from ar_unified.evaluation.charts import number


def summary(config: Mapping[str, Any]) -> dict[str, str]:
    """A summary of a config in a few lines; parts that the config lacks are left out."""

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
        about = "of any shape, the size of " if data.get("resize") == "aspect" else ""
        lines["images"] = f"{about}{height} x {width} pixels as {grid} ({shape.quantizer.upper()})"
    if "vocab_size" in text:
        lines["text"] = f"at most {text['vocab_size']} pieces ({text.get('model_type', '')})"
    if {"steps", "batch_size", "sequence_length"} <= train.keys():
        tokens = train["steps"] * train["batch_size"] * train["sequence_length"]
        rows = f"{train['batch_size']} rows of {train['sequence_length']} tokens"
        lines["training"] = f"{train['steps']} steps of {rows}: {number(tokens)} in all"
    if "guidance" in sampling:
        lines["sampling"] = f"guidance {sampling['guidance']:g}, batches of {sampling.get('batch_size', '?')}"
    return lines


def environment() -> dict[str, str]:
    """What the numbers depend on beside the config: versions, devices, revision of the code."""
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
