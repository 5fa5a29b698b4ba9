from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ar_unified.data.images import to_png
from ar_unified.data.items import texts_of
from ar_unified.data.prepare import prepare
from ar_unified.data.sources import EmptySplit, kind_of, open_source, packed, read
from ar_unified.data.sources.shard_names import braces
from ar_unified.errors import UserError
from ar_unified.language.document import Document, ImagePart, TextPart
from tests.data import copies

f = tfds.features
FEATURES = {
    "captions": dict(image=f.Image(), text=f.Text()),
    "vqa": dict(image=f.Image(), question=f.Text(), answer=f.Text()),
    "docs": dict(texts=f.Sequence(f.Text()), images=f.Sequence(f.Image())),
}


def examples(kit: Any, kind: str, count: int) -> list[dict[str, Any]]:
    pictures = [to_png(kit.image(i)) for i in range(8)]
    make = {
        "captions": lambda i: dict(image=pictures[i % 8], text=f"picture {i}"),
        "vqa": lambda i: dict(image=pictures[i % 8], question=f"which is {i}?", answer="it"),
        "docs": lambda i: dict(
            texts=[f"{i}, {j}" for j in range(1 + i % 3)], images=[pictures[(i + j) % 8] for j in range(1 + i % 3)]
        ),
        "messages": lambda i: dict(
            images=pictures[i % 4 : i % 4 + 1 + i % 2],
            messages=[
                dict(role="user", content="<image>" * (1 + i % 2) + f"what {i}?"),
                dict(role="assistant", content="it"),
            ],
        ),
    }[kind]
    return [make(i) for i in range(count)]


@pytest.mark.parametrize("kind", ["captions", "vqa", "docs", "messages"])
def test_the_same_documents_in_every_format(kind: str, tmp_path: Path, kit: Any, grammar: Any) -> None:
    given = examples(kit, kind, 210 if kind == "captions" else 60)
    specs = {
        "folder": copies.folder(tmp_path / "folder", "docs" if kind == "messages" else kind, given),
        "jsonl": copies.jsonl(tmp_path / "own.jsonl", given),
        "parquet": copies.parquet(tmp_path / "parquet", given),
        "arrow": copies.arrow(tmp_path / "arrow", given),
        "webdataset": copies.webdataset(tmp_path / "tars", given),
        **{ending: copies.packed_tars(tmp_path / ending, given, ending) for ending in ("tar.gz", "tgz", "tar.zst")},
    }
    if kind in FEATURES:
        specs["tfds"] = copies.dataset(tmp_path / "tfds", kind, FEATURES[kind], given)
    require_the_same(specs, given, tmp_path / "out", grammar, kit, shard_items=50)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captions", "docs"])
def test_2000_documents_as_a_folder_parquet_tars_and_tfds(kind: str, tmp_path: Path, kit: Any, grammar: Any) -> None:
    given = varied(kit, kind, 2000)
    specs = {
        "folder": copies.folder(tmp_path / "folder", kind, given),
        "parquet": copies.parquet(tmp_path / "parquet", given, files=4, rows=100),
        "webdataset": copies.webdataset(tmp_path / "tars", given, shards=20),
        "tfds": copies.dataset(tmp_path / "tfds", kind, FEATURES[kind], given),
    }
    require_the_same(specs, given, tmp_path / "out", grammar, kit, shard_items=300)


def varied(kit: Any, kind: str, count: int) -> list[dict[str, Any]]:
    """Different documents: texts in several scripts, and PNG, JPEG and WebP images of several sizes and modes."""
    words = ("a cat", "ein Bär\nim Wald", "кошка", "猫と犬", "قطة", "👩‍🚀 on the moon", "  two  blanks ", "x" * 40)

    def picture(i: int) -> bytes:
        image = Image.fromarray(kit.image(i, 16 + i % 9, 16 + i % 7)).convert(("RGB", "L", "RGB", "P")[i % 4])
        image.save(file := io.BytesIO(), "PNG" if i % 4 == 3 else ("JPEG", "PNG", "WEBP")[i % 3])
        return file.getvalue()

    if kind == "captions":
        return [dict(image=picture(i), text=f"{words[i % 8]} {i}") for i in range(count)]
    return [
        dict(
            texts=[f"{words[(i + j) % 8]} {i}" for j in range(1 + i % 3)],
            images=[picture(3 * i + j) for j in range(1 + i % 3)],
        )
        for i in range(count)
    ]


