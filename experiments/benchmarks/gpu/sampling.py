"""Images per second of the engine, with guidance, for a model with random weights."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax

from ar_unified.language.document import TextPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid, vocabulary_for
from ar_unified.model.config import config_from
from ar_unified.model.transformer import init
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.request import Request
from ar_unified.training.telemetry import device_memory
from experiments.benchmarks.gpu.measure import Check
from experiments.benchmarks.gpu.sizes import Size


class _Numbers:
    """A stand-in text tokenizer: a text is a list of numbers."""

    def __init__(self, size: int):
        self.size = size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any) -> str:
        return " ".join(str(int(id)) for id in ids)


def checks(size: Size) -> list[Check]:
    """Images per second, for each number of images at once."""
    return [
        (f"{size.preset}, {batch} images at once", functools.partial(_measure, size, batch)) for batch in size.batches
    ]


def _measure(size: Size, batch: int) -> dict[str, Any]:
    text, codes = size.vocabulary
    layout = fixed_grid(size.grid, size.grid)
    grammar = Grammar(vocabulary_for(layout, text, codes), layout, _Numbers(text))
    config = config_from(size.preset, grammar.vocabulary.size)
    config = dataclasses.replace(config, n_layers=size.layers or config.n_layers)
    params = jax.jit(functools.partial(init, config))(jax.random.key(0))
    engine = Engine(config, params, grammar, batch_size=batch, max_length=size.grid**2 + 64)

    def draw(seed: int) -> float:
        asked = [
            Request(str(i), (TextPart(" ".join(str(word % text) for word in range(i + 1, i + 17))),), mode="image",
                    seed=seed + i, guidance=3.0)
            for i in range(batch)
        ]  # fmt: skip
        began = time.perf_counter()
        samples = list(engine.generate(asked))
        seconds = time.perf_counter() - began
        if wrong := [sample.error for sample in samples if sample.error]:
            raise RuntimeError(f"{len(wrong)} of {len(samples)} samples failed: {wrong[0]}")
        return seconds

    first, seconds = draw(0), draw(1000)
    figures = {
        "images/s": f"{batch / seconds:.2f}",
        "one token of all images": f"{seconds / size.grid**2 * 1e3:.2f} ms",
        "first": f"{first:.1f} s",
        "peak GiB": round(device_memory().get("hbm_peak_gib", 0.0), 1),
    }
    return dict(figures=figures, images=batch, wall_seconds=seconds, contexts=2, codes=size.grid**2)
