"""Ranks several texts by how well they describe an image, according to a bundle's model.

    python examples/score.py BUNDLE image.png "A red circle." "A blue star."

Prints every text with its log-likelihood after the image, in nats per token, the likeliest first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from PIL import Image

import ar_unified
from ar_unified.data.images import to_rgb


def main(argv: Sequence[str] | None = None) -> None:
    """Prints every text with its score, the likeliest first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("image")
    parser.add_argument("texts", nargs="+")
    given = parser.parse_args(argv)

    model = ar_unified.load(given.bundle)
    with Image.open(given.image) as opened:
        image = ar_unified.ImagePart(to_rgb(opened))
    answers = [ar_unified.Document.of((image, ar_unified.TextPart(text)), prompt=1) for text in given.texts]
    scores = [score.log_likelihood / score.tokens for score in model.score(answers)]
    for score, text in sorted(zip(scores, given.texts, strict=True), reverse=True):
        print(f"{score:8.3f}  {text}")


if __name__ == "__main__":
    main()
