"""Drawing several positions of an image at once (`sampling.window`), compared with one by one, with trained models.

    ar-unified export --workdir workdirs/shapes --output bundles/shapes
    python experiments/benchmarks/parallel_decoding.py exact --model shapes=bundles/shapes --requests 2000
    nice -n 10 python experiments/benchmarks/parallel_decoding.py speed --model shapes=bundles/shapes \
        --model emoji=bundles/emoji:datasets/noto-emoji/captions.jsonl --output FILE.json

A model is NAME=BUNDLE:CAPTIONS. CAPTIONS is a file of rows with a "text"; without it, captions are of embedded scenes.

`exact` draws mixed requests with each window and counts the samples that differ from those of window 1. The requests
are captions to draw, questions about images, stories, edits and canvases with holes, with one to three contexts,
temperatures of 0 and above, top-k, top-p and penalties; there are more requests than slots. "restless" is an engine
that changes the window at every chunk. The exit status is 1 if a sample differs.

`speed` draws images with the bundle's settings, with each window in turns after a warm-up, and compares every token.
The line for each window has: tokens per step; wall and CPU time of window 1 divided by that of this window (medians of
pairs); and the number of samples that differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ar_unified
from ar_unified.data import scenes
from ar_unified.language.document import CodesPart, TextPart
from ar_unified.manifests import Json
from ar_unified.sampling import plan, prompts
from ar_unified.sampling.decoding import Filter
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.model import Model
from ar_unified.sampling.pace import WINDOWS, Pace
from ar_unified.sampling.request import Request

_LENGTH = 128  # slots of the caches in `exact`


class Restless(Pace):
    """A pace that takes another window for each chunk, whatever it costs."""

    def __init__(self) -> None:
        super().__init__("auto")
        self._turn = itertools.cycle((1, 8, 2, 1, 4, 8, 4, 2))

    def next(self, shape: Any, steps: int) -> tuple[int, int, bool]:
        """The next window, and a short chunk."""
        return next(self._turn), min(steps, 6), False


def captions(path: str, count: int, rng: np.random.Generator) -> list[str]:
    """`count` random texts of a file, or captions of held-out scenes."""
    if not path:
        return [scenes.caption(rng, scenes.sample_scene(rng, "validation")) for _ in range(count)]
    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    return [texts[i] for i in rng.integers(0, len(texts), count)]


def mixed(model: Model, path: str, count: int) -> list[Request]:
    """Requests of all kinds, each with its own settings."""
    rng = np.random.default_rng(0)
    texts, asked = captions(path, count, rng), []
    pictures = [model.tokenize_image(scenes.render(scenes.sample_scene(rng, "validation"))) for _ in range(24)]
    kinds = ("draw", "draw", "draw", "ask", "story", "edit", "repair", "negative", "two")

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    for i, text in enumerate(texts):
        kind, picture = kinds[i % len(kinds)], pictures[i % len(pictures)]
        image = Filter(one_of(0.0, 0.25, 0.7, 1.0, 1.3), one_of(0, 0, 5, 40), one_of(1.0, 1.0, 0.9, 0.6))
        words = Filter(one_of(0.0, 0.5, 1.0), one_of(0, 0, 10), one_of(1.0, 0.9))
        common: dict[str, Any] = dict(
            seed=int(rng.integers(1 << 31)), image=image, text=words, guidance=one_of(1.0, 1.0, 1.5, 3.0)
        )
        written, shown = TextPart(text), CodesPart(picture)
        if kind == "ask":
            common |= dict(mode="text", max_tokens=int(rng.integers(4, 24)), repetition_penalty=one_of(1.0, 1.3))
            parts: Any = (shown, written) if i % 2 else (shown,)
        elif kind == "story":
            common |= dict(mode="interleaved", turn=False, max_tokens=int(rng.integers(40, 70)), max_images=2)
            parts = (written,)
        elif kind == "edit":
            common |= dict(mode="image", guidance=2.0, image_guidance=1.2)
            parts = (shown, written)
        elif kind == "repair":
            canvas = np.where(rng.random(picture.shape) < 0.5, picture, -1).astype(np.int32)
            common |= dict(mode="image", canvas=canvas)
            parts = (written,)
        elif kind == "negative":
            common |= dict(mode="image", guidance=2.5, context="negative_prompt", negative_prompt=texts[i - 1][:20])
            parts = (written,)
        else:
            images = 2 if kind == "two" else 1
            common |= dict(mode="image", min_images=images, max_images=images, n=1 + i % 2)
            parts = (written,)
        asked.append(Request(f"{kind} {i}", parts, **common))
    return asked


def exact(models: dict[str, tuple[str, str]], arguments: argparse.Namespace) -> int:
    """Draws the requests with each window; returns how many samples differ."""
    vars(plan)["_SHARES"], prompts._SMALLEST = (
        (1,),
        64,
    )  # one length of caches and prompts needs fewer programs
    different = 0
    for name, (folder, path) in models.items():
        model = ar_unified.load(folder)
        asked, length = mixed(model, path, arguments.requests), max(_LENGTH, arguments.max_length)
        expected: dict[tuple[str, int], Any] = {}
        for window in ("1", *arguments.windows, "restless"):
            made = "auto" if window == "restless" else window
            engine = like(model.engine, window=made, batch_size=arguments.batch, max_length=length)
            if window == "restless":
                engine._pace = Restless()
            began = time.perf_counter()
            found = {(s.request.id, s.index): (s.tokens.tolist(), s.error) for s in engine.generate(asked)}
            expected = expected or found
            other = sorted(key for key in expected if found.get(key) != expected[key])
            different += len(other)
            print(
                f"{name} window={window} samples={len(found)} tokens={sum(len(t) for t, _ in found.values())} "
                f"refused={sum(bool(e) for _, e in found.values())} tokens_a_step={engine.tokens_a_step:.2f} "
                f"differ={len(other)} {other[:5]} {time.perf_counter() - began:.0f}s",
                flush=True,
            )
    return different


def like(engine: Engine, **settings: Any) -> Engine:
    """An engine for the same model with other settings."""
    return Engine(engine.config, engine.params, engine.grammar, **settings)


def speed(models: dict[str, tuple[str, str]], arguments: argparse.Namespace) -> list[dict[str, Json]]:
    """Prints a line for each model, batch and window."""
    lines = []
    for batch, (name, (folder, path)) in itertools.product(arguments.batches, models.items()):
        model = ar_unified.load(folder)
        texts = captions(path, arguments.images, np.random.default_rng(1))
        settings = {"guidance": model.defaults["guidance"], "image": Filter(**model.defaults["image"])}
        asked = [Request(str(i), (TextPart(t),), mode="image", seed=i, **settings) for i, t in enumerate(texts)]
        made = [w if w == "auto" else int(w) for w in ("1", *arguments.windows)]
        engines = {w: like(model.engine, window=w, batch_size=batch, max_length=arguments.max_length) for w in made}
        for found in measured(engines, asked, arguments.repeats):
            lines.append(dict(model=name, batch=batch) | found)
            print(*(f"{key}={value}" for key, value in lines[-1].items() if key != "seconds"), flush=True)
    return lines


def measured(engines: dict[Any, Engine], asked: list[Request], repeats: int) -> list[dict[str, Json]]:
    """Returns a line for each engine, compared with window 1. Engines run in turns, each time with new seeds."""

    def drawn(engine: Engine, repeat: int) -> tuple[dict[str, list[int]], tuple[float, float]]:
        again = [dataclasses.replace(each, seed=each.seed + 10_000 * repeat) for each in asked]
        before = time.perf_counter(), time.process_time()
        tokens = {sample.request.id: sample.tokens.tolist() for sample in engine.generate(again)}
        return tokens, (time.perf_counter() - before[0], time.process_time() - before[1])

    for engine in engines.values():  # these calls compile, and "auto" measures
        drawn(engine, repeats)
        drawn(engine, repeats + 1)
    times: dict[Any, list[tuple[float, float]]] = {window: [] for window in engines}
    other = dict.fromkeys(engines, 0)
    for repeat in range(repeats):
        found = {}
        for window in list(engines)[:: 1 if repeat % 2 else -1]:
            found[window], took = drawn(engines[window], repeat)
            times[window].append(took)
        for window in engines:
            other[window] += sum(found[window][id] != tokens for id, tokens in found[1].items())
    lines = []
    for window, engine in engines.items():
        both = zip(times[1], times[window], strict=True)
        pairs = [[a / b for a, b in zip(one, own, strict=True)] for one, own in both]
        wall, cpu = (round(statistics.median(column), 3) for column in zip(*pairs, strict=True))
        a_step = round(engine.tokens_a_step, 2)
        lines.append(
            dict(window=window, tokens_a_step=a_step, wall=wall, cpu=cpu, differ=other[window], seconds=times[window])
        )
    return lines


def main() -> int:
    """Runs `exact` or `speed`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exact", "speed"))
    parser.add_argument("--model", action="append", required=True, metavar="NAME=BUNDLE[:CAPTIONS]")
    parser.add_argument("--requests", type=int, default=2000, help="number of requests in `exact`")
    parser.add_argument("--batch", type=int, default=8, help="samples at once in `exact`")
    parser.add_argument("--images", type=int, default=64, help="images that `speed` draws each time")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="images at once in `speed`")
    parser.add_argument("--windows", nargs="+", default=WINDOWS[1:], choices=WINDOWS[1:], help="to compare with 1")
    parser.add_argument("--repeats", type=int, default=7, help="repeats of `speed`")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--output", type=Path, help="a JSON file for the results of `speed`")
    arguments = parser.parse_args()
    models = {}
    for each in arguments.model:
        name, _, rest = each.partition("=")
        folder, _, path = rest.partition(":")
        models[name] = folder, path
    if arguments.what == "exact":
        return min(exact(models, arguments), 1)
    lines = speed(models, arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(dict(jax=jax.__version__, lines=lines), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
