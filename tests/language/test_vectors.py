"""Today's code gives the same results, bit for bit, as the code before `ar_unified/language/` was built.

make_vectors.py wrote `vectors/` at that time: documents and requests as JSON, and the results. A number may differ only
if its meaning was changed on purpose; then the commit says so, and the file is made again.

Axes: `n` tokens of a document, `B` rows, `T` positions of a row, `V` vocabulary, `S` steps.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.data.batch import PackedBatch
from ar_unified.data.images import AnyImage, Resize
from ar_unified.data.loader import PackedBatches
from ar_unified.data.phases import Phase
from ar_unified.data.prepare import prepare
from ar_unified.data.shards import Shards
from ar_unified.language.automaton import FREE, HEIGHT, IMAGE, PARTS, TEXT, WIDTH, Opened, Wanted
from ar_unified.language.document import TASKS, CodesPart, Document, ImagePart, TextPart, TokensPart
from ar_unified.language.grammar import Grammar
from ar_unified.language.syntax import ImageLayout
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.sampling.plan import plan
from ar_unified.sampling.request import Request
from ar_unified.training.tasks import TransformerTask

VECTORS = Path(__file__).parent / "vectors"
FACTOR, CODES = 4, 16  # pixels per side of a code, and the codebook size, of the image tokenizer below
MAX_TOKENS, BATCH, STEPS = 192, 4, 4

# ---- everything that asks ar_unified: if an interface changes, this section follows, and only this -------------------


class Bytes:
    """A text tokenizer with one piece per byte."""

    size, hash = 256, "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class PatchMeans:
    """An image tokenizer in which a code is the mean of a 4 x 4 patch, in 16 steps of grey."""

    codebook_size, factor, codes_per_position, hash = CODES, FACTOR, 1, "patch-means"

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        B, H, W, _ = pixels.shape
        patches = pixels.reshape(B, H // FACTOR, FACTOR, W // FACTOR, FACTOR, 3)
        return (patches.mean((2, 4, 5)) / 16).astype(np.int32)


@dataclass(frozen=True)
class AsItIs(Resize):
    """Does not resize images, because all have sizes of the layout."""

    def __call__(self, image: AnyImage, whole: tuple[int, int] | None = None) -> np.ndarray:
        return np.asarray(image)


class Source:
    """Documents in memory."""

    def __init__(self, name: str, specs: Sequence[Mapping[str, Any]]):
        self.name, self.reversible, self._specs = name, True, specs
        self.fingerprint = {"kind": "vectors", "items": len(specs)}

    def __len__(self) -> int:
        return len(self._specs)

    def __getitem__(self, i: int) -> Document:
        return document(self._specs[i], pixels=True)

    def texts(self, i: int) -> list[str]:
        return [part for part in self._specs[i]["parts"] if isinstance(part, str)]

    def origin(self, i: int) -> str:
        return f"{self.name}:{i}"


def grammar(layout: Mapping[str, Any]) -> Grammar:
    """layout: {"kind", "height", "width", "max_side"}, sides in codes."""
    vocabulary = Vocabulary(256, CODES, size_tokens=layout["max_side"], text_hash="bytes", image_hash="patch-means")
    return Grammar(vocabulary, ImageLayout(layout["kind"], layout["height"], layout["width"]), Bytes())


def document(spec: Mapping[str, Any], *, pixels: bool = False) -> Document:
    """spec: {"parts": [text, or rows of codes as hexadecimal digits], "prompt": None or how many are the prompt}."""
    return Document.of((part(p, pixels) for p in spec["parts"]), spec["prompt"])


def part(value: Any, pixels: bool = False) -> Any:
    if isinstance(value, str):
        return TextPart(value)
    if isinstance(value, dict):
        return TokensPart(tuple(value["tokens"]))
    codes = array(value)
    if not pixels:
        return CodesPart(codes)
    grey = (codes * 16 + 8).astype(np.uint8).repeat(FACTOR, 0).repeat(FACTOR, 1)
    return ImagePart(np.repeat(grey[..., None], 3, axis=2))


def encode(grammar: Grammar, spec: Mapping[str, Any]) -> Any:
    """A document in the grammar's form; `ids` and `roles` give its content."""
    return grammar.encode(document(spec))


def ids(encoded: Any) -> np.ndarray:
    return encoded.tokens


def roles(grammar: Grammar, encoded: Any) -> np.ndarray:
    np.testing.assert_array_equal(grammar.vocabulary.role(encoded.tokens), encoded.roles)
    return encoded.roles


def task(spec: Mapping[str, Any]) -> int:
    return TASKS.index(document(spec).task)


def swap(grammar: Grammar, encoded: Any) -> Any:
    return grammar.swap_turn(encoded)


def drop_prompt(grammar: Grammar, encoded: Any) -> Any:
    return grammar.drop_prompt(encoded)


def drop_context(grammar: Grammar, encoded: Any, image: int) -> Any:
    return grammar.drop_context(encoded, image)


