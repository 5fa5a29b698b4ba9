from __future__ import annotations

import base64
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified.data.images import Resize, to_png
from ar_unified.data.items import has_images, names_images, resized
from ar_unified.data.sources import BadItem, decoders, open_source, read, texts
from ar_unified.errors import UserError
from ar_unified.language.document import Document, ImagePart, TextPart
from tests.data import copies


def test_a_folder_is_its_three_files_in_order(folder: Path, kit: Any) -> None:
    source = open_source(dict(kind="folder", path=folder, weight=2.0))
    assert len(source) == 20 + 5 + 10 and source.name == "set" and source.reversible
    pair, story, question = source[3], source[20], source[27]
    assert pair == Document.of((TextPart("picture 3"), ImagePart(kit.image(3))), prompt=1)
    assert not story.asks and story.meta["title"] == "story 0" and len(story.parts) == 4
    assert question.parts[1:] == (TextPart("which is 2?"), TextPart("it")) and len(question.asked[0].parts) == 2
    assert [source.origin(i).rsplit("/")[-1] for i in (3, 20, 27)] == [
        "captions.jsonl:4",
        "docs.jsonl:1",
        "vqa.jsonl:3",
    ]
    assert pair.origin == source.origin(3)


def test_opening_and_texts_read_no_image(folder: Path) -> None:
    for file in (folder / "images").iterdir():
        file.unlink()
    source = open_source(dict(kind="folder", path=folder, files=("captions", "vqa")))
    assert list(texts([source]))[18:22] == ["picture 18", "picture 19", "which is 0?", "it"]
    with pytest.raises(BadItem, match="captions.jsonl:1: missing_image"):
        source[0]


@pytest.mark.parametrize(
    "row, names",
    [
        (dict(text='an image, "image"'), False),
        (dict(messages=[dict(role="user", content=[dict(type="text", text="no image")])]), False),
        (dict(image="a.png", text="a"), True),
        (dict(segments=[dict(type="image", image="a.png")]), True),
        (dict(messages=[dict(role="user", content=[dict(type="image_url", image_url="a.png")])]), True),
    ],
)
def test_rows_know_whether_they_name_an_image(tmp_path: Path, kit: Any, row: dict[str, Any], names: bool) -> None:
    """A text may contain any words about images, and JSON may be written with escapes."""
    words = dict(text="two")
    kit.write(tmp_path / "a.jsonl", [words, row, words])
    source = open_source(dict(kind="jsonl", path=tmp_path / "a.jsonl"))
    assert names_images(source) == names and has_images(source)
    hidden = json.dumps(row).replace('"image', '"\\u0069mage')
    (tmp_path / "a.jsonl").write_text(hidden + "\n")
    assert names_images(open_source(dict(kind="jsonl", path=tmp_path / "a.jsonl"))) >= names


def test_jsonl_with_images_inside_it(tmp_path: Path, kit: Any) -> None:
    png = base64.b64encode(to_png(kit.image(7))).decode()
    kit.write(
        tmp_path / "own.jsonl",
        [
            dict(image=f"data:image/png;base64,{png}", text="a"),
            dict(image=f"data:image/png;base64,{png[:50]}", text="b"),
        ],
    )
    source = open_source(dict(kind="jsonl", path=tmp_path / "own.jsonl"))
    assert source.name == "own" and np.array_equal(source[0].parts[1].pixels, kit.image(7))
    with pytest.raises(BadItem, match="own.jsonl:2: unreadable_image"):
        source[1]


