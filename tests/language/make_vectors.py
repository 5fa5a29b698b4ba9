"""Writes vectors/: random documents and requests, and the results of the code for them. Run from the root:

    PYTHONPATH=.:tokenizers python tests/language/make_vectors.py

It was run at the commit before `ar_unified/language/` was built, and is kept to show how the vectors were made. Running
it again makes today's results the reference, so do it only if numbers have changed on purpose.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np

from tests.language import test_vectors as vectors

LAYOUTS = {
    "grid": {"kind": "grid", "height": 4, "width": 4, "max_side": 0},
    "rows": {"kind": "rows", "height": 6, "width": 8, "max_side": 9},
}
WORDS = (
    "a red circle above the blue square . left of it is green , and two <boi> stand beneath\n\nNew paragraph: "
    "größer naïve 図形 赤い丸 крест 👩‍🚀 🏳️‍🌈 e\u0301 \u200b tab\there 3x4 <|eot|> \\n 你好，世界"
).split(" ")


def text(rng: np.random.Generator, most: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, most))) or "?"


def codes(rng: np.random.Generator, layout: dict[str, Any]) -> list[str]:
    h, w = layout["height"], layout["width"]
    if layout["kind"] == "rows":
        h, w = int(rng.integers(1, h + 1)), int(rng.integers(1, w + 1))
    return ["".join(f"{code:x}" for code in row) for row in rng.integers(0, vectors.CODES, (h, w))]


def document(rng: np.random.Generator, layout: dict[str, Any], kind: int) -> dict[str, Any]:
    """A spec of `test_vectors.document`, of one of ten kinds."""

    def words(most: int = 8) -> str:
        return text(rng, most)

    def image() -> list[str]:
        return codes(rng, layout)

    def story(n: int) -> list[Any]:
        first = int(rng.integers(2))
        return [image() if (i + first) % 2 else words() for i in range(n)]

    parts, prompt = {
        0: lambda: ([words(12)], None),
        1: lambda: ([words(90)], None),  # often more than a row, so it is divided
        2: lambda: ([words(), image()], 1),
        3: lambda: ([image(), words()], 1),
        4: lambda: ([image(), words(), words()], 2),
        5: lambda: (story(int(rng.integers(2, 7))), None),
        6: lambda: ([image()], 0),
        7: lambda: ([words(), image(), words()], 3),
        8: lambda: ([words(5), image(), words(5), image()], int(rng.integers(1, 4))),
        9: lambda: ([words(), words()], 1),
    }[kind]()
    return {"parts": parts, "prompt": prompt}


def walks(rng: np.random.Generator, language: Any, specs: list[dict[str, Any]]) -> dict[str, Any]:
    """Prompts that end anywhere, and the requests after them."""
    v = language.vocabulary
    whole = [vectors.ids(vectors.encode(language, spec)).tolist() for spec in specs if spec["prompt"] is not None]
    prompts = [[v.bos]] * 4 + [[v.bos, v.eot]] * 4
    for tokens in [tokens for tokens in whole if v.boi in tokens][:14]:
        prompts.append(tokens[: int(rng.integers(1, len(tokens)))])
    for tokens in [tokens for tokens in whole if v.boi in tokens][14:18]:
        prompts.append(tokens[: tokens.index(v.boi) + int(rng.integers(1, 4))])
    n, layout = len(prompts), language.layout
    sides = rng.integers(0, 2, n)
    return {
        "seed": 11,
        "steps": 40,
        "prompts": prompts,
        "asked": {
            "remaining": rng.integers(1, 90, n).tolist(),
            "mode": [i % 3 for i in range(n)],
            "min_images": rng.integers(0, 3, n).tolist(),
            "max_images": rng.integers(2, 4, n).tolist(),
            "height": (sides * rng.integers(0, layout.height + 1, n)).tolist(),
            "width": (sides * rng.integers(0, layout.width + 1, n)).tolist(),
        },
    }


def requests(rng: np.random.Generator, language: Any, name: str) -> list[dict[str, Any]]:
    layout, v = LAYOUTS[name], language.vocabulary
    guided = ("empty_prompt", "bos_boi", "from_boi", "image_only", "negative_prompt")
    found: list[dict[str, Any]] = []
    for mode, turn in itertools.product(("text", "image", "interleaved", "free"), (True, False)):
        found.append({"parts": [text(rng, 6)], "mode": mode, "turn": turn})
    for context in guided:
        more = {"negative_prompt": "blurry"} if context == "negative_prompt" else {}
        asked = {"guidance": 3.0, "context": context, **more}
        found.append({"parts": [text(rng, 6)], "mode": "image", **asked})
        if context != "image_only":
            asked["image_guidance"] = 1.5
        found.append({"parts": [codes(rng, layout), "like it"], "mode": "free", **asked})
    drawn = codes(rng, layout)
    h, w = len(drawn), len(drawn[0])
    canvas = ["." * w if i else drawn[0] for i in range(h)]
    begun = vectors.ids(vectors.encode(language, {"parts": [drawn], "prompt": 0})).tolist()
    found += [
        {"parts": [], "mode": "image", "canvas": canvas},
        {"parts": [], "mode": "image", "canvas": [drawn[0][:-1] + ".", *drawn[1:]], "guidance": 2.0},
        {"parts": [], "mode": "image", "canvas": drawn, "n": 2, "seed": 5},
        {"parts": [{"tokens": begun[: len(begun) // 2]}], "mode": "image", "guidance": 2.0},
        {"parts": [{"tokens": begun[:3]}], "mode": "free", "max_tokens": 80},
        {"parts": ["x", {"tokens": [v.boi]}], "mode": "interleaved", "turn": False, "max_images": 2},
        {"parts": ["two"], "mode": "image", "min_images": 2, "max_images": 3, "max_tokens": 150},
        {"parts": ["stop"], "mode": "image", "stop": ["."], "image_size": [h, w]},
        {"parts": ["sized"], "mode": "image", "image_size": [h, w], "guidance": 4.0, "context": "from_boi"},
        {"parts": ["a", drawn, "b"], "mode": "text", "max_tokens": 20},
    ]
    return found


def main() -> None:
    said: dict[str, Any] = {}
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        rng = np.random.default_rng([18, number])
        language = vectors.grammar(layout)
        specs = [document(rng, layout, i % 10) for i in range(150)]
        said[name] = {
            "layout": layout,
            "documents": specs,
            "walks": walks(rng, language, specs),
            "requests": requests(rng, language, name),
        }
    vectors.VECTORS.mkdir(exist_ok=True)
    write(said, "said.json")
    found = vectors.computed()
    write(found.plans, "plans.json")
    np.savez_compressed(vectors.VECTORS / "arrays.npz", **found.arrays)


def write(value: Any, name: str) -> None:
    lines = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace('},{"', '},\n{"')
    (vectors.VECTORS / name).write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
