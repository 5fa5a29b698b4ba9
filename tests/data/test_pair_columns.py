"""Preference pairs in tables, tars and JSONL with other names give the same documents and shards as in plain JSONL."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ar_unified.data.images import to_png
from ar_unified.data.items import BadItem, texts_of
from ar_unified.data.prepare import prepare
from ar_unified.data.sources import open_source, read
from ar_unified.errors import UserError
from ar_unified.language.document import Document, DocumentError, TextPart
from ar_unified.language.rows import document_from_json
from tests.data import copies
from tests.data.conftest import Kit

PICTURES = [to_png(Kit.image(i)) for i in range(12)]


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def shown(*data: bytes) -> list[dict[str, str]]:
    return [{"type": "image", "image": url(each)} for each in data]


def text(*said: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": each} for each in said]


def asked(prompt: str) -> dict[str, Any]:
    return {"role": "user", "content": prompt}


def answered(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": answer}


# Name -> pairs in two forms each: a record as in a table, and a row in the format of `language.rows`.
RECORDS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "texts": [
        (
            dict(id=str(i), prompt=f"say {i}", chosen="yes " * (1 + i % 3), rejected=f"no {i}", score=i),
            dict(id=str(i), prompt=f"say {i}", chosen="yes " * (1 + i % 3), rejected=f"no {i}", score=i),
        )
        for i in range(20)
    ],
    "images": [
        (
            dict(caption=f"draw {i}", chosen=PICTURES[i], rejected=PICTURES[i + 6]),
            dict(prompt=f"draw {i}", chosen=shown(PICTURES[i]), rejected=shown(PICTURES[i + 6])),
        )
        for i in range(6)
    ],
    "questions": [
        (
            dict(image=PICTURES[i], question=f"what {i}?", chosen="a dog", rejected="a cat"),
            dict(prompt=shown(PICTURES[i]) + text(f"what {i}?"), chosen="a dog", rejected="a cat"),
        )
        for i in range(6)
    ],
    "places": [
        (
            dict(images=[PICTURES[i], PICTURES[i + 1]], prompt="of <image> and <image>:", chosen="one", rejected="two"),
            dict(
                prompt=[*text("of"), *shown(PICTURES[i]), *text("and"), *shown(PICTURES[i + 1]), *text(":")],
                chosen="one",
                rejected="two",
            ),
        )
        for i in range(6)
    ],
    "messages": [
        (
            dict(
                prompt=[asked(f"what {i}?"), answered("which?"), asked("that")],
                chosen=[answered("a dog")],
                rejected=[answered("a cat")],
            ),
            dict(
                messages=[asked(f"what {i}?"), answered("which?"), asked("that")],
                chosen=answered("a dog"),
                rejected=answered("a cat"),
            ),
        )
        for i in range(6)
    ],
    "conversations": [
        (
            dict(
                prompt=f"what {i}?",
                chosen=[asked(f"what {i}?"), answered("a dog")],
                rejected=[asked(f"what {i}?"), answered("a cat")],
                messages=[asked(f"what {i}?"), answered("a dog")],
            ),
            dict(messages=[asked(f"what {i}?")], chosen="a dog", rejected="a cat"),
        )
        for i in range(6)
    ],
}


def written(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(kind="jsonl", path=str(path))


def tars(root: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Each text or image is its own member; other values are keys of .json."""
    members: list[tuple[Any, bytes]] = []
    for i, record in enumerate(records):
        rest = {}
        for key, value in record.items():
            if isinstance(value, bytes):
                members.append((f"{i:03d}.png" if key == "image" else f"{i:03d}.{key}.png", value))
            elif isinstance(value, list) and isinstance(value[0], bytes):
                members += [(f"{i:03d}.{j}.png", each) for j, each in enumerate(value)]
            elif key == "caption":
                members.append((f"{i:03d}.txt", value.encode()))
            elif key in ("chosen", "rejected") and isinstance(value, str):
                members.append((f"{i:03d}.{key}.txt", value.encode()))
            else:
                rest[key] = value
        members += [(f"{i:03d}.json", json.dumps(rest).encode())] if rest else []
    root.mkdir()
    (root / "000.tar").write_bytes(copies.tar(members))
    return dict(kind="webdataset", path=str(root / "000.tar"))


@pytest.mark.parametrize("kind", RECORDS)
def test_the_same_pairs_in_every_format(kind: str, tmp_path: Path, grammar: Any) -> None:
    records, rows = ([dict(each) for each in side] for side in zip(*RECORDS[kind], strict=True))
    specs = {
        "jsonl": written(tmp_path / "rows.jsonl", rows),
        "parquet": copies.parquet(tmp_path / "parquet", records, files=2, rows=4),
        "arrow": copies.arrow(tmp_path / "arrow", records, files=2, rows=4),
    }
    if kind != "texts":  # in a tar, ids would be the names of members
        specs["webdataset"] = tars(tmp_path / "tars", records)
    found = {}
    for name, spec in specs.items():
        source, out = open_source(spec | dict(label="same")), tmp_path / "out" / name
        prepare([source], grammar, Kit.Tokenizer(), out, max_tokens=256, shard_items=8, show_progress=False)
        files = {path.name: path.read_bytes() for path in sorted((out / "same").iterdir())}
        documents = [item for _, item in read(source, range(len(source)))]
        texts = [said for _, said in texts_of(source, range(len(source)))]
        assert texts == [[part.text for part in each.parts if isinstance(part, TextPart)] for each in documents], name
        found[name] = documents, files
    documents, files = found["jsonl"]
    assert len(documents) == len(rows) and all(each.rejected is not None for each in documents) and len(files) > 1
    for name in specs:
        assert found[name][1] == files, name
        assert [each.rejected for each in found[name][0]] == [each.rejected for each in documents], name
    if kind == "texts":
        assert found["parquet"][0] == documents, "ids and meta travel along"