def test_paths_stay_inside_the_folder(tmp_path: Path, kit: Any) -> None:
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(to_png(kit.image(0)))
    (root / "fine.png").write_bytes(to_png(kit.image(0)))
    (root / "sub" / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "sub" / "in.png").symlink_to(root / "fine.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    good = ["sub/in.png", "sub/../fine.png", str(root / "fine.png"), (root / "fine.png").as_uri(), "../set/fine.png"]
    out = ["../secret.png", "sub/../../secret.png", "sub/out.png", "/etc/passwd", (tmp_path / "secret.png").as_uri()]
    missing = ["loop.png", "sub", "nul\0.png", "pipe.png", "https://example.org/a.png", "\ud800.png", "n" * 300]
    names = [*good, *out, *missing]
    kit.write(root / "captions.jsonl", [json.dumps(dict(image=name, text="x")).encode() for name in names])
    found = [item.kind if isinstance(item, BadItem) else None for _, item in read(_captions(root), range(len(names)))]
    assert found == [None] * len(good) + ["path_escapes"] * len(out) + ["missing_image"] * len(missing)


def _captions(root: Path, **options: Any) -> Any:
    return open_source(dict(kind="folder", path=root, files=("captions",), **options))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (b'{"image": "images/0.png", "te', "bad_json"),
        (b'{"image": "images/0.png", "text": "\xff"}', "bad_utf8"),
        (b"[1, 2]", "bad_row"),
        (b"[" * 100_000, "bad_json"),
        (dict(image="images/0.png", caption="other key"), "bad_row"),
        (dict(image=7, text="x"), "bad_row"),
        (dict(image="images/0.png", text=" \n"), "empty_text"),
        (b'{"image": "images/0.png", "text": "\\ud800"}', "bad_text"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_kind(folder: Path, kit: Any, row: Any, kind: str) -> None:
    kit.write(folder / "captions.jsonl", [dict(image="images/0.png", text="<boi> is text"), b"", row])
    source = _captions(folder)
    assert len(source) == 2 and source[0].parts[0] == TextPart("<boi> is text")
    with pytest.raises(BadItem, match=f"captions.jsonl:3: {kind}: ") as bad:
        source[1]
    assert bad.value.kind == kind and bad.value.origin.endswith("captions.jsonl:3")


def test_a_row_with_other_keys_says_how_they_are_mapped(folder: Path, kit: Any) -> None:
    kit.write(
        folder / "captions.jsonl", [dict(photo="images/0.png", words="a cat"), dict(image="images/0.png", text=7)]
    )
    source = _captions(folder)
    with pytest.raises(BadItem, match=r"found {photo, words}\. .*: (columns={.*})") as bad:
        source[0]
    given = bad.value.reason.rpartition("columns=")[2].replace("NAME", "photo", 1).replace("NAME", "words")
    assert _captions(folder, columns=json.loads(given))[0].parts[0] == TextPart("a cat")
    with pytest.raises(BadItem) as bad:
        source[1]
    assert "columns=" not in bad.value.reason, "its keys are known"


def test_splits_by_name_and_by_part(folder: Path, kit: Any) -> None:
    rows = [dict(image=f"images/{i % 20}.png", text=f"{i}", split="test" if i < 20 else "train") for i in range(400)]
    kit.write(folder / "captions.jsonl", [*rows, b"{broken"])

    def got(split: str | None) -> set[str]:
        return set(texts([_captions(folder, split=split)]))

    assert got("test") == {str(i) for i in range(20)} and len(got(None)) == 400
    first, last = got("train[:60%]"), got("train[60%:]")
    assert first | last == got("train") and not first & last and 0.3 < len(first) / 380 < 0.9
    assert not {int(i) % 20 for i in first} & {int(i) % 20 for i in last}, "one image on both sides"
    assert len(_captions(folder, split="test")) == 21, "a broken row must not vanish"
    kit.write(folder / "captions.jsonl", rows)
    with pytest.raises(ValueError, match="no row is in split 'dev'; the rows' splits are: test, train"):
        _captions(folder, split="dev")


def test_wrong_specs_say_what_is_expected(tmp_path: Path) -> None:
    for spec, message in [
        (dict(kind="spreadsheet"), "expected a kind, one of"),
        (dict(kind="jsonl", path="nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (
            dict(kind="folder", path=tmp_path),
            "expected a folder with captions.jsonl or docs.jsonl or vqa.jsonl .* no file of these names",
        ),
        (
            dict(kind="folder", path=tmp_path / "nowhere", files=("captions",)),
            "captions.jsonl .* no such folder at .*path=DIR",
        ),
        (dict(kind="tfds", name="shape/captions", data_dir=str(tmp_path)), "TFDS dataset 'shape/captions'"),
        (dict(kind="tfds", name="shapes/nothing", data_dir=str(tmp_path)), "BuilderConfig nothing not found"),
        (dict(kind="jsonl", path="x", colour="red"), "unexpected keyword argument 'colour'"),
        (dict(kind="folder", path=tmp_path, files=("captions",), split="train[5]"), "captions.jsonl: no such file"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_source(spec)
        assert len(str(caught.value)) < 500, "one sentence, not a list of all datasets"


@pytest.mark.parametrize("takes", [0.0, 2e-3])  # seconds per item: read directly, and read ahead by threads
def test_reading_keeps_order_and_gives_bad_items_as_values(
    folder: Path, monkeypatch: pytest.MonkeyPatch, takes: float
) -> None:
    (folder / "images/4.png").write_bytes(b"")
    source = _captions(folder)
    expected = [item for _, item in read(source, range(20))]
    assert isinstance(expected[4], BadItem) and expected[4].kind == "empty_file" and expected[5] == source[5]

    threads, get = set(), type(source).__getitem__

    def slowly(self: Any, i: int) -> Any:
        threads.add(threading.current_thread().name)
        time.sleep(takes)
        return get(self, i)

    monkeypatch.setattr(type(source), "__getitem__", slowly)
    for workers in (1, 8):
        numbers, items = zip(*read(source, reversed(range(20)), workers), strict=True)
        assert numbers == tuple(reversed(range(20)))
        assert [type(item) for item in reversed(items)] == [type(item) for item in expected]
        assert items[-6] == expected[5]
    assert len(threads) > 1 or not takes


def test_tfds_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds

    from ar_unified.data import shapes

    for config in shapes.Shapes.BUILDER_CONFIGS:  # the same dataset, with few examples
        monkeypatch.setattr(config, "train", 6)
        monkeypatch.setattr(config, "held_out", 6)
    where = dict(kind="tfds", data_dir=str(tmp_path))
    pairs = open_source(dict(name="shapes/captions_32", split="train[:50%]", label="pairs", **where))
    asked = open_source(dict(name="shapes/questions_32", split="validation", **where))
    told = open_source(dict(name="shapes/stories_32", split="train", **where))
    assert (len(pairs), pairs.name, asked.name) == (3, "pairs", "shapes/questions_32")
    pair, question, story = pairs[0], asked[5], told[1]
    assert (pair.task, question.task, story.task) == ("text_to_image", "image_to_text", "interleaved")
    assert pair.parts[1].pixels.shape == (32, 32, 3) and isinstance(pair.meta["scene"], str)
    assert [type(part) for part in question.parts] == [ImagePart, TextPart, TextPart] and len(
        question.asked[0].parts
    ) == 2
    assert [type(part) for part in story.parts] == [TextPart, ImagePart] * (len(story.parts) // 2)
    raw = tfds.data_source("shapes/stories_32", split="train", data_dir=str(tmp_path))[1]
    for part, pixels in zip(story.parts[1::2], raw["images"], strict=True):
        assert np.array_equal(part.pixels, pixels)
    assert told.texts(1) == [part.text for part in story.parts[::2]]
    assert asked.origin(5) == "shapes/questions_32/1.1.0/validation:5"


@pytest.mark.parametrize("kind", ["rows", "tars", "images", "augmented", "clips"])
def test_images_are_resized_by_whoever_decodes_them(kind: str, folder: Path, tmp_path: Path, kit: Any) -> None:
    """The pixels are the same as with later resizing, and an image of several questions is still one array."""
    for i in range(20):
        name = folder / "images" / f"{i}.png"
        name.write_bytes(to_png(kit.image(i, 30 + i, 40 - i)) if i else b"no image")
    shown = [dict(image=(folder / f"images/{i}.png").read_bytes(), text=f"{i}") for i in range(20)]
    spec: dict[str, Any] = {
        "rows": lambda: dict(kind="folder", path=folder),
        "tars": lambda: copies.webdataset(tmp_path / "tars", shown),
        "images": lambda: dict(kind="images", path=folder),
        "augmented": lambda: dict(kind="folder", path=folder, augmentation=dict(count=2, shift=0.2)),
        "clips": lambda: (folder / "images/0.png").unlink() or dict(kind="clips", path=folder),
    }[kind]()
    source, resize = open_source(spec), Resize("crop", 16, 16)
    small = resized(source, resize)
    assert (len(small), small.name, small.fingerprint) == (len(source), source.name, source.fingerprint)
    found, whole = seen(small), seen(source)
    assert any(isinstance(each, list) and each[0].shape != (16, 16, 3) for each in whole), "the source resizes none"
    for mine, theirs in zip(found, whole, strict=True):
        if isinstance(theirs, list):
            assert all(map(np.array_equal, mine, map(resize, theirs))) and len(mine) == len(theirs)
        else:
            assert mine == theirs, "what is bad"
    if kind == "rows":
        kit.write(folder / "vqa.jsonl", [dict(image="images/3.png", question=f"{i}?", answer="it") for i in range(2)])
        asked = resized(open_source(dict(kind="folder", path=folder, files=["vqa"])), resize)
        assert asked[0].parts[0].pixels is asked[1].parts[0].pixels


def seen(source: Any) -> list[list[np.ndarray] | tuple[str, str]]:
    """The images of each item, or its fault."""
    return [
        (item.kind, item.origin)
        if isinstance(item, BadItem)
        else [part.pixels for part in item.parts if isinstance(part, ImagePart)]
        for _, item in read(source, range(len(source)))
    ]


def test_decoders_are_one_more_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for own, expected in ((1, 2), (2, 3), (64, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, own=own: set(range(own)), raising=False)
        assert decoders() == expected


def test_plain_images_are_documents_of_one_image(tmp_path: Path, kit: Any) -> None:
    (tmp_path / "b").mkdir()
    for name, number in (("b/2.PNG", 2), ("a.png", 1)):
        (tmp_path / name).write_bytes(to_png(kit.image(number)))
    (tmp_path / "c.jpg").write_bytes(b"no image")
    (tmp_path / "readme.md").write_text("neither")
    source = open_source(dict(kind="images", path=tmp_path))
    assert len(source) == 3 and source.name == tmp_path.name and list(texts([source])) == []
    assert [source[i] for i in (0, 1)] == [Document.of((ImagePart(kit.image(i)),)) for i in (1, 2)]
    with pytest.raises(BadItem, match="c.jpg: unreadable_image"):
        source[2]
    before = source.fingerprint
    (tmp_path / "c.jpg").unlink()
    assert open_source(dict(kind="images", path=tmp_path)).fingerprint != before
    with pytest.raises(UserError, match="image files .* found none"):
        (tmp_path / "b" / "2.PNG").unlink()
        open_source(dict(kind="images", path=tmp_path / "b"))
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        open_source(dict(kind="images", path=tmp_path / "nowhere"))
