"""Builds the preference pairs that experiments/dpo.py reads, from scenes of the embedded dataset, without downloads.

    python experiments/data/make_shape_pairs.py --output datasets/shape-pairs

Writes pairs.jsonl: one pair per line, which contains its pictures of 64 x 64 pixels (13 MB). The split "train" has
4,000 pairs of pictures and 2,000 of answers, from scenes for training; "validation" has 400 and 200, from held-out
scenes.
  pictures   a caption; chosen is the picture of its scene, rejected a picture in which one object has another colour,
             shape, size or place
  answers    a picture and a question; chosen is the right answer, rejected a wrong one from questions of that kind
No picture has a (shape, colour) that the embedded dataset keeps for its split "unseen_combinations". The file is made
from a seed, so its bytes are the same everywhere.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ar_unified.data import scenes
from ar_unified.data.images import to_png
from ar_unified.manifests import Json
from ar_unified.workdir import write_text

COUNTS = {"train": (4000, 2000), "validation": (400, 200)}  # numbers of pictures and answers
VALUES: dict[str, Sequence[str]] = {
    "shape": scenes.SHAPES,
    "colour": tuple(scenes.COLOURS),
    "size": scenes.SIZES,
    "place": scenes.PLACES,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the pairs in --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    print(make(Path(args.output)))


def make(output: Path, counts: dict[str, tuple[int, int]] = COUNTS) -> str:
    """Writes the rows; returns a line that says what was made. counts: split -> numbers of pictures and answers."""
    rows: list[dict[str, Json]] = []
    for split, (pictures, answers) in counts.items():
        rng = np.random.default_rng([scenes.SPLITS.index(split), 22])
        rows += _pictures(rng, split, pictures)
        rows += _answers(rng, split, answers)
    write_text(output / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return f"{output}: {len(rows)} pairs"


def _pictures(rng: np.random.Generator, split: str, count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        scene = scenes.sample_scene(rng, split)
        right, wrong = (_shown(each) for each in (scene, spoiled(rng, scene)))
        said = {"prompt": scenes.caption(rng, scene), "chosen": [right], "rejected": [wrong]}
        yield said | {"scene": scenes.scene_to_json(scene), "split": split}


def _answers(rng: np.random.Generator, split: str, count: int) -> Iterator[dict[str, Any]]:
    known: dict[str, set[str]] = defaultdict(set)  # the first two words of a question -> the answers to such questions
    for _ in range(2000):
        scene = scenes.sample_scene(rng, split)
        question, answer = scenes.question(rng, scene, split)
        known[_kind(question)].add(answer)
    for _ in range(count):
        scene = scenes.sample_scene(rng, split)
        question, answer = scenes.question(rng, scene, split)
        others = sorted(known[_kind(question)] - {answer})
        asked = [_shown(scene), {"type": "text", "text": question}]
        said = {"prompt": asked, "chosen": answer, "rejected": others[int(rng.integers(len(others)))]}
        yield said | {"scene": scenes.scene_to_json(scene), "split": split}


def spoiled(rng: np.random.Generator, scene: scenes.Scene) -> scenes.Scene:
    """The scene with one changed property of one object. Still no two objects are equal or in the same place."""
    while True:
        i, name = int(rng.integers(len(scene))), list(VALUES)[int(rng.integers(len(VALUES)))]
        value = VALUES[name][int(rng.integers(len(VALUES[name])))]
        found = tuple(replace(o, **{name: value}) if j == i else o for j, o in enumerate(scene))
        whole = len({o.kind for o in found}) == len({o.place for o in found}) == len(found)
        if whole and found != scene and scenes.split_of(found) != "unseen_combinations":
            return found


def _kind(question: str) -> str:
    return " ".join(question.split()[:2])


def _shown(scene: scenes.Scene) -> dict[str, str]:
    png = base64.b64encode(to_png(scenes.render(scene))).decode()
    return {"type": "image", "image": f"data:image/png;base64,{png}"}


if __name__ == "__main__":
    main()
