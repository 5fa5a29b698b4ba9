"""Finds copies that were planted among real images: recall, precision, and the cost for a million images.

    python experiments/benchmarks/duplicates.py --path DIR [--every N] [--output FILE.json]

DIR (datasets) has clothing, noto-emoji, based-cooking, kodak and easy-vqa, each with a folder `images`. For each
image, five copies are planted: scaled (to 0.5 to 1.5 times its sides), recompressed (JPEG of quality 30 to 90), cut (up
to 5 % at each of its four sides), all three at once, and unchanged. One `Search` sees all images, the originals first.

Recall: the share of planted copies that were put into the group of their original. Precision: the share of planted
copies among all images that were called copies. An original that is called a copy of another one counts as wrong,
unless both have the same pixels. Cost: CPU seconds, also scaled to 10**6 images. That scaling is right for hashing;
searching takes longer if more images look alike. The time to read and decode images is not included.

The results: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from ar_unified.data.filters.duplicates import Search
from ar_unified.data.images import SUFFIXES, decode
from ar_unified.language.document import Document, ImagePart
from ar_unified.manifests import Json

PHOTOS = ("clothing", "noto-emoji", "based-cooking", "kodak")
SETS = {"photos and emoji": PHOTOS, "easy-vqa (drawn, 64 x 64)": ("easy-vqa",)}
EDITS = ("scaled", "recompressed", "cut", "all three", "same")


def scaled(pixels: np.ndarray, factor: float) -> np.ndarray:
    """uint8 [H, W, 3] with both sides multiplied by `factor`, at least 16 pixels."""
    height, width = (max(16, round(side * factor)) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def recompressed(pixels: np.ndarray, quality: int) -> np.ndarray:
    """The pixels after JPEG compression with a quality."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return decode(file.getvalue())


def cut(pixels: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The pixels without these shares at the top, bottom, left and right."""
    height, width = pixels.shape[:2]
    up, down, left, right = np.rint(shares * (height, height, width, width)).astype(int).tolist()
    return pixels[up : height - down, left : width - right]


def edited(pixels: np.ndarray, edit: str, random: np.random.Generator) -> np.ndarray:
    """The pixels after one of EDITS, with a random factor, quality and shares."""
    factor, quality, shares = random.uniform(0.5, 1.5), int(random.integers(30, 91)), random.uniform(0, 0.05, 4)
    if edit in ("cut", "all three"):
        pixels = cut(pixels, shares)
    if edit in ("scaled", "all three"):
        pixels = scaled(pixels, factor)
    return recompressed(pixels, quality) if edit in ("recompressed", "all three") else pixels


def measured(root: Path, names: tuple[str, ...], every: int) -> dict[str, Json]:
    """Plants copies of the images of some sets and returns recall, precision and cost."""
    files = [path for name in names for path in sorted((root / name / "images").rglob("*"))]
    files = [path for path in files if path.suffix.lower() in SUFFIXES][::every]
    search, random, seconds = Search(), np.random.default_rng(0), 0.0
    contents: dict[tuple[tuple[int, ...], bytes], int] = {}  # pixels -> the first image with them
    exact = [0] * len(files)
    for edit in ("original", *EDITS):
        for i, path in enumerate(files):
            pixels = decode(path.read_bytes())
            if edit == "original":
                exact[i] = contents.setdefault((pixels.shape, pixels.tobytes()), i)
            else:
                pixels = edited(pixels, edit, random)
            began = time.process_time()
            search.add(Document.of((ImagePart(pixels),)))
            seconds += time.process_time() - began
    began = time.process_time()
    found = search.found().same
    searched = time.process_time() - began
    n, count = len(files), len(found)
    leader = np.where(found >= 0, found, np.arange(count))
    right = np.array([leader[i] < n and exact[leader[i] % n] == exact[i % n] for i in range(count)])
    own = np.array([leader[i] == leader[i % n] for i in range(count)])  # the group of its original
    recall = {edit: float(own[(k + 1) * n : (k + 2) * n].mean()) for k, edit in enumerate(EDITS)}
    said = found >= 0
    return {
        "images": count,
        "recall": recall,
        "recall of all": float(own[n:].mean()),
        "precision": float(right[said].mean()),
        "originals wrongly dropped": int((said[:n] & ~right[:n]).sum()),
        "largest groups": [size for _, size in Counter(leader.tolist()).most_common(3)],
        "seconds per million": {"hash": 1e6 * seconds / count, "search": 1e6 * searched / count},
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Prints the numbers. Writes them as JSON if --output is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="the folder with the five sets")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take one image in N (%(default)s)")
    parser.add_argument("--output", type=Path, help="also write the numbers as JSON")
    arguments = parser.parse_args()
    results = {}
    for name, sets in SETS.items():
        results[name] = measured(arguments.path, sets, arguments.every)
        print(name)
        for key, value in results[name].items():
            shown = value.items() if isinstance(value, dict) else [("", value)]
            for inner, number in shown:
                told = f"{number:.4g}" if isinstance(number, float) else f"{number}"
                print(f"  {key + ' ' + inner:<32}{told}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
