from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ar_unified.data.images import to_png
from ar_unified.data.sources import BadItem, open_source, packed, read
from tests.data import copies


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_any_place_of_a_packed_file(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    data = b"".join(b"%d %d\n" % (i, rng.getrandbits(64)) for i in range(200_000))
    pack = gzip.compress if ending == ".gz" else zstd
    path = tmp_path / f"a{ending}"
    half = len(data) // 2
    path.write_bytes(pack(data[:half]) + pack(data[half:]))  # one archive after another
    monkeypatch.setattr(packed, "_SNAPSHOTS", 3)
    reader = packed.Reader(path)
    for at in (len(data) - 10, 0, half - 5, 17, len(data) - 100_000, half + 1_000_000):
        assert reader.read(at, 50) == data[at : at + 50]
    with packed.open_binary(path) as stream:
        assert stream.read() == data


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_packed_rows_are_the_rows_and_a_cut_is_one_bad_item(tmp_path: Path, ending: str, kit: Any) -> None:
    png = kit.image(1)
    given = [dict(image=to_png(png), text=f"picture {i}") for i in range(50)]
    plain = open_source(copies.jsonl(tmp_path / "own.jsonl", given))
    data = (tmp_path / "own.jsonl").read_bytes()
    whole = gzip.compress(data) if ending == ".gz" else zstd(data)
    path = tmp_path / f"own.jsonl{ending}"
    path.write_bytes(whole)
    source = open_source(dict(kind="jsonl", path=path))
    assert source.name == "own" and [source[i] for i in (49, 0, 7)] == [plain[i] for i in (49, 0, 7)]
    path.write_bytes(gzip.compress(data[:20_000])[:-4] if ending == ".gz" else zstd(data[:20_000]) + whole[:-40][:20])
    cut = open_source(dict(kind="jsonl", path=path))
    found = [item for _, item in read(cut, range(len(cut)))]
    assert isinstance(found[-1], BadItem) and found[-1].kind == "unreadable_file"
    assert found[:10] == [plain[i] for i in range(10)]


def test_packed_texts(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = b"".join(b'{"text": "%d", "more": "%d"}\n' % (i, rng.getrandbits(256)) for i in range(5_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(rows)[:-30])
    source = open_source(dict(kind="text", path=tmp_path))
    assert source.texts(4_999) == ["4999"] and source.texts(0) == ["0"] and source.texts(5_003) == ["3"]
    with pytest.raises(BadItem, match="b.jsonl.zst: unreadable_file: .* cut short"):
        source[len(source) - 1]
