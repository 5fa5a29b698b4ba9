from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ar_unified.data.loader import ImageBatches
from ar_unified.data.prepare import load_manifest, prepare
from ar_unified.data.shards import Shards
from ar_unified.data.sources import open_source, read, texts
from ar_unified.data.sources.augmentation import Augmented, moved, room
from ar_unified.language.document import CodesPart, ImagePart, TextPart
from ar_unified.language.grammar import Grammar


def augmented(folder: Path, **options: Any) -> Augmented:
    source = open_source(
        dict(kind="folder", path=folder, augmentation=dict(count=4, shift=0.25, mirror=True) | options)
    )
    assert isinstance(source, Augmented)
    return source


def images(source: Any, i: int) -> list[np.ndarray]:
    return [part.pixels for part in source[i].parts if isinstance(part, ImagePart)]


def test_moved_pixels_stay_and_edges_go_on() -> None:
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(moved(pixels, 0, 0), pixels)
    assert np.array_equal(moved(pixels, 0, 0, mirror=True), pixels[:, ::-1])
    assert np.array_equal(moved(pixels, 0.25, 0), pixels[[0, 0, 1, 2]])
    assert np.array_equal(moved(pixels, 0, -0.5, mirror=True), pixels[:, [2, 3, 3, 3]][:, ::-1])


def test_version_0_is_the_item_and_the_others_say_the_same_of_moved_images(folder: Path) -> None:
    plain, source = open_source(dict(kind="folder", path=folder)), augmented(folder)
    assert len(source) == 4 * len(plain) and (source.name, source.reversible) == (plain.name, plain.reversible)
    mirrored, shown = 0, 0
    for i in range(len(source)):
        original, document = plain[i // 4], source[i]
        assert [p for p in document.parts if isinstance(p, TextPart)] == [
            p for p in original.parts if isinstance(p, TextPart)
        ]
        assert (document.asks, document.id, document.origin) == (original.asks, original.id, source.origin(i))
        if i % 4 == 0:
            assert document == original
            continue
        before, after = images(plain, i // 4), images(source, i)
        places = [(m, y, x) for m in (False, True) for y in range(-4, 5) for x in range(-4, 5)]
        found = [  # images are noise of 16 x 16, so no two places look the same
            place
            for place in places
            if all(
                np.array_equal(moved(b, place[1] / 16, place[2] / 16, place[0]), a)
                for b, a in zip(before, after, strict=True)
            )
        ]
        assert len(found) == 1, "all images of a document are moved alike, by no more than the shift"
        mirrored, shown = mirrored + found[0][0], shown + 1
    assert 0.3 < mirrored / shown < 0.7


def test_a_whole_figure_goes_anywhere_on_its_ground_and_is_never_cut(tmp_path: Path) -> None:
    figure = np.arange(1, 19, dtype=np.uint8).reshape(2, 3, 3)
    pixels = np.full((8, 10, 3), 200, np.uint8)
    pixels[5:7, :3] = figure  # the figure touches the left edge
    Image.fromarray(pixels).save(tmp_path / "0.png")
    (tmp_path / "captions.jsonl").write_text('{"image": "0.png", "text": "a thing"}')
    source = augmented(tmp_path, count=400, shift=0.99, mirror=False, whole=True)
    places = set()
    for i in range(len(source)):
        (moved_to,) = images(source, i)
        top, left = np.argwhere(np.any(moved_to != 200, axis=-1)).min(axis=0)
        assert np.array_equal(moved_to[top : top + 2, left : left + 3], figure)
        assert (moved_to == 200).all(axis=-1).sum() == 80 - 6
        places.add((int(top), int(left)))
    assert places == {(top, left) for top in range(7) for left in range(8)}
    assert room(pixels).tolist() == [5 / 8, 1 / 8, 0, 7 / 10]


def test_versions_depend_on_the_item_only_and_are_part_of_the_fingerprint(folder: Path) -> None:
    source = augmented(folder)
    ahead = dict(read(source, reversed(range(len(source))), workers=4))
    assert all(augmented(folder)[i] == ahead[i] for i in range(len(source)))
    prints = [
        augmented(folder, **change).fingerprint
        for change in ({}, {"count": 3}, {"shift": 0.1}, {"mirror": False}, {"whole": True})
    ]
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])
    assert dict(prints[0]).items() >= open_source(dict(kind="folder", path=folder)).fingerprint.items()
    assert list(texts([source])) == list(texts([source.source])), "a text counts once"


def test_each_version_is_coded_and_is_trained_on(
    folder: Path, grammar: Grammar, tokenizer: Any, tmp_path: Path
) -> None:
    source = augmented(folder, count=3)
    report = prepare([source], grammar, tokenizer, tmp_path, max_tokens=512, show_progress=False).sources["set"]
    assert report.documents == report.items == 3 * 35
    stored = Shards(tmp_path / "set", load_manifest(tmp_path)["report"]["set"]["shards"])
    codes = [
        grammar.parse(found.tokens).parts[1] for found in stored.read(range(3))
    ]  # all versions of the first caption
    assert codes == [CodesPart(tokenizer.encode(images(source, i)[0][None])[0]) for i in range(3)]
    assert len({part.codes.tobytes() for part in codes}) == 3
    seen = ImageBatches([source], size=(16, 16), batch_size=len(source)).batch(0)["pixels"]
    assert len({image.tobytes() for image in seen}) > 20


@pytest.mark.parametrize("wrong", [dict(count=0), dict(count=1), dict(shift=1.0), dict(shift=-0.1), dict(zoom=2)])
def test_an_augmentation_out_of_range_is_refused(folder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="augmentation|zoom"):
        augmented(folder, **wrong)
