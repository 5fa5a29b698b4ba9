from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ar_unified.data.images import to_png
from ar_unified.data.items import BadItem, texts_of
from ar_unified.data.sources import open_source, read, texts
from ar_unified.errors import UserError
from ar_unified.language.document import Document, ImagePart, TextPart
from tests.data import copies

f = tfds.features
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
PNG = to_png(PICTURE)


def test_many_items_are_read_at_once_and_texts_read_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = dict(image=f.Image(shape=(8, 8, 3)), text=f.Text(), scene=f.Text())
    source: Any = open_source(
        copies.dataset(tmp_path, "pairs", features, [dict(image=PNG, text=f"t{i}", scene="s") for i in range(100)])
    )
    calls, records = [], type(source._examples).__getitems__

    def counted(self: Any, keys: Any) -> Any:
        calls.append(len(keys))
        return records(self, keys)

    monkeypatch.setattr(type(source._examples), "__getitems__", counted)
    order = [*range(99, -1, -1)]
    assert [found for _, found in texts_of(source, order)] == [[f"t{i}"] for i in order] and calls == [100]
    assert list(texts([source])) == [f"t{i}" for i in range(100)] and calls == [100, 100]
    pair = Document.of((TextPart("t7"), ImagePart(PICTURE)), prompt=1)
    found = dict(read(source, range(100)))
    assert calls == [100] * 3 and found[7] == pair == source[7] and found[7].meta == {"scene": "s"}
    assert source.read([3], pictures=False) == [{"text": "t3"}], "what texts do not need is not even parsed"


def test_shipped_mappings(tmp_path: Path) -> None:
    coco = dict(image=f.Image(), captions=f.Sequence(dict(id=np.int64, text=f.Text())), **{"image/id": np.int64})
    ai2d = dict(image=f.Image(), question=f.Text(), options=f.Sequence(f.Text()), answer=np.int64)
    made = {
        "mnist": (
            dict(image=f.Image(shape=(8, 8, 3)), label=f.ClassLabel(num_classes=10)),
            dict(image=to_png(PICTURE[..., [0, 0, 0]]), label=7),
            (TextPart("7"), ImagePart(PICTURE[..., [0, 0, 0]])),
        ),
        "cifar10": (
            dict(id=f.Text(), image=f.Image(shape=(8, 8, 3)), label=f.ClassLabel(names=["airplane", "cat"])),
            dict(id="x_1", image=PNG, label=1),
            (TextPart("cat"), ImagePart(PICTURE)),
        ),
        "coco_captions": (
            coco,
            {"image": PNG, "image/id": 3, "captions": [dict(id=1, text="a cat"), dict(id=2, text="cats")]},
            (TextPart("a cat"), ImagePart(PICTURE)),
        ),
        "wikipedia": (
            dict(title=f.Text(), text=f.Text()),
            dict(title="Cat", text="Cats are."),
            (TextPart("Cat\n\nCats are."),),
        ),
        "ai2d": (
            ai2d,
            dict(image=PNG, question="Which eats?", options=["the leaf", "the fox"], answer=1),
            (ImagePart(PICTURE), TextPart("Which eats?\nthe leaf\nthe fox"), TextPart("the fox")),
        ),
    }
    for name, (features, example, parts) in made.items():
        source: Any = open_source(copies.dataset(tmp_path, name, features, [example]))
        assert source[0].parts == parts, name
        assert source.texts(0) == [part.text for part in parts if isinstance(part, TextPart)]
        assert source.has_images == (name != "wikipedia")


def test_a_mapping_in_the_config(tmp_path: Path) -> None:
    features = dict(photo=f.Image(), title=f.Text(), kind=f.ClassLabel(names=["cat", "dog"]), lang=f.Text())
    spec = copies.dataset(tmp_path, "own", features, [dict(photo=PNG, title="Rex", kind=1, lang="eng")])
    with pytest.raises(UserError, match="own:1.0.0: expected image, text, .*; found .*photo.* Say which"):
        open_source(spec)
    source: Any = open_source(spec | dict(columns=dict(image="photo", text="{title}, a {kind}", language="lang")))
    assert source[0].parts == (TextPart("Rex, a dog"), ImagePart(PICTURE)) and source.language(0) == "eng"
    with pytest.raises(UserError, match="expected a column 'titel', .*; did you mean 'title'"):
        open_source(spec | dict(columns=dict(image="photo", text="titel")))
    with pytest.raises(UserError, match="expected one of the parts .*; found 'txt'"):
        open_source(spec | dict(columns=dict(txt="title")))


def test_a_bad_example_is_one_bad_item(tmp_path: Path) -> None:
    features = dict(image=f.Image(), text=f.Text())
    source = open_source(
        copies.dataset(tmp_path, "odd", features, [dict(image=PNG, text=text) for text in ("a", b"caf\xe9", "", "b")])
    )
    found = [item for _, item in read(source, range(4))]
    assert [item.kind if isinstance(item, BadItem) else "" for item in found] == ["", "bad_utf8", "empty_text", ""]
    assert found[1].origin == "odd/1.0.0/train:1" and [x.kind for _, x in texts_of(source, [1])] == ["bad_utf8"]
