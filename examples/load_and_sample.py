"""Open a bundle, draw images for a text, and ask the model about the first of them.

    python examples/load_and_sample.py BUNDLE "A small red circle in the top left." --question "Where is the circle?"

Writes 0.png, 1.png, ... to --output. `ar-unified export --workdir WORKDIR --output BUNDLE` makes the bundle.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import ar_unified


def main(argv: Sequence[str] | None = None) -> None:
    """Draws and saves the images, asks the question, and prints the answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("--question", default="What is in the image?")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("drawn"))
    given = parser.parse_args(argv)

    model = ar_unified.load(given.bundle)
    images = model.draw(given.prompt, seed=given.seed, n=given.n)
    given.output.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(given.output / f"{i}.png")
    print(f"{len(images)} images in {given.output}")
    print(f"{given.question} {model.ask(images[0], given.question)}")


if __name__ == "__main__":
    main()