def test_columns_of_other_names_are_mapped_in_tables_and_in_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "b.png").write_bytes(PICTURES[1])
    rows = [dict(system="Be brief.", input="draw", good={"path": "a.png"}, bad={"path": "b.png"})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    columns = dict(prompt="{system}\n\n{input}", chosen="good", rejected="bad")
    specs = written(tmp_path / "rows.jsonl", rows), dict(kind="parquet", path=str(tmp_path / "t.parquet"))
    sources = [open_source(spec | dict(columns=columns)) for spec in specs]
    assert [len(source) for source in sources] == [1, 1]
    one, other = (source[0] for source in sources)
    assert one.turns == other.turns and one.rejected == other.rejected
    assert one.turns[0].parts == (TextPart("Be brief.\n\ndraw"),)
    assert (one.answer[0].pixels == Kit.image(0)).all() and (one.rejected.parts[0].pixels == Kit.image(1)).all()
    with pytest.raises(
        UserError, match="columns: expected one of the parts prompt, chosen, rejected, .*; found 'choosen'"
    ):
        open_source(specs[0] | dict(columns=dict(choosen="good")))
    with pytest.raises(UserError, match="rejected: expected a column 'worse', found the columns"):
        open_source(specs[1] | dict(columns=columns | dict(rejected="worse")))


BAD: list[tuple[dict[str, Any], str]] = [
    (dict(prompt="x", chosen="a", rejected="a"), "same_answers"),
    (dict(prompt="x", chosen="a", rejected=None), "empty_answer"),
    (dict(prompt=None, chosen="a", rejected="b"), "no_prompt"),
]


def test_what_cannot_be_used_is_named_row_by_row_and_the_rest_is_read(tmp_path: Path) -> None:
    good = dict(prompt="x", chosen="a", rejected="b")
    pq.write_table(pa.Table.from_pylist([*(row for row, _ in BAD), good]), tmp_path / "t.parquet")
    found = [item for _, item in read(open_source(dict(kind="parquet", path=str(tmp_path / "t.parquet"))), range(4))]
    assert [item.kind for item in found if isinstance(item, BadItem)] == [kind for _, kind in BAD]
    assert isinstance(found[-1], Document) and found[-1].rejected is not None
    broken = [dict(prompt="x", chosen={"bytes": each, "path": None}, rejected="b") for each in (b"GIF89a", None)]
    pq.write_table(pa.Table.from_pylist(broken), tmp_path / "p.parquet")
    found = [item for _, item in read(open_source(dict(kind="parquet", path=str(tmp_path / "p.parquet"))), range(2))]
    assert [item.kind for item in found if isinstance(item, BadItem)] == ["unreadable_image", "missing_image"]


@pytest.mark.parametrize(
    "changes, kind, said",
    [
        (dict(rejected=[asked("y?"), answered("b")]), "bad_row", "to differ only in the last message"),
        (
            dict(prompt="another"),
            "two_prompts",
            "prompt: expected the same question as in chosen and rejected, or no prompt; found 'another'",
        ),
        (dict(messages=[asked("z?")]), "two_prompts", "messages: expected the same question as in chosen and rejected"),
        (dict(rejected=[asked("x?"), answered("a")]), "same_answers", "expected two answers"),
        (dict(rejected=[asked("x?"), asked("b")]), "bad_row", "rejected: expected the assistant's message"),
    ],
)
def test_conversations_that_are_no_pair_are_refused(changes: dict[str, Any], kind: str, said: str) -> None:
    row = dict(chosen=[asked("x?"), answered("a")], rejected=[asked("x?"), answered("b")])
    document = document_from_json(row | dict(prompt="x?"), lambda name: pytest.fail(name))
    assert document.asked[0].parts == (TextPart("x?"),) and document.answer == (TextPart("a"),)
    with pytest.raises(DocumentError, match=said) as raised:
        document_from_json(row | changes, lambda name: pytest.fail(name))
    assert raised.value.kind == kind


def test_one_answer_alone_is_no_pair(tmp_path: Path) -> None:
    """A column called "chosen" without "rejected" is copied to `meta`, like any other column."""
    pq.write_table(pa.Table.from_pylist([dict(text="a", prompt="b", chosen="c")]), tmp_path / "t.parquet")
    source = open_source(dict(kind="parquet", path=str(tmp_path / "t.parquet")))
    found = source[0]
    assert len(source) == 1
    assert found.rejected is None and found.parts == (TextPart("a"),)
