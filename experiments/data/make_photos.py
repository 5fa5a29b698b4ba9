"""Builds the folders that experiments/photos.py reads, except noto-emoji (make_emoji.py), from clones of their sources.

    git clone https://github.com/alexeygrigorev/clothing-dataset-small          # 3,781 photographs of clothes; CC0
    git clone https://github.com/LukeSmithxyz/based.cooking                     # recipes; public domain (Unlicense)
    git clone https://github.com/MohamedBakrAli/Kodak-Lossless-True-Color-Image-Suite
    python experiments/data/make_photos.py --clothing clothing-dataset-small --cooking based.cooking \\
        --kodak Kodak-Lossless-True-Color-Image-Suite --output datasets

The last repository is a copy of r0k.us/graphics/kodak, whose photographs were "released by the Eastman Kodak Company
for unrestricted usage". For each named source, the output folder gets:
    clothing/images/train/CLASS/*.jpg   100 photographs of each of 10 classes, short side 128 pixels, JPEG quality 85;
                                        and captions.jsonl, such as "a photo of a dress", for benchmarks/quantizers.py
    based-cooking/images/*.jpg          the images that recipes show, long side at most 384 pixels, JPEG quality 90
    kodak/images/kodimNN.png            8 of the 24, unchanged: 01, 04, 07, 13, 15, 19, 20, 23

Any other folder of photographs works too, because `photos.py` only needs images. The run that photos.py describes had
the same eight kodak images, and 133 of these 134 based-cooking images (at 2d8642e; pasta-arrabbiata.jpg was missing).
They were equal byte for byte, except grands-peres.jpg, which this script rotates as its camera says. Its clothing
photographs were converted in the same way, but were not the same 100 of each class.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ar_unified.data import images
from ar_unified.errors import UserError
from ar_unified.workdir import write_bytes, write_text

KODAK = (1, 4, 7, 13, 15, 19, 20, 23)
CLOTHES = {
    "longsleeve": "a long-sleeve shirt",
    "outwear": "an outerwear garment",
    "pants": "a pair of pants",
    "shoes": "a pair of shoes",
    "shorts": "a pair of shorts",
}
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the requested folders and prints what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clothing", metavar="DIR", type=Path, help="clone of clothing-dataset-small")
    parser.add_argument("--cooking", metavar="DIR", type=Path, help="clone of based.cooking")
    parser.add_argument(
        "--kodak", metavar="DIR", type=Path, help="a folder with the Kodak suite, 01.png or kodim01.png"
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=Path)
    args = parser.parse_args(arguments)
    made = {
        "clothing": (args.clothing, clothing),
        "based-cooking": (args.cooking, cooking),
        "kodak": (args.kodak, kodak),
    }
    if not any(source for source, _ in made.values()):
        parser.error("name at least one of --clothing, --cooking, --kodak")
    try:
        for name, (source, make) in made.items():
            if source:
                print(f"{args.output / name}: {make(source, args.output / name)} images")
    except UserError as error:
        parser.exit(error.exit_status, f"{parser.prog}: {error}\n")


def clothing(source: Path, folder: Path, per_class: int = 100) -> int:
    """Copies photographs of each class, with a short side of 128 pixels. A hash of the names decides which are copied.
    Raises UserError, OSError."""
    classes = sorted(path for path in _inside(source, "train").iterdir() if path.is_dir())
    rows = []
    for kind in classes:
        said = CLOTHES.get(kind.name, f"a {kind.name}")
        files = sorted(_images(kind), key=lambda file: hashlib.sha256(file.name.encode()).digest())
        for file in files[:per_class]:
            name = f"images/train/{kind.name}/{file.stem}.jpg"
            write_bytes(folder / name, _jpeg(file, lambda size: 128 / min(size), quality=85))
            rows.append({"image": name, "text": f"a photo of {said}", "label": kind.name, "split": "train"})
    write_text(folder / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return _some(len(rows), source / "train")


def cooking(source: Path, folder: Path) -> int:
    """Copies the images that recipes show, long side at most 384 pixels. Raises UserError, OSError."""
    shown: set[str] = set()
    for recipe in _inside(source, "content").glob("*.md"):
        shown.update(re.findall(r"/pix/([\w.-]+)", recipe.read_text(encoding="utf-8")))
    files = [file for file in _images(_inside(source, "static/pix")) if file.name in shown]
    for file in files:
        write_bytes(
            folder / "images" / f"{file.stem}.jpg", _jpeg(file, lambda size: min(1, 384 / max(size)), quality=90)
        )
    return _some(len(files), source / "static" / "pix")


def kodak(source: Path, folder: Path) -> int:
    """Copies eight images of the suite, byte for byte. Raises UserError, OSError."""
    found = {path.name: path for path in _inside(source, ".").rglob("*.png")}
    for number in KODAK:
        path = found.get(f"kodim{number:02d}.png") or found.get(f"{number:02d}.png")
        if path is None:
            raise UserError(f"{source}: expected kodim{number:02d}.png or {number:02d}.png under it, found neither")
        write_bytes(folder / "images" / f"kodim{number:02d}.png", path.read_bytes())
    return len(KODAK)


def _inside(source: Path, name: str) -> Path:
    if not (source / name).is_dir():
        raise UserError(f"{source / name}: no such folder; the first lines of this file say what to clone")
    return source / name


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES and path.name[0] != ".")


def _some(count: int, folder: Path) -> int:
    if not count:
        raise UserError(f"{folder}: expected images in it, found none")
    return count


def _jpeg(path: Path, scale: Callable[[tuple[int, int]], float], quality: int) -> bytes:
    """The JPEG of an image that is scaled by `scale`, a function of its (width, height)."""
    try:
        image = Image.fromarray(images.decode(path.read_bytes()))
    except images.ImageError as error:
        raise UserError(f"{path}: {error.reason}") from None
    factor = scale(image.size)
    if factor != 1:
        width, height = (max(1, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


if __name__ == "__main__":
    main()
