"""Builds prompts for experiments/grpo.py that name shapes in colours which no training image has, without downloads.

    python experiments/data/make_unseen_prompts.py --output datasets/unseen-prompts

Leaves prompts.jsonl: 4,000 captions, each with the scene that it describes and without a picture. Every scene has a
(shape, colour) that the embedded dataset keeps for its split "unseen_combinations"; none is one of the 1,000 scenes of
shapes/captions in that split, which stay for tests. A seed makes them: the same bytes everywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ar_unified.data import scenes
from ar_unified.data.shapes import scenes_held_out
from ar_unified.workdir import write_text

SPLIT = "unseen_combinations"


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the prompts in --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    print(make(Path(args.output)))


def make(output: Path, count: int = 4000) -> str:
    """Writes the prompts; returns what was made in words."""
    kept = scenes_held_out("captions", SPLIT)
    rng, rows = np.random.default_rng([scenes.SPLITS.index(SPLIT), 4]), []
    while len(rows) < count:
        scene = scenes.sample_scene(rng, SPLIT)
        text, said = scenes.caption(rng, scene), scenes.scene_to_json(scene)
        if said not in kept:
            asked = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
            rows.append({"messages": asked, "scene": said})
    write_text(output / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return f"{output}: {len(rows)} prompts"


if __name__ == "__main__":
    main()
