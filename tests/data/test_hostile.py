"""Malformed and hostile files. Good documents are read, every bad one is named, and nothing is written."""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ar_unified.cli.main import main
from ar_unified.data.items import texts_of
from ar_unified.data.sources import BadItem, open_source, read
from ar_unified.errors import UserError
from tests.data import copies
from tests.data.broken_files import BROKEN, GOOD, ODD, odd


def kinds(spec: Mapping[str, Any]) -> list[str]:
    """For every item of a source, its fault or "". Asserts that every origin names the file."""
    source = open_source(spec)
    found = [item for _, item in read(source, range(len(source)))]
    for item in found:
        assert not isinstance(item, BadItem) or str(spec["path"]).split("{")[0].rsplit("/", 1)[0] in item.origin
    assert len([text for _, text in texts_of(source, range(len(source)))]) == len(found)
    return [item.kind if isinstance(item, BadItem) else "" for item in found]


IMAGES = BROKEN | {name: (odd(number)[0], "") for number, name in enumerate(ODD)}


@pytest.mark.parametrize("form", ["folder", "parquet", "webdataset"])
def test_images_of_every_kind_of_wrong(form: str, tmp_path: Path) -> None:
    given = [dict(image=data, text=name) for name, (data, _) in IMAGES.items()]
    given = [each for bad in given for each in (bad, dict(image=GOOD, text="good"))]
    expected = [kind for _, right in IMAGES.values() for kind in (right, "")]
    spec = {
        "folder": lambda: copies.folder(tmp_path / "in", "captions", given),
        "parquet": lambda: copies.parquet(tmp_path / "in", given),
        "webdataset": lambda: copies.webdataset(tmp_path / "in", given),
    }[form]()
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    tracemalloc.start()
    assert kinds(spec) == expected
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))


