"""Images that are too small for the size that they get are used, counted and told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ar_unified.data import images
from ar_unified.data.checks.page import write
from ar_unified.data.checks.validate import validate
from ar_unified.data.filters import Filters
from ar_unified.data.images import Resize
from ar_unified.data.loader import ImageBatches
from ar_unified.data.sizes import ENLARGED, TINY, Counting, Enlarged
from ar_unified.data.sources import open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of 1 x 1, 4 x 4, 31 x 40, 32 x 32 and 200 x 90 pixels."""
    rows = []
    for i, (height, width) in enumerate([(1, 1), (4, 4), (31, 40), (32, 32), (200, 90)]):
        Image.fromarray(np.full((height, width, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps(dict(image=f"{i}.png", text=f"grey {i}")))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_validate_counts_what_the_config_enlarges_to_more_than_twice(folder: Path, tmp_path: Path) -> None:
    found = validate(folder, resize=Resize("crop", 64, 64), show_progress=False)
    said = str(found)
    assert "5 good" in said and f"3 of 5 images are enlarged to more than {ENLARGED:g} times their sides" in said
    assert "(the worst: 1 x 1 to 64 x 64 pixels)" in said and "min_side=32 " in said
    write(tmp_path / "page.html", found, "small")
    assert "3 of 5 images are enlarged" in (tmp_path / "page.html").read_text()
    left = validate(
        {"train": [dict(kind="folder", path=folder)]}, resize=Resize("crop", 64, 64), filters=Filters(min_side=32),
        show_progress=False,
    )  # fmt: skip
    assert "3 filtered" in str(left) and "enlarged" not in str(left), "what the remark advises leaves out all of them"


def test_without_a_config_only_what_any_size_enlarges_is_told(folder: Path) -> None:
    said = str(validate(folder, show_progress=False))
    assert f"2 of 5 images have a side below {TINY} pixels (the smallest: 1 x 1)" in said
    for name in ("0.png", "1.png"):
        Image.new("RGB", (TINY, TINY)).save(folder / name)
    assert "images have a side" not in str(validate(folder, show_progress=False))


def test_what_prepare_reads_is_counted_and_resized_as_ever(folder: Path) -> None:
    resize = Resize("aspect", 64, 64, 16)
    counting = Counting(resize)
    assert counting.record() == resize.record() and counting.largest == resize.largest
    for i in range(5):
        data = (folder / f"{i}.png").read_bytes()
        assert np.array_equal(images.decode(data, resize=counting), images.decode(data, resize=resize))
    assert str(counting.enlarged).startswith("3 of 5 images are enlarged")
    assert not str(Enlarged())


def test_the_training_of_an_image_tokenizer_counts_what_it_reads(folder: Path) -> None:
    batches = ImageBatches([open_source(dict(kind="images", path=folder))], size=(64, 64), batch_size=5)
    assert not str(batches.enlarged)
    batches.batch(0)
    assert str(batches.enlarged).startswith("3 of 5 images are enlarged")
