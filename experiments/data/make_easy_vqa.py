"""Builds the folder that experiments/easy_vqa.py reads, from the Python package easy-vqa (MIT, 3 MB, no dependency).

    pip install easy-vqa
    python experiments/data/make_easy_vqa.py --output datasets/easy-vqa

Without installing it: `pip download --no-deps easy-vqa`, then --source easy_vqa-1.0-py3-none-any.whl; or --source a
clone of github.com/vzhou842/easy-VQA, which has the same files.

Writes the unchanged images/SPLIT/N.png (4,000 of train, 1,000 of test, 64 x 64 pixels), vqa.jsonl (48,248 questions)
and captions.jsonl (4,980 captions such as "a blue rectangle"). The set has no captions, so they are made from its
questions and answers. For 534 images the questions do not give both colour and shape, so the pixels decide. Of these
images 20 get no caption, because the filled share of the figure's bounding box fits no shape clearly. The run that
easy_vqa.py describes used these rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ar_unified.errors import UserError
from ar_unified.evaluation.easy_vqa import COLORS, SHAPES
from ar_unified.manifests import Json
from ar_unified.workdir import write_bytes, write_text

KINDS: Mapping[str, Sequence[str]] = {"color": tuple(COLORS), "shape": SHAPES}
# Filled share of the bounding box: triangles fill half and a few pixels along their slopes, circles pi / 4.
SHARES = {"triangle": (0.0, 0.58), "circle": (0.757, 0.9), "rectangle": (0.95, 1.0)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the folder and prints what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--source", metavar="WHEEL|DIR", help="default: the installed package")
    args = parser.parse_args(arguments)
    try:
        print(make(find(args.source), Path(args.output)))
    except UserError as error:
        parser.exit(error.exit_status, f"{parser.prog}: {error}\n")


def find(source: str | None) -> Any:
    """The folder data/ of the package, a Path on disk or in a wheel. Raises UserError."""
    if source is None:
        spec = importlib.util.find_spec("easy_vqa")
        if spec is None or not spec.submodule_search_locations:
            raise UserError("the package easy-vqa is not installed: `pip install easy-vqa`, or name its --source")
        source = spec.submodule_search_locations[0]
    if not Path(source).exists():
        raise UserError(f"--source: {source}: no such file or folder")
    if Path(source).is_file() and not zipfile.is_zipfile(source):
        raise UserError(f"--source: {source}: expected a wheel or a folder")
    root: Any = zipfile.Path(source) if Path(source).is_file() else Path(source)
    for folder in (root / "data", root / "easy_vqa" / "data", root):
        if (folder / "train" / "questions.json").exists():
            return folder
    raise UserError(f"--source: {source}: expected data/train/questions.json in it, found none")


def make(data: Any, output: Path) -> str:
    """Writes images and rows; returns a line that says what was made. Raises OSError."""
    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Json]] = []
    images = 0
    for split in ("train", "test"):
        asked = [tuple(entry) for entry in json.loads((data / split / "questions.json").read_text(encoding="utf-8"))]
        questions += [
            {"image": f"images/{split}/{i}.png", "question": question, "answer": answer, "split": split}
            for question, answer, i in asked
        ]
        said = facts(asked)
        names = sorted((f.name for f in (data / split / "images").iterdir() if f.name.endswith(".png")), key=_number)
        for name in names:
            png = (data / split / "images" / name).read_bytes()
            write_bytes(output / "images" / split / name, png)
            images += 1
            with Image.open(io.BytesIO(png)) as image:
                known = seen(np.asarray(image.convert("RGB"))) | said.get(_number(name), {})
            if known.keys() == KINDS.keys():
                text = f"a {known['color']} {known['shape']}"
                captions.append({"image": f"images/{split}/{name}", "text": text, "split": split} | known)
    for file, rows in {"captions": captions, "vqa": questions}.items():
        write_text(output / f"{file}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return f"{output}: {images} images, {len(captions)} captions, {len(questions)} questions"


def facts(asked: Sequence[tuple[str, str, int]]) -> dict[int, dict[str, str]]:
    """The colour and shape of each image according to its questions and answers; either may be unknown."""
    possible: dict[int, dict[str, set[str]]] = {}
    for question, answer, i in asked:
        left = possible.setdefault(i, {kind: set(names) for kind, names in KINDS.items()})
        for kind, named in _named(question, answer):
            left[kind] &= named
    return {i: {kind: min(names) for kind, names in left.items() if len(names) == 1} for i, left in possible.items()}


def _named(question: str, answer: str) -> Iterator[tuple[str, set[str]]]:
    """The colours and shapes that one question and its answer allow."""
    words = set(re.findall(r"\w+", question))
    for kind, names in KINDS.items():
        mentioned = words & set(names)
        if answer in names:
            yield kind, {answer}
        if not mentioned:
            continue
        if answer in ("yes", "no") and (answer == "yes") == bool(words & {"not", "no"}):
            yield kind, set(names) - mentioned
        else:
            yield kind, mentioned


def seen(pixels: np.ndarray) -> dict[str, str]:
    """The colour of the figure in uint8 [H, W, 3], and its shape if the outline clearly fits one."""
    masks = {color: np.all(pixels == rgb, axis=-1) for color, rgb in COLORS.items()}
    color = max(masks, key=lambda name: int(masks[name].sum()))
    if not masks[color].any():
        return {}
    rows, columns = np.nonzero(masks[color])
    share = masks[color].sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    shapes = [shape for shape, (low, high) in SHARES.items() if low <= share <= high]
    return {"color": color} | ({"shape": shapes[0]} if shapes else {})


def _number(name: str) -> int:
    return int(name.removesuffix(".png"))


if __name__ == "__main__":
    main()