def require_the_same(
    specs: dict[str, Any], given: list[Any], out: Path, grammar: Any, kit: Any, *, shard_items: int
) -> None:
    """Asserts that all sources in `specs`, which are copies of the documents in `given`, have these documents, the same
    texts and the same bytes of token shards.
    """
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        source = open_source(spec | dict(label="same"))
        prepare(
            [source], grammar, kit.Tokenizer(), out / name, max_tokens=512, shard_items=shard_items, show_progress=False
        )
        files = {path.name: path.read_bytes() for path in sorted((out / name / "same").iterdir())}
        documents = [item for _, item in read(source, range(len(source)))]
        texts = [text for _, text in texts_of(source, range(len(source)))]
        assert texts == [[part.text for part in doc.parts if isinstance(part, TextPart)] for doc in documents], name
        found[name] = documents, texts, files
    for name, (documents, texts, files) in found.items():
        assert documents == found["folder"][0] and texts == found["folder"][1], name
        assert files == found["folder"][2] and len(files) > 3, name
    assert len(found["folder"][0]) == len(given) and all(isinstance(each, Document) for each in found["folder"][0])


@pytest.mark.parametrize("ending", ["tar.gz", "tar.zst"])
def test_packed_tars_are_read_forward_and_at_any_place(
    ending: str, tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = examples(kit, "captions", 60)
    spec = copies.packed_tars(tmp_path / "set", given, ending, shards=2)
    assert kind_of(tmp_path / "set") == kind_of(spec["path"]) == "webdataset"
    plain = open_source(copies.webdataset(tmp_path / "plain", given, shards=2))
    source = open_source(dict(kind="webdataset", path=tmp_path / "set"))
    assert source.fingerprint == plain.fingerprint
    order = [59, 0, 31, 30, 58, 1]
    assert [source[i] for i in order] == [plain[i] for i in order]
    assert source.origin(31) == f"{tmp_path}/set/001.{ending}:0001"
    opened = open_source(spec)
    backward: list[int] = []
    kind = packed._Gzip if ending == "tar.gz" else packed._Zstandard
    back = kind._back
    monkeypatch.setattr(kind, "_back", lambda self, at: (backward.append(at), back(self, at))[1])
    documents = [item for _, item in read(opened, range(len(opened)))]
    assert documents == [plain[i] for i in range(60)] and not any(backward), "in order it never goes back"


def test_tables_are_read_at_random_and_by_their_columns_alone(tmp_path: Path, kit: Any) -> None:
    given = examples(kit, "captions", 100)
    source: Any = open_source(copies.parquet(tmp_path / "set", given))
    order = [99, 0, 50, 51, 49, 7]
    assert [item for _, item in read(source, order)] == [source[i] for i in order]
    assert source.origin(40).endswith("train-00001-of-00003.parquet:7") and source.texts(40) == ["picture 40"]
    names = source.read([0], pictures=False)[0]
    assert list(names) == ["text"], "images are not read for texts"


def test_what_hugging_face_writes_needs_no_mapping(tmp_path: Path, kit: Any) -> None:
    png = to_png(kit.image(1))
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    rows = pa.table(dict(image=[{"bytes": png, "path": "a.png"}], label=[1]))
    pq.write_table(rows.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "labels.parquet")
    source = open_source(
        dict(kind="parquet", path=tmp_path / "labels.parquet", columns=dict(image="image", text="label"))
    )
    assert source[0].parts == (TextPart("dog"), ImagePart(kit.image(1)))

    (tmp_path / "b.png").write_bytes(png)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    rows = pa.table(
        dict(
            image=[{"bytes": None, "path": "b.png"}, None],
            conversations=[turns, [{**turns[0], "value": "Who?"}, turns[1]]],
        )
    )
    pq.write_table(rows, tmp_path / "llava.parquet")
    source = open_source(dict(kind="parquet", path=tmp_path / "llava.parquet"))
    assert [turn.parts for turn in source[0].turns] == [
        (ImagePart(kit.image(1)), TextPart("What is it?")),
        (TextPart("A cat."),),
    ]
    assert source[1].turns[0].parts == (TextPart("Who?"),)

    content = [{"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "This."}]}]
    pq.write_table(pa.table(dict(images=[[{"bytes": png}]], messages=[talk])), tmp_path / "chat.parquet")
    assert open_source(dict(kind="parquet", path=tmp_path / "chat.parquet"))[0].parts[0] == ImagePart(kit.image(1))

    obelics = dict(texts=[[None, "after", None]], images=[[{"bytes": png}, None, {"bytes": png}]])
    pq.write_table(pa.table(obelics), tmp_path / "obelics.parquet")
    parts = open_source(dict(kind="parquet", path=tmp_path / "obelics.parquet"))[0].parts
    assert [type(part) for part in parts] == [ImagePart, TextPart, ImagePart]


def test_images_alone_have_no_texts_and_are_no_bad_items(tmp_path: Path, kit: Any) -> None:
    given = [dict(image=to_png(kit.image(i))) for i in range(20)]
    for spec in (
        copies.parquet(tmp_path / "parquet", given),
        copies.webdataset(tmp_path / "tars", given),
        copies.dataset(tmp_path / "tfds", "alone", dict(image=f.Image()), given),
    ):
        source = open_source(spec)
        assert [texts for _, texts in texts_of(source, range(20))] == [[]] * 20, spec
        assert [len(item.parts) for _, item in read(source, range(20))] == [1] * 20, spec


def test_options_and_several_images(tmp_path: Path, kit: Any) -> None:
    png = to_png(kit.image(1))
    asked = dict(image=[{"bytes": png}], question=["Who?"], options=[["he", "she"]], answer=["1"])
    pq.write_table(pa.table(asked), tmp_path / "ai2d.parquet")
    assert open_source(dict(kind="parquet", path=tmp_path / "ai2d.parquet"))[0].answer == (TextPart("she"),)
    members = [("7.0.png", png), ("7.1.png", to_png(kit.image(2))), ("7.txt", b"two of them")]
    (tmp_path / "a.tar").write_bytes(copies.tar(members))
    pair = open_source(dict(kind="webdataset", path=tmp_path / "a.tar"))[0]
    assert pair == Document.of((TextPart("two of them"), ImagePart(kit.image(1)), ImagePart(kit.image(2))), prompt=1)
    assert pair.id == "7"


def test_keys_of_a_webdataset_in_the_config(tmp_path: Path, kit: Any) -> None:
    facts = json.dumps(dict(caption="a cat", lang="eng")).encode()
    members = [("a/7.left.png", to_png(kit.image(1))), ("a/7.right.png", to_png(kit.image(2))), ("a/7.json", facts)]
    (tmp_path / "a.tar").write_bytes(copies.tar(members))
    keys = dict(image="right.png", text="json/caption", language="json/lang")
    source: Any = open_source(dict(kind="webdataset", path=tmp_path / "a.tar", keys=keys))
    assert source[0].parts == (TextPart("a cat"), ImagePart(kit.image(2))) and source.language(0) == "eng"
    assert source.origin(0) == f"{tmp_path}/a.tar:a/7"


def test_parts_of_tables_and_tars(tmp_path: Path, kit: Any) -> None:
    given = examples(kit, "captions", 40)
    specs = [copies.parquet(tmp_path / "parquet", given), copies.webdataset(tmp_path / "tars", given)]
    for spec in specs:
        first, last = (open_source(spec | dict(split=split)) for split in ("[:95%]", "[95%:]"))
        assert len(first) == 38 and last.texts(0) == ["picture 38"] and len(last) == 2
        assert last.origin(1) == open_source(spec).origin(39)
    table = copies.table(given)
    pq.write_table(table.slice(0, 10), tmp_path / "parquet/data/test-00000-of-00001.parquet")
    assert (
        len(open_source(specs[0] | dict(split="test"))) == 10 and len(open_source(specs[0] | dict(split="train"))) == 40
    )
    with pytest.raises(UserError, match="a file of split 'validation', found data/t"):
        open_source(specs[0] | dict(split="validation"))
    (tmp_path / "one.tar").write_bytes(copies.tar([("0.txt", b"alone")]))
    with pytest.raises(EmptySplit):
        open_source(dict(kind="webdataset", path=tmp_path / "one.tar", split="[95%:]"))


def test_braces() -> None:
    assert braces("a/{000..002}.tar") == ["a/000.tar", "a/001.tar", "a/002.tar"]
    assert braces("{8..11}{a,b}") == ["8a", "8b", "9a", "9b", "10a", "10b", "11a", "11b"]
    assert braces("{a}.tar") == ["{a}.tar"]
    with pytest.raises(UserError, match="smaller number"):
        braces("{9..1}")
    with pytest.raises(UserError, match="003.tar: no such file"):
        open_source(dict(kind="webdataset", path="/nowhere/{003..004}.tar"))
