"""Everything that reads text accepts UTF-8 with or without a byte order mark, and refuses other encodings by name."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ar_unified.data import encoding
from ar_unified.data.checks.validate import validate
from ar_unified.data.encoding import EncodingError, foreign, text
from ar_unified.data.sources import BadItem, open_source, read, texts
from ar_unified.language.document import TextPart

MARK = codecs.BOM_UTF8
ROWS = [dict(text="een café"), dict(text="zwei")]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_costs_no_row_of_a_folder(folder: Path, end: bytes) -> None:
    def said() -> list[list[Any]]:
        found = open_source(dict(kind="folder", path=folder))
        return [
            [part.text for part in document.parts if isinstance(part, TextPart)]
            for _, document in read(found, range(35))
        ]

    before = said()
    for name in ("captions", "docs", "vqa"):
        file = folder / f"{name}.jsonl"
        file.write_bytes(MARK + file.read_bytes().replace(b"\n", end))
    assert said() == before and not validate(folder, show_progress=False).bad
    part = open_source(dict(kind="folder", path=folder, files=("captions",), split="train"))
    assert len(part) == 20 and part.origin(0).endswith("captions.jsonl:1")


def test_a_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    for name, data in {"a.txt": "één\r\ntwee", "b.TXT": "drie", "c.jsonl": LINES, "only.md": ""}.items():
        (tmp_path / name).write_bytes(MARK + data.encode())
    whole, lines = (open_source(dict(kind="text", path=tmp_path, by=by)) for by in ("file", "line"))
    bad: list[BadItem] = []
    assert list(texts([whole], left_out=bad.append)) == ["één\r\ntwee", "drie", "een café", "zwei"]
    assert [item.kind for item in bad] == ["empty_text"], "a mark and nothing else"
    assert list(texts([lines])) == ["één", "twee", "drie", "een café", "zwei"]
    assert [lines.origin(i).removeprefix(f"{tmp_path}/") for i in (0, 1, 3)] == ["a.txt:1", "a.txt:2", "c.jsonl:1"]


UTF = {
    "UTF-16 (little endian)": ("utf-16-le", codecs.BOM_UTF16_LE),
    "UTF-16 (big endian)": ("utf-16-be", codecs.BOM_UTF16_BE),
    "UTF-32 (little endian)": ("utf-32-le", codecs.BOM_UTF32_LE),
    "UTF-32 (big endian)": ("utf-32-be", codecs.BOM_UTF32_BE),
}


@pytest.mark.parametrize("name", UTF)
@pytest.mark.parametrize("marked", [True, False])
def test_other_encodings_are_one_bad_item_with_their_name(tmp_path: Path, name: str, marked: bool) -> None:
    codec, mark = UTF[name]
    for file, body in {
        "rows.jsonl": LINES,
        "captions.jsonl": '{"image": "a.png", "text": "b"}\n' * 3,
        "plain.txt": "plain words\n" * 99,
    }.items():
        (tmp_path / file).write_bytes((mark if marked else b"") + body.encode(codec))
    specs = [
        dict(kind="folder", path=tmp_path),
        dict(kind="folder", path=tmp_path, split="train"),
        dict(kind="jsonl", path=tmp_path / "rows.jsonl"),
        dict(kind="text", path=tmp_path / "plain.txt"),
        dict(kind="text", path=tmp_path / "plain.txt", by="line"),
        dict(kind="text", path=tmp_path / "rows.jsonl"),
    ]
    for spec in specs:
        source = open_source(spec)
        with pytest.raises(BadItem, match="bad_utf8") as error:
            source[0]
        assert len(source) == 1 and f"found {name}: save it as UTF-8" in str(error.value), spec


@pytest.mark.parametrize("name", UTF)
def test_a_mark_tells_what_no_zero_byte_shows(tmp_path: Path, name: str) -> None:
    codec, mark = UTF[name]
    (tmp_path / "a.txt").write_bytes(mark + ("\u56fe\u50cf" * 50).encode(codec))
    with pytest.raises(BadItem, match="bad_utf8") as error:
        open_source(dict(kind="text", path=tmp_path, by="line"))[0]
    assert f"found {name}: save it as UTF-8" in str(error.value)


def test_single_bytes_are_shown_as_windows_would_read_them() -> None:
    with pytest.raises(
        EncodingError, match=r"found 0xe9 at byte 103 of the file; in Windows-1252 this place would read 'café'"
    ):
        text("café".encode("cp1252"), 100)
    with pytest.raises(EncodingError, match="found 0x8a at byte 0;"):
        text("Šok".encode("cp1252"))


def test_what_is_no_text_is_said_by_its_name() -> None:
    for data, name in {
        gzip.compress(b"text"): "gzip data; unpack it",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n": "a pointer of Git LFS",
        b"PK\x03\x04rest": "a zip archive",
    }.items():
        assert name in foreign(data)
    with pytest.raises(EncodingError, match="a zero byte at byte 3: is it text at all"):
        text(b"abc\0def")
    for fine in ("plain", "naïve 图像 🙂", "", "a"):
        assert foreign(fine.encode() * 200) == "" and text(fine.encode()) == fine


@pytest.mark.parametrize(
    "content", [b"\x1f\x8b\x08\0\0\0\0\0", b"version https://git-lfs.github.com/spec/v1\n", b"ab\0cd"]
)
def test_no_reader_takes_binary_data_for_text(tmp_path: Path, content: bytes) -> None:
    for name in ("a.txt", "captions.jsonl"):
        (tmp_path / name).write_bytes(content)
    for spec in (dict(kind="text", path=tmp_path / "a.txt"), dict(kind="folder", path=tmp_path)):
        with pytest.raises(BadItem, match="bad_utf8: expected text in UTF-8, found "):
            open_source(spec)[0]


def test_a_file_that_changed_since_it_was_opened_is_a_bad_item(tmp_path: Path) -> None:
    changes: list[Callable[[Path], Any]] = [Path.unlink, lambda path: path.write_text("one\n")]
    for change in changes:
        (tmp_path / "a.txt").write_text("one\ntwo\n")
        source = open_source(dict(kind="text", path=tmp_path, by="line"))
        change(tmp_path / "a.txt")
        with pytest.raises(BadItem, match="a.txt: unreadable_file: the file has changed since"):
            source[1]


def test_the_head_that_is_looked_at_may_end_inside_a_letter(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * (encoding.HEAD - 1) + "é".encode() * 99)
    assert open_source(dict(kind="text", path=tmp_path)).texts(0)[0].endswith("é" * 99)
