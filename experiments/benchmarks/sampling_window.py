"""Drawing several positions of an image at once (`sampling.window`) beside drawing one by one, on the CPU.

Small transformers (d=128, 3 layers, 4 heads) are trained here on the embedded scenes: first what is in a picture, two
letters a word, then its 8 x 8 codes, each the mean colour of a patch in a palette of 64. "plain" is trained on these,
"noisy" on colours with noise, so that no code can be foreseen. Then images are drawn with windows of 1, 2, 4, 8 and
"auto", in turns, by engines that have compiled; every token is compared with that of window 1. Two settings: "sharp"
has temperature 0.25 and no guidance, "free" temperature 1 and guidance 2.

    nice -n 10 python experiments/benchmarks/sampling_window.py --steps 300 --output FILE.json

The lines: images of a batch, setting, window; tokens a step; CPU and wall time of window 1 over that of the window, the
medians of pairs; and how many of the samples have other tokens.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ar_unified.data import scenes
from ar_unified.language.document import CodesPart, Document, TextPart, Turn
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import fixed_grid
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import TransformerConfig
from ar_unified.model.loss import token_losses
from ar_unified.model.transformer import Transformer, init
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.request import Request

SIDE, LENGTH = 8, 128
SETTINGS: dict[str, dict[str, Any]] = {
    "sharp": dict(image=Filter(0.25)),
    "free": dict(image=Filter(1.0), guidance=2.0),
}
MODELS = {"plain": 0.0, "noisy": 24.0}  # standard deviation of the noise on colours of 0..255
WINDOWS = (1, 2, 4, 8, "auto")


class Letters:
    """One id a letter."""

    known = "abcdefghijklmnopqrstuvwxyz"
    size = len(known)

    def encode(self, text: str) -> list[int]:
        """An id for each letter."""
        return [self.known.find(letter) for letter in text]

    def decode(self, ids: Any) -> str:
        """The letters of ids."""
        return "".join(self.known[i] for i in ids)


def example(rng: np.random.Generator, split: str, noise: float) -> tuple[str, np.ndarray]:
    """What is in a scene, in letters, and codes int32 [SIDE, SIDE] of its picture."""
    scene = scenes.sample_scene(rng, split)
    pixels = 0.7 * np.asarray(scenes.render(scene, 64), np.float32).reshape(SIDE, 8, SIDE, 8, 3).mean((1, 3))
    levels = np.clip((pixels + rng.normal(0, noise, pixels.shape)) // 64, 0, 3).astype(np.int32)
    words = " ".join(f"{o.place} {o.size} {o.colour} {o.shape}" for o in scene).split()
    return "".join(word[:2] for word in words), levels @ np.array([16, 4, 1], np.int32)


def trained(grammar: Grammar, config: TransformerConfig, steps: int, noise: float, rows: int = 16) -> Any:
    """Parameters, and the loss of the last steps, in nats a token."""
    rng, optimizer = (
        np.random.default_rng(0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, 30, steps), b2=0.99),
    )
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    state = optimizer.init(params)

    @jax.jit
    def update(params: Any, state: Any, tokens: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            model = Transformer.bind(config, params)
            positions = jnp.broadcast_to(jnp.arange(LENGTH - 1), (rows, LENGTH - 1))
            hidden = model(tokens[:, :-1], positions, jnp.zeros_like(positions))
            nll, _ = token_losses(hidden, model.head(), tokens[:, 1:], used=grammar.vocabulary.used)
            weight = tokens[:, 1:] != grammar.vocabulary.pad
            return jnp.sum(nll * weight) / jnp.sum(weight)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(steps):
        tokens = np.full((rows, LENGTH), grammar.vocabulary.pad, np.int32)
        for row in tokens:
            text, codes = example(rng, "train", noise)
            found = grammar.encode(
                Document((Turn("user", (TextPart(text),)), Turn("assistant", (CodesPart(codes),))))
            ).tokens[:LENGTH]
            row[: len(found)] = found
        params, state, value = update(params, state, tokens)
        losses.append(float(value))
    return params, statistics.mean(losses[-20:])


def requests(count: int, setting: str) -> list[Request]:
    """Requests for images of captions that were not trained on, with one of SETTINGS."""
    rng = np.random.default_rng(1)
    return [
        Request(str(i), (TextPart(example(rng, "validation", 0)[0]),), mode="image", seed=i, **SETTINGS[setting])
        for i in range(count)
    ]


def measured(made: Callable[..., Engine], setting: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """A line for each window. made: an engine, of a `window`; those of one model share what is compiled."""
    engines = {window: made(window=window) for window in WINDOWS}
    asked = requests(2 * batch, setting)
    times: dict[Any, list[tuple[float, float]]] = {window: [] for window in engines}

    def tokens(engine: Engine) -> dict[str, list[int]]:
        return {sample.request.id: sample.tokens.tolist() for sample in engine.generate(asked)}

    expected, other = tokens(engines[1]), dict.fromkeys(engines, 0)
    for window, engine in engines.items():
        for _ in range(16 if window == "auto" else 1):  # what it has to measure first
            tokens(engine)
    for repeat in range(repeats):
        for window, engine in list(engines.items())[:: 1 if repeat % 2 else -1]:
            began = time.process_time(), time.perf_counter()
            found = tokens(engine)
            times[window].append((time.process_time() - began[0], time.perf_counter() - began[1]))
            other[window] += sum(found[id] != expected[id] for id in found)
    lines = []
    for window in engines:
        ratios = [
            [one / mine for one, mine in zip(a, b, strict=True)] for a, b in zip(times[1], times[window], strict=True)
        ]
        cpu, wall = (statistics.median(column) for column in zip(*ratios, strict=True))
        lines.append(
            dict(
                batch=batch, setting=setting, window=window, tokens_a_step=round(engines[window].tokens_a_step, 3),
                cpu=round(cpu, 3), wall=round(wall, 3), other=other[window], seconds=times[window],
            )
        )  # fmt: skip
        print(*(f"{key}={value}" for key, value in lines[-1].items() if key != "seconds"), flush=True)
    return lines


def main() -> None:
    """Trains both models and prints a line for each setting and window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    grammar = Grammar(Vocabulary(Letters.size, 64), fixed_grid(SIDE, SIDE), Letters())
    config = TransformerConfig(
        vocab_size=grammar.vocabulary.size, d_model=128, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=32, d_mlp=384,
        qk_norm="rmsnorm",
    )  # fmt: skip
    models, lines = {}, []
    for name, noise in MODELS.items():
        models[name], loss = trained(grammar, config, arguments.steps, noise)
        print(f"model={name} loss={loss:.3f}", flush=True)
    for batch in arguments.batches:
        for name, setting in itertools.product(models, SETTINGS):
            print(f"{name}:", flush=True)
            made = functools.partial(Engine, config, models[name], grammar, batch_size=batch, max_length=LENGTH)
            lines += [{"model": name} | line for line in measured(made, setting, batch, arguments.repeats)]
    if arguments.output:
        about = dict(jax=jax.__version__, steps=arguments.steps, lines=lines)
        arguments.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
