"""Random LoRA adapters in PEFT's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_unified.bundle import Bundle
from ar_unified.interop import peft
from ar_unified.model.config import TransformerConfig
from ar_unified.model.lora import LoraConfig, init


def drawn(config: TransformerConfig, lora: LoraConfig, seed: int = 0, spread: float = 0.3) -> Any:
    """Random params["lora"] as numpy arrays. B is not zero."""
    fresh = jax.device_get(init(config, lora, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + rng.normal(0, spread, x.shape).astype(np.float32) * (not x.any()), fresh)


def write(folder: Path, bundle: Bundle, lora: LoraConfig, seed: int = 0, spread: float = 0.3) -> Any:
    """Writes the folder of a random adapter; returns the adapter's arrays."""
    made = drawn(bundle.config, lora, seed, spread)
    peft.write(folder, bundle, lora, made)
    return made