def prepared(grammar: Grammar, sources: Mapping[str, Sequence[Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Prepares the sources. Returns for each what is on disk: {"tokens": [int32 [n]], a field of the index:
    [documents]}."""
    keep = AsItIs("crop", FACTOR, FACTOR, FACTOR)
    opened = [Source(name, specs) for name, specs in sources.items()]
    prepare(
        opened, grammar, PatchMeans(), folder, max_tokens=MAX_TOKENS, resize=keep, batch_size=2, shard_items=20,
        show_progress=False,
    )  # fmt: skip
    found = {}
    for source in opened:
        shards = Shards(folder / source.name, -(-len(source) // 20))
        index = {name: shards.index[name].astype(np.int32) for name in ("length", "text_bytes", "task", "part", "pair")}
        found[source.name] = index | {"tokens": [document.tokens for document in shards.read(range(len(shards)))]}
    return found


def batches(grammar: Grammar, folder: Path) -> list[dict[str, np.ndarray]]:
    """Packed batches of two phases, from the files of `prepared`. They may have more fields than the vectors."""
    phases = [
        Phase(weights={"pairs": 2, "questions": 1}, flip_pairs=0.5, condition_dropout=0.4),
        Phase(from_step=2, weights={"pairs": 1, "stories": 3, "texts": 1}, flip_pairs=0.3, condition_dropout=0.6),
    ]
    loader = PackedBatches(folder, grammar, batch_size=BATCH, sequence_length=MAX_TOKENS, seed=7, phases=phases)
    return [vars(loader.batch(step)) for step in range(STEPS)]


def weights(grammar: Grammar, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 [B, T], the weight of each target in the loss."""
    of_batches = TransformerTask(
        cast(Any, None),  # no model is needed
        grammar.vocabulary,
        cast(Any, None),
        role_weights={"text": 0.7, "control": 1.3, "size": 0.25, "image": 0.9},
        task_weights={"text": 0.5, "text_to_image": 1.1, "image_to_text": 0.3, "interleaved": 0.8},
        prompt_weight=0.15,
    )
    return np.asarray(of_batches.weights(jax.tree.map(jnp.asarray, PackedBatch(**batch))))


def walk(
    grammar: Grammar, prompts: Sequence[Sequence[int]], asked: Mapping[str, Sequence[int]], draws: np.ndarray
) -> dict[str, np.ndarray]:
    """Sequences under the automaton: in each step, a draw in [0, 1) chooses one of the allowed ids.

    asked: field of `Wanted` -> one number per prompt; "mode" indexes (text, image, free). draws: float64 [S, B].
    """
    automaton = grammar.automaton
    opened = Opened(*np.array([grammar.breaks_off(np.array(prompt)).opened for prompt in prompts], np.int32).T)
    columns = {name: jnp.array(values, jnp.int32) for name, values in asked.items()}
    wanted = Wanted(**columns | {"mode": jnp.array([TEXT, IMAGE, FREE])[columns["mode"]]})
    state = automaton.resume(opened, wanted)
    look: Callable[[Any], Any] = jax.jit(
        lambda s: (automaton.allowed(s), automaton.forced(s), automaton.in_image(s), automaton.done(s), s.remaining)
    )
    advance = jax.jit(automaton.advance)
    found = []
    for draw in draws:
        allowed, forced, in_image, done, remaining = map(np.asarray, look(state))
        rank = (draw * allowed.sum(axis=1)).astype(np.int64)
        chosen = np.array([np.flatnonzero(row)[k] for row, k in zip(allowed, rank, strict=True)], np.int32)
        found.append((chosen, np.packbits(allowed, axis=1), forced, in_image, done, remaining))
        state = advance(state, jnp.asarray(chosen))
    names = ("chosen", "allowed", "forced", "in_image", "done", "remaining")
    return {name: np.stack(values) for name, values in zip(names, zip(*found, strict=True), strict=True)}


def planned(grammar: Grammar, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The compiled request as JSON values. spec: fields of `Request`, with parts as in `document`."""
    fields = dict(spec, parts=tuple(part(p) for p in spec["parts"]))
    if "canvas" in fields:
        fields["canvas"] = array(fields["canvas"])
    if "image_size" in fields:
        fields["image_size"] = tuple(fields["image_size"])
    made = plan(grammar, Request(id="r", **fields), MAX_TOKENS)
    opened, wanted = made.start
    header = 2 * grammar.layout.sized
    into = {PARTS: -1, HEIGHT: 0, WIDTH: 1}.get(opened.phase, header + opened.written)  # ids after <boi>
    return {
        "prompt": made.prompt.tolist(),
        "given": made.given.tolist(),
        "prefixes": [prefix.tolist() for prefix in made.prefixes],
        "starts": list(made.starts),
        "resets": list(made.resets),
        "budget": made.budget,
        "smallest": made.smallest,
        "steps": made.steps,
        "start": [int(i) for i in (into, opened.height, opened.width, *wanted)],
        "shape": list(made.shape),
        "weights": [float(w) for w in made.weights],
    }


# ---- what is computed, from what is said -----------------------------------------------------------------------------


def array(rows: Sequence[str]) -> np.ndarray:
    """Codes int32 [h, w] from rows of hexadecimal digits; "." is -1, a hole of a canvas."""
    return np.array([[-1 if code == "." else int(code, 16) for code in row] for row in rows], np.int32)


def said() -> dict[str, Any]:
    return json.loads((VECTORS / "said.json").read_text(encoding="utf-8"))


def ragged(name: str, arrays: Sequence[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of different lengths as two arrays: their concatenation and their lengths."""
    yield name, np.concatenate(arrays)
    yield f"{name} lengths", np.array([len(array) for array in arrays], np.int32)


def source_of(spec: Mapping[str, Any]) -> str:
    kinds = [isinstance(part, str) for part in spec["parts"]]
    if spec["prompt"] is None:
        return "texts" if all(kinds) else "stories"
    return "pairs" if spec["prompt"] == 1 and len(kinds) == 2 and sum(kinds) == 1 else "questions"


def of_documents(name: str, language: Any, specs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    encoded = [encode(language, spec) for spec in specs]
    turned = [e for e, spec in zip(encoded, specs, strict=True) if spec["prompt"] is not None]
    stories = [
        drop_context(language, e, image)
        for e, spec in zip(encoded, specs, strict=True)
        if spec["prompt"] is None
        for image in range(sum(not isinstance(part, str) for part in spec["parts"]))
    ]
    return {
        **dict(ragged(f"{name} ids", [ids(e) for e in encoded])),
        f"{name} roles": np.concatenate([roles(language, e) for e in encoded]).astype(np.int8),
        f"{name} tasks": np.array([task(spec) for spec in specs], np.int8),
        **dict(ragged(f"{name} swapped", [ids(swap(language, e)) for e in turned])),
        **dict(ragged(f"{name} without prompt", [ids(drop_prompt(language, e)) for e in turned])),
        **dict(ragged(f"{name} without context", [ids(e) for e in stories])),
    }


def of_data(name: str, language: Any, specs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    sources: dict[str, list[Any]] = {source: [] for source in ("pairs", "questions", "stories", "texts")}
    for spec in specs:
        sources[source_of(spec)].append(spec)
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source, stored in prepared(language, sources, Path(folder) / "data").items():
            found |= dict(ragged(f"{name} stored {source} tokens", stored.pop("tokens")))
            found |= {f"{name} stored {source} {field}": values for field, values in stored.items()}
        made = batches(language, Path(folder) / "data")
    for field in made[0]:
        found[f"{name} batch {field}"] = np.stack([batch[field] for batch in made])
    found[f"{name} batch weights"] = np.stack([weights(language, batch) for batch in made])
    return found


@cache
def computed() -> SimpleNamespace:
    """`arrays` by name and `plans` by layout, computed from said.json."""
    arrays: dict[str, np.ndarray] = {}
    plans: dict[str, Any] = {}
    for name, case in said().items():
        language = grammar(case["layout"])
        arrays |= of_documents(name, language, case["documents"])
        arrays |= of_data(name, language, case["documents"])
        walks = case["walks"]
        draws = np.random.default_rng(walks["seed"]).random((walks["steps"], len(walks["prompts"])))
        walked = walk(language, walks["prompts"], walks["asked"], draws)
        arrays |= {f"{name} walk {field}": values for field, values in walked.items()}
        plans[name] = [planned(language, spec) for spec in case["requests"]]
    return SimpleNamespace(arrays=arrays, plans=plans)


# ---- the comparison --------------------------------------------------------------------------------------------------


def test_arrays_are_as_they_were() -> None:
    found = computed().arrays
    with np.load(VECTORS / "arrays.npz") as expected:
        assert not set(expected) - set(found)
        wrong = []
        for name in expected:
            before, now = expected[name], found[name]
            if before.dtype != now.dtype or before.shape != now.shape:
                wrong.append(f"{name}: {before.dtype} {before.shape} became {now.dtype} {now.shape}")
            elif before.tobytes() != now.tobytes():
                at = np.argwhere(before != now)
                first = tuple(at[0].tolist())
                wrong.append(f"{name}: {len(at)} of {before.size} differ, first {first}: {before[first]}, {now[first]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("layout", ["grid", "rows"])
def test_plans_are_as_they_were(layout: str) -> None:
    expected = json.loads((VECTORS / "plans.json").read_text(encoding="utf-8"))[layout]
    assert computed().plans[layout] == expected


def test_the_vectors_hold_what_they_are_for() -> None:
    specs = [spec for case in said().values() for spec in case["documents"]]
    assert len(specs) == 300 and {task(spec) for spec in specs} == set(range(len(TASKS)))
    assert {source_of(spec) for spec in specs} == {"pairs", "questions", "stories", "texts"}
    assert any(spec["prompt"] == 0 for spec in specs) and any(spec["prompt"] == len(spec["parts"]) for spec in specs)
    sizes = {(len(part), len(part[0])) for spec in specs for part in spec["parts"] if not isinstance(part, str)}
    assert len(sizes) > 30
