"""Tables, tars and packed rows for `broken`: bad documents in complete files, and incomplete files."""

from __future__ import annotations

import base64
import gzip
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data import copies
from tests.data.broken_files import BROKEN, GOOD, LONG, Part, Said, odd, odd_text, said

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SCHEMA = pa.schema([("image", _IMAGE), ("text", pa.string())])
_BOMB = 280 << 20  # bytes of a value that is all zeros


def _held(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def _table(rows: Sequence[tuple[Any, Any]]) -> pa.Table:
    images, words = zip(*rows, strict=True)
    texts = [text.encode() if isinstance(text, str) else text for text in words]  # may be invalid UTF-8
    return pa.table([pa.array(images, _IMAGE), pa.array(texts, pa.binary()).view(pa.string())], schema=_SCHEMA)


def _good_rows(first: int, count: int) -> tuple[list[tuple[Any, str]], list[Said]]:
    files = [odd(i) for i in range(first, first + count)]
    rows = [(_held(data, f"{i}.png"), odd_text(i)) for i, (data, _) in enumerate(files, first)]
    return rows, [said(odd_text(i), greys) for i, (_, greys) in enumerate(files, first)]


_BAD_ROWS: dict[str, tuple[tuple[Any, Any], str]] = {
    "a null image": ((None, "x"), "missing_image"),
    "an image of two nulls": ((_held(None), "x"), "missing_image"),
    "an image's path that leads out": ((_held(None, "../../outside/secret.png"), "x"), "path_escapes"),
    "an image's path to nothing": ((_held(None, "none.png"), "x"), "missing_image"),
    "a null text": ((_held(GOOD), None), "bad_text"),
    "an empty text in a table": ((_held(GOOD), " "), "empty_text"),
    "a text in latin-1 in a table": ((_held(GOOD), b"caf\xe9"), "bad_utf8"),
    "a caption of 1 MB in a table": ((_held(GOOD), LONG), "too_long"),
    **{name: ((_held(data), "x"), kind) for name, (data, kind) in BROKEN.items()},
}


def tables(root: Path, count: int, each: int) -> Part:
    """A folder of Parquet and Arrow files: good ones, ones with a good and a bad row, and broken ones."""
    root.mkdir()
    part = Part(dict(kind="parquet", path=str(root)), [], set(_BAD_ROWS))

    def put(name: str, rows: pa.Table, told: Sequence[Said | str], **options: Any) -> None:
        if name.endswith(".arrow"):
            with pa.ipc.new_stream(root / name, rows.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
                stream.write_table(rows, max_chunksize=5)
        else:
            pq.write_table(rows, root / name, row_group_size=5, **options)
        for row, item in enumerate(told, 1):
            part.items.append((f"tables/{name}:{row}", item) if isinstance(item, str) else item)

    for i in range(count):
        rows, told = _good_rows(12 * i, 12)
        put(f"a{i:05d}.{'arrow' if i % 4 == 3 else 'parquet'}", _table(rows), told)
    for i in range(each):
        for number, (bad, kind) in enumerate(_BAD_ROWS.values()):
            rows, told = _good_rows(7 * number, 1)
            put(f"b{i}-0-{number:03d}.parquet", _table([bad, *rows]), [kind, *told])
        put(f"b{i}-1 integers for images.parquet", pa.table(dict(image=[7], text=["x"])), ["bad_row"])
        put(f"b{i}-2 integers for texts.parquet", pa.table(dict(image=[_held(GOOD)], text=[7])), ["bad_text"])
        put(f"b{i}-3 other columns.parquet", pa.table(dict(other=[1])), ["bad_row"])
        if i == 0:  # only once, because each takes a second to make
            bomb = pa.table([pa.array([_held(bytes(_BOMB))], _IMAGE), pa.array(["x"])], schema=_SCHEMA)
            put(f"b{i}-4 bomb.arrow", bomb, ["too_large"], compression="zstd")
            put(f"b{i}-5 bomb.parquet", bomb, ["too_large"], compression="zstd", use_dictionary=False)
        _broken_tables(root, i, part)
    part.ways |= {"integers for images", "integers for texts", "other columns", "a bomb of a table", "an Arrow bomb"}
    return part


def _broken_tables(root: Path, i: int, part: Part) -> None:
    rows, told = _good_rows(i, 15)
    whole = root / "whole"
    pq.write_table(_table(rows), whole, row_group_size=5)
    data, start = whole.read_bytes(), pq.ParquetFile(whole).metadata.row_group(1).column(0).data_page_offset
    whole.unlink()
    broken = {
        "a footer cut off": data[:-6],
        "half a table": data[: len(data) // 2],
        "an empty table": b"",
        "a table of zeros": b"PAR1" + bytes(99) + b"PAR1",
        "a table that is HTML": b"<html>",
        "a footer that claims 4 GB": data[:-8] + b"\xff\xff\xff\xffPAR1",
    }
    for number, content in enumerate(broken.values()):
        name = f"b{i}-6-{number}.parquet"
        (root / name).write_bytes(content)
        part.items.append((f"tables/{name}", "unreadable_file"))
    name = f"b{i}-7.parquet"
    (root / name).write_bytes(data[:start] + b"\xff" * 200 + data[start + 200 :])
    part.items += [*told[:5], *((f"tables/{name}:{row}", "unreadable_file") for row in range(6, 11)), *told[10:]]
    part.ways |= {*broken, "a broken group of rows"}


# ---- tars --------------------------------------------------------------------------------------------------------


def _member(name: str, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(info, key, value)
    return info


def _pair(key: str, image: bytes = GOOD, text: bytes = b"x") -> list[tuple[Any, bytes]]:
    return [(f"{key}.png", image), (f"{key}.txt", text)]


def _bad_samples() -> dict[str, tuple[list[tuple[Any, bytes]], str]]:
    """Ways in which a sample is broken: its members, named with @, and the kind of fault."""
    not_utf8 = b"@\xff.png".decode("utf-8", "surrogateescape")
    return {
        "a member ../": (_pair("../@"), "path_escapes"),
        "an absolute member": (_pair("/etc/@"), "path_escapes"),
        "a link in a tar": (
            [(_member("@.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""), ("@.txt", b"x")],
            "unreadable_file",
        ),
        "a hard link": ([(_member("@.png", type=tarfile.LNKTYPE, linkname="0.png"), b"")], "unreadable_file"),
        "a device": ([(_member("@.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), b"")], "unreadable_file"),
        "a member twice": ([*_pair("@"), ("@.png", GOOD)], "bad_row"),
        "a member in latin-1": (_pair("@", text=b"caf\xe9"), "bad_utf8"),
        "an empty member": (_pair("@", text=b" \n"), "empty_text"),
        "half an object": ([("@.png", GOOD), ("@.json", b'{"caption": ')], "bad_json"),
        "brackets in a tar": ([("@.png", GOOD), ("@.json", b"[" * 200_000)], "bad_json"),
        "sound": ([("@.mp3", b"sound")], "bad_row"),
        "a name that is no UTF-8": ([(not_utf8, GOOD)], "bad_utf8"),
        "a caption of 1 MB in a tar": (_pair("@", text=LONG.encode()), "too_long"),
        **{name: (_pair("@", data), kind) for name, (data, kind) in BROKEN.items()},
    }


def tars(root: Path, count: int, each: int) -> Part:
    """A folder of tars: good ones, one with all bad samples between good ones, and broken ones."""
    root.mkdir()
    part = Part(dict(kind="webdataset", path=str(root)), [], set(_bad_samples()))

    def good(number: int) -> list[tuple[Any, bytes]]:
        data, greys = odd(number)
        part.items.append(said(odd_text(number), greys))
        return _pair(f"good/{number}", data, odd_text(number).encode())

    for i in range(count):
        (root / f"a{i:05d}.tar").write_bytes(copies.tar([each for j in range(9) for each in good(9 * i + j)]))
    for i in range(each):
        members = [(_member("folder", type=tarfile.DIRTYPE), b""), (_member("._0.png"), b"litter")]
        for number, (bad, kind) in enumerate(_bad_samples().values()):
            key = f"s{number}"
            for name, data in bad:
                if isinstance(name, str):
                    name = name.replace("@", key)
                else:
                    name.name = name.name.replace("@", key)
                members.append((name, data))
            first = members[-len(bad)][0]
            shown = (first if isinstance(first, str) else first.name).partition(".p")[0].partition(".m")[0]
            shown = shown.encode(errors="surrogateescape").decode(errors="replace")
            part.items.append((f"tars/b{i}-0.tar:{shown}", kind))
            members += good(number)
        (root / f"b{i}-0.tar").write_bytes(copies.tar(members))
        _broken_tars(root, i, part)
    return part


def _broken_tars(root: Path, i: int, part: Part) -> None:
    files = [odd(number, "png") for number in range(3)]
    whole = copies.tar([each for number, (data, _) in enumerate(files) for each in
                        _pair(str(number), data.ljust(600, b"\0"), b"t%d" % number)])  # fmt: skip
    told = [said(f"t{number}", greys) for number, (_, greys) in enumerate(files)]
    long = _member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=64 << 20)
    ways: dict[str, tuple[bytes, list[Said], str]] = {
        # A sample has five blocks: a header, two blocks of an image, a header, one block of text.
        "a tar cut in a member": (whole[: 512 * 6 + 20], told[:1], "1"),
        "a tar cut between members": (whole[: 512 * 5], told[:1], "2"),
        "a header that is wrong": (whole[: 512 * 5] + b"x" * 512 + whole[512 * 6 :], told[:1], "2"),
        "an empty tar": (b"", [], "1"),
        "a tar that is HTML": (b"<html>" * 200, [], "1"),
        "a tar of a name of 64 MiB": (long.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20), [], "1"),
        "xz called .tar": (b"\xfd7zXZ\0" + bytes(600), [], "1"),
    }
    for number, (data, before, name) in enumerate(ways.values()):
        (root / f"b{i}-1-{number}.tar").write_bytes(data)
        part.items += [*before, (f"tars/b{i}-1-{number}.tar:{name}", "unreadable_file")]
    (root / f"b{i}-2.tar").symlink_to(root.parent.parent / "outside/secret.png")
    part.items.append((f"tars/b{i}-2.tar:1", "path_escapes"))
    part.ways |= {*ways, "a link in place of a tar"}


# ---- packed rows -------------------------------------------------------------------------------------------------


def packed(root: Path, count: int) -> dict[str, Part]:
    """Packed rows that contain images. Either a line in the middle would fill the memory, or the second half is
    missing."""
    lines, told = [], []
    for i in range(4 * count):
        data, greys = odd(i)
        url = "data:image/x;base64," + base64.b64encode(data).decode()
        parts = [{"type": "text", "text": odd_text(i)}, {"type": "image", "image": url}]
        lines.append(json.dumps(dict(segments=parts)).encode() + b"\n")
        told.append(said(odd_text(i), greys))
    half = len(lines) // 2
    first, second = b"".join(lines[:half]), b"".join(lines[half:])
    bomb = first + b"[" * (160 << 20) + b"\n" + second
    packed = {}
    for ending, pack in {"gz": lambda data: gzip.compress(data, 1), "zst": lambda data: _zstandard(data)}.items():
        for name, data, kind, rest in (
            (f"bomb.jsonl.{ending}", pack(bomb), "too_large", told[half:]),
            (f"cut.jsonl.{ending}", pack(first) + pack(second)[:9], "unreadable_file", []),
        ):
            (root / name).write_bytes(data)
            items = [*told[:half], (f"{name}:{half + 1}", kind), *rest]
            packed[name] = Part(dict(kind="jsonl", path=str(root / name)), items, {name})
    return packed


def _zstandard(data: bytes) -> bytes:
    """Compresses as a stream, because otherwise the header would give the length."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()
