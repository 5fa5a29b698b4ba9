"""Planted copies are found and similar images are kept, for drawn images and for real ones if they are available."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ar_unified.data.filters.alike import alike, small
from ar_unified.data.filters.duplicates import Search
from ar_unified.data.images import decode, resize
from ar_unified.language.document import Document, ImagePart, TextPart
from tests.data.pictures import picture

DATA = Path(__file__).parents[3] / "shared" / "data"


def recompressed(pixels: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=50)
    return decode(file.getvalue())


def scaled(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return resize(pixels, round(height * 0.7), round(width * 0.7))


def cut(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return pixels[round(0.04 * height) : round(0.99 * height), round(0.02 * width) : round(0.95 * width)]


EDITS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    scaled, recompressed, cut, lambda pixels: recompressed(scaled(cut(pixels)))
)  # fmt: skip


def shares(originals: Sequence[np.ndarray]) -> tuple[float, float]:
    """The recall of planted copies, and the precision of everything that is found."""
    search, n = Search(), len(originals)
    for edit in (lambda pixels: pixels, *EDITS):
        for pixels in originals:
            search.add(Document.of((ImagePart(edit(pixels)),)))
    same = search.found().same
    own = same[n:] == np.tile(np.arange(n), len(EDITS))
    return float(own.mean()), float(own.sum() / max((same >= 0).sum(), 1))


def test_copies_of_drawn_images_are_found() -> None:
    recall, precision = shares([picture(i, 64 + i % 7 * 8, 96) for i in range(40)])
    assert recall >= 0.99 and precision >= 0.95


def test_copies_of_real_images_are_found_and_look_alikes_are_not() -> None:
    folders = [DATA / "noto-emoji/images", DATA / "clothing/images", DATA / "kodak/images"]
    if not all(folder.exists() for folder in folders):
        pytest.skip("the images are not beside this repository")
    files = [path for folder in folders for path in sorted(folder.rglob("*.*"))[:400]]
    kept = [path for path in files if path.suffix in (".png", ".jpg")][::9]
    recall, precision = shares([decode(path.read_bytes()) for path in kept])
    assert len(kept) > 80 and recall >= 0.985 and precision >= 0.95, "a target of red and white rings is lost to JPEG"
    search = Search()
    for path in sorted(folders[0].glob("emoji_u1f55*.png")):  # clocks, which differ only in their hands
        search.add(Document.of((ImagePart(decode(path.read_bytes())),)))
    assert len(found := search.found().same) == 16 and (found >= 0).sum() <= 2


def test_what_differs_in_one_place_is_no_copy() -> None:
    original = picture(3, 128, 128)
    other = original.copy()
    other[60:76, 60:76] = 255 - other[60:76, 60:76]
    tinted = np.clip(original.astype(int) + (12, 0, 0), 0, 255).astype(np.uint8)
    others = [original, cut(original), other, tinted, original[:, ::-1], picture(4)]
    pictures = np.stack([small(pixels) for pixels in others])
    assert alike(np.repeat(pictures[:1], 6, 0), pictures).tolist() == [True, True, False, False, False, False]


def test_many_copies_of_one_image_are_one_group() -> None:
    search = Search()
    for i in range(60):
        pixels = picture(0, 80, 80)
        search.add(Document.of((TextPart(f"number {i}"), ImagePart(pixels[i % 2 :, i % 3 :])), 1))
    search.add(Document.of((ImagePart(picture(1)),)), held_out=True)
    found = search.found()
    assert (found.same == -1).all() and found.shown[:60].tolist() == [-1] + [0] * 59
    assert found.repeats.tolist() == [60] * 60 + [0] and (found.overlap == -1).all()


def test_nothing_is_found_in_nothing() -> None:
    search = Search()
    assert not len(search.found().same)
    search.add(Document.of((TextPart("alone"),)))
    assert search.found().same.tolist() == [-1]
