"""Files as no one should write them: the good documents come through, every bad one is named, nothing is written."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ar_unified.data.images import to_png
from ar_unified.data.items import texts_of
from ar_unified.data.sources import BadItem, open_source, read
from ar_unified.errors import UserError
from tests.data import copies

GOOD = to_png(np.full((8, 8, 3), 7, np.uint8))


def kinds(spec: Mapping[str, Any]) -> list[str]:
    """What becomes of every item of a source: "" for a document. Every origin names the file."""
    source = open_source(spec)
    found = [item for _, item in read(source, range(len(source)))]
    for item in found:
        assert not isinstance(item, BadItem) or str(spec["path"]).split("{")[0].rsplit("/", 1)[0] in item.origin
    assert len([text for _, text in texts_of(source, range(len(source)))]) == len(found)
    return [item.kind if isinstance(item, BadItem) else "" for item in found]


def image(**options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), options.pop("size", (8, 8))).save(
        file, options.pop("format", "PNG"), **options
    )
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def nan_tiff() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.array([[0.5, np.nan]] * 2, np.float32)).save(file, "TIFF")
    return file.getvalue()


FRAMES = [Image.new("L", (8, 8), grey) for grey in (0, 255)]
ROTATED = Image.Exif()
ROTATED[274] = 6
IMAGES = {
    "truncated": (to_png(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))[:150], "unreadable_image"),
    "empty": (b"", "empty_file"),
    "html in place of an image": (b"<!doctype html><title>404</title>", "unreadable_image"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "unreadable_image"),
    "eps, which would start a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "unreadable_image"),
    "bomb: 30,000 x 30,000 in a few bytes": (image(mode="1", size=(30_000, 30_000)), "image_shape"),
    "bomb: a text of 200 MB": (
        GOOD[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20))) + GOOD[33:],
        "unreadable_image",
    ),
    "30,000 px wide": (image(size=(30_000, 8)), "image_shape"),
    "NaN": (nan_tiff(), "unreadable_image"),
    "no pixels": (GOOD[:16] + bytes(8) + GOOD[24:], "unreadable_image"),
    "a jpeg called png": (image(format="JPEG"), ""),
    "animated": (image(mode="L", format="GIF", save_all=True, append_images=FRAMES), ""),
    "1 bit": (image(mode="1"), ""),
    "inks": (image(mode="CMYK", format="JPEG"), ""),
    "rotated": (image(format="JPEG", exif=ROTATED), ""),
}


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


def test_tars_that_are_not_whole(tmp_path: Path) -> None:
    whole = copies.tar([each for i in range(3) for each in pair(str(i))])
    (tmp_path / "0.tar").write_bytes(whole)
    (tmp_path / "1.tar").write_bytes(whole[: 512 * 5 + 20])  # in the middle of the second image
    (tmp_path / "2.tar").write_bytes(whole[: 512 * 4])  # where a member would begin
    (tmp_path / "3.tar").write_bytes(whole[: 512 * 4] + b"x" * 512 + whole[512 * 5 :])
    (tmp_path / "4.tar").write_bytes(gzip.compress(whole))
    (tmp_path / "5.tar").write_bytes(b"")
    (tmp_path / "6.tar").symlink_to("/etc/passwd")
    name = member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=64 << 20)
    with open(tmp_path / "7.tar", "wb") as file:  # a name of 64 MiB
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