def member(name: str, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(info, key, value)
    return info


def pair(key: str, text: bytes = b"good") -> list[tuple[Any, bytes]]:
    return [(f"{key}.png", GOOD), (f"{key}.txt", text)]


def test_a_file_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(GOOD)
    os.truncate(tmp_path / "a.png", 1 << 36)
    (tmp_path / "b.png").write_bytes(GOOD)
    assert kinds(dict(kind="images", path=tmp_path)) == ["unreadable_image", ""]


@pytest.mark.parametrize("form", ["parquet", "arrow", "feather"])
def test_values_that_unpacked_would_fill_the_memory_are_not_unpacked(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ar_unified.data.sources.unpacked_sizes.LARGEST", 1 << 22)
    images = [held(GOOD), held(bytes(8 << 20)), held(os.urandom(8 << 20)), held(GOOD)]  # the third does not compress
    rows = pa.table(dict(image=images, text=list("abcd")))
    path = tmp_path / f"a.{'arrow' if form == 'feather' else form}"
    if form == "parquet":
        pq.write_table(rows, path, row_group_size=1, compression="zstd", use_dictionary=False)
    else:
        make = pa.ipc.new_file if form == "feather" else pa.ipc.new_stream
        with make(path, rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
            stream.write_table(rows, max_chunksize=1)
    before = pa.total_allocated_bytes()
    source = open_source(dict(kind="parquet", path=path))
    assert pa.total_allocated_bytes() - before < 1 << 20, "opened without unpacking anything"
    assert kinds(dict(kind="parquet", path=path)) == ["", "too_large", "unreadable_image", ""]
    assert source.origin(3).endswith(":4")


def test_what_is_told_can_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9\x1b[2J.txt")
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"a text")
    source = open_source(dict(kind="text", path=tmp_path))
    bad = next(item for _, item in read(source, range(2)) if isinstance(item, BadItem))
    assert bad.origin == str(tmp_path / name) and str(bad).isprintable() and "caf\\udce9\\x1b[2J.txt" in str(bad)
    (tmp_path / os.fsdecode(b"\xe9.txt")).write_bytes(b"a text")  # a good file, with the text of a.txt
    output = tmp_path / "page.html"
    assert main(["validate", str(tmp_path), "--output", str(output)]) == 1
    said = capsys.readouterr().out
    assert "caf\\udce9" in said and "udce9.txt and " in said and "\x1b" not in said and "udce9" in output.read_text()


def test_long_and_foreign_names_of_members_are_told_whole(tmp_path: Path) -> None:
    name = "ü/" + "n" * 300
    (tmp_path / "a.tar").write_bytes(copies.tar([*pair(name), *pair("b", b"")]))
    source = open_source(dict(kind="webdataset", path=tmp_path / "a.tar"))
    assert source.origin(0) == f"{tmp_path}/a.tar:{name}" and source[0].id == name
    assert source.origin(1) == f"{tmp_path}/a.tar:b"


def test_members_of_a_tar_that_no_sample_has(tmp_path: Path) -> None:
    members = [
        *pair("0"),
        *pair("../1"),
        *pair("/etc/2"),
        (member("3.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
        ("3.txt", b"a link"),
        (member("4.png", type=tarfile.LNKTYPE, linkname="0.png"), b""),
        (member("5.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), b""),
        *pair("6"), ("6.png", GOOD),
        *pair("7", b"caf\xe9"),
        *pair("8", b" \n"),
        ("9.png", GOOD), ("9.json", b'{"caption": '),
        *pair("a" * 150),
        (member("._0.png"), b"litter"),
        ("10.mp3", b"sound"),
        (member("folder", type=tarfile.DIRTYPE), b""),
        *pair("folder/11", ("long " * 200_000).encode()),
        *pair("12", "\a\b\x1b[2J\u202e".encode()),
        (b"13\xff.png".decode("utf-8", "surrogateescape"), GOOD),
        *pair("./14"),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(copies.tar(members))
    assert kinds(dict(kind="webdataset", path=tmp_path / "a.tar")) == [
        "", "path_escapes", "path_escapes", "unreadable_file", "unreadable_file", "unreadable_file", "bad_row",
        "bad_utf8", "empty_text", "bad_json", "", "bad_row", "", "", "bad_utf8", "",
    ]  # fmt: skip
    assert not any(path.name != "a.tar" for path in tmp_path.rglob("*"))


def test_a_caption_below_another_name_is_not_lost_without_a_word(tmp_path: Path) -> None:
    facts: list[Any] = [
        dict(meta=dict(width=8, caption="a cat")),
        dict(width=8, exif=dict(iso=100), rows=[dict(label="cat")]),
        dict(found=[dict(by="x", text="a cat")]),
    ]
    members = [each for i in (0, 1, 2) for each in ((f"{i}.png", GOOD), (f"{i}.json", json.dumps(facts[i]).encode()))]
    (tmp_path / "a.tar").write_bytes(copies.tar(members))
    spec = dict(kind="webdataset", path=tmp_path / "a.tar")
    assert kinds(spec) == ["bad_row", "", "bad_row"], "an image with other facts is an image"
    for i in (0, 2):
        with pytest.raises(BadItem, match="found a text at '(meta/caption|found/0/text)'") as bad:
            open_source(spec)[i]
        text, alone = (json.loads(each) for each in re.findall("keys=({.*?})", bad.value.reason))
        assert [*open_source(spec | dict(keys=text | dict(image="png"))).texts(i)] == ["a cat"]
        assert len(open_source(spec | dict(keys=alone | dict(image="png")))[i].parts) == 1
        assert text["image"] == alone["image"] == "NAME"
    row = pa.table(dict(image=[GOOD], meta=[facts[0]["meta"]]))
    pq.write_table(row, tmp_path / "a.parquet")
    assert kinds(dict(kind="parquet", path=tmp_path / "a.parquet")) == ["bad_row"]


def test_tars_that_are_not_whole(tmp_path: Path) -> None:
    whole = copies.tar([each for i in range(3) for each in pair(str(i))])
    (tmp_path / "0.tar").write_bytes(whole)
    (tmp_path / "1.tar").write_bytes(whole[: 512 * 5 + 20])  # in the middle of the second image
    (tmp_path / "2.tar").write_bytes(whole[: 512 * 4])  # where the next member would begin
    (tmp_path / "3.tar").write_bytes(whole[: 512 * 4] + b"x" * 512 + whole[512 * 5 :])
    (tmp_path / "4.tar").write_bytes(gzip.compress(whole))
    (tmp_path / "5.tar").write_bytes(b"")
    (tmp_path / "6.tar").symlink_to("/etc/passwd")
    name = member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=64 << 20)
    with open(tmp_path / "7.tar", "wb") as file:  # a member's name has 64 MiB
        file.write(name.tobuf(tarfile.GNU_FORMAT))
        file.truncate(65 << 20)
    good = ["", "", ""]
    cut = "unreadable_file"
    tracemalloc.start()
    assert kinds(dict(kind="webdataset", path=tmp_path)) == [
        *good, "", cut, "", cut, "", cut, cut, cut, "path_escapes", cut
    ]  # fmt: skip
    assert tracemalloc.get_traced_memory()[1] < 30 << 20
    tracemalloc.stop()
    half = len(gzip.compress(whole[: 512 * 4]))
    packed = gzip.compress(whole[: 512 * 4]) + gzip.compress(whole[512 * 4 :])
    for i, data in enumerate((packed, packed[: half + 20], packed[:30], gzip.compress(b"<html>" * 200), b"", whole)):
        (tmp_path / "packed").mkdir(exist_ok=True)
        (tmp_path / f"packed/{i}.tar.gz").write_bytes(data)
    assert kinds(dict(kind="webdataset", path=tmp_path / "packed")) == [*good, "", cut, cut, cut, cut, cut]
    with pytest.raises(UserError, match="4.tar: no tar can be read: expected a tar, found gzip data; unpack it"):
        open_source(dict(kind="webdataset", path=tmp_path / "4.tar"))


def held(data: bytes | None) -> dict[str, Any] | None:
    return None if data is None else {"bytes": data, "path": None}


def test_rows_of_a_table_that_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(GOOD)
    root = tmp_path / "set"
    root.mkdir()
    images = [held(GOOD), None, {"bytes": None, "path": None}, {"bytes": None, "path": "../secret.png"}, held(GOOD)]
    texts = [b"a", b"b", b"c", b"d", b"caf\xe9"]
    rows = pa.table(dict(image=images, text=pa.array(texts, pa.binary()).view(pa.string())))
    pq.write_table(rows, root / "a.parquet", row_group_size=2)
    right = pa.table(dict(image=[held(GOOD)] * 3, text=["", None, "good"]))
    pq.write_table(right, root / "b.parquet")
    pq.write_table(pa.table(dict(image=[7], text=["an integer"])), root / "c.parquet")
    pq.write_table(pa.table(dict(image=[held(GOOD)], text=[7])), root / "d.parquet")
    pq.write_table(pa.table(dict(other=[1])), root / "e.parquet")
    found = kinds(dict(kind="parquet", path=root))
    assert found[:5] == ["", "missing_image", "missing_image", "path_escapes", "bad_utf8"]
    assert found[5:] == ["empty_text", "bad_text", "", "bad_row", "bad_text", "bad_row"]


def test_tables_that_are_not_whole(tmp_path: Path) -> None:
    given = [dict(image=GOOD + os.urandom(600), text=f"t{i}") for i in range(40)]
    spec = copies.parquet(tmp_path / "p", given, files=1, rows=10)
    (path,) = (tmp_path / "p/data").iterdir()
    data = path.read_bytes()
    for name, broken in {
        "b": data[:-6], "c": data[: len(data) // 2], "d": b"", "e": b"PAR1" + bytes(100) + b"PAR1", "f": b"<html>"
    }.items():  # fmt: skip
        (tmp_path / f"p/data/train-{name}.parquet").write_bytes(broken)
    assert kinds(spec) == [""] * 40 + ["unreadable_file"] * 5
    group = pq.ParquetFile(path).metadata.row_group(2)
    start = group.column(0).data_page_offset
    path.write_bytes(data[:start] + b"\xff" * 200 + data[start + 200 :])
    found = kinds(dict(kind="parquet", path=path))
    assert found == [""] * 20 + ["unreadable_file"] * 10 + [""] * 10

    spec = copies.arrow(tmp_path / "a", given, files=1, rows=10)
    (path,) = (tmp_path / "a").glob("*.arrow")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    assert kinds(spec) == [""] * 20 + ["unreadable_file"]
    path.write_bytes(data[:100])
    with pytest.raises(UserError, match="no file can be read: .*: unreadable_file: expected a whole arrow file"):
        open_source(spec)


def test_packed_rows_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ar_unified.data.sources.rows._LONGEST", 1 << 20)
    row = json.dumps(dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b")])).encode()
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(row + b"\n" + b"{" * (64 << 20) + b"\n" + row + b"\n"))
    tracemalloc.start()
    assert kinds(dict(kind="jsonl", path=path)) == ["", "too_large", ""]
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
    for data in (b"", b"\x1f\x8b\x08", gzip.compress(row)[:12], b"no gzip"):
        path.write_bytes(data)
        assert kinds(dict(kind="jsonl", path=path)) == ["unreadable_file"], data
