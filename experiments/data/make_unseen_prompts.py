"""Builds prompts for experiments/grpo.py. They name shapes in colours that no training image has. Nothing is
downloaded.

    python experiments/data/make_unseen_prompts.py --output datasets/unseen-prompts

Writes prompts.jsonl: 4,000 captions, each with the scene that it describes and without a picture. Every scene has a
(shape, colour) that the embedded dataset keeps for its split "unseen_combinations". The 1,000 examples of
shapes/captions in that split stay for tests: none of their captions is here, and none of their scenes with two or three
objects. Four in ten prompts have one object, because it is easier to draw one object right than three. There are only
32 scenes with one object, and the tests have all of them with other captions. The file is made from a seed, so it is
the same everywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ar_unified.data import scenes
from ar_unified.data.shapes import captions_held_out
from ar_unified.workdir import write_text

SPLIT = "unseen_combinations"
ALONE = 0.85  # share of tries for one object; most of these fail, so four in ten prompts have one object


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the prompts in --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    print(make(Path(args.output)))


def make(output: Path, count: int = 4000) -> str:
    """Writes the prompts; returns a line that says what was made."""
    captions, tested = captions_held_out(SPLIT)
    rng = np.random.default_rng([scenes.SPLITS.index(SPLIT), 4])
    rows: list[dict] = []
    while len(rows) < count:
        scene, alone = scenes.sample_scene(rng, SPLIT), rng.random() < ALONE
        text, said = scenes.caption(rng, scene), scenes.scene_to_json(scene)
        if (len(scene) == 1) == alone and text not in captions and (alone or said not in tested):
            asked = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
            rows.append({"messages": asked, "scene": said})
    write_text(output / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return f"{output}: {len(rows)} prompts"


if __name__ == "__main__":
    main()
