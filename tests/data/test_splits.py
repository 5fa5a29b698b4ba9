"""Held-out parts by count are never empty if there are two groups or more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ar_unified.data.sources import EmptySplit, Source, open_source, splits
from ar_unified.data.sources.splits import Split
from ar_unified.errors import UserError


def captions(root: Path, count: int, name: str = "captions", first: int = 0) -> None:
    rows = [{"image": f"{i}.png", "text": f"{name} {i} {k}"} for i in range(first, count) for k in range(2)]
    (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(root: Path, count: int, name: str = "lines") -> None:
    (root / f"{name}.txt").write_text("".join(f"line {i}\n" for i in range(count)))


def texts(spec: dict[str, Any], split: str | None) -> list[str]:
    source = open_source(spec | {"split": split})
    return [text for i in range(len(source)) for text in source.texts(i)]


@pytest.mark.parametrize("kind", ["folder", "jsonl", "lines", "rows", "files"])
@pytest.mark.parametrize("count", [2, 3, 10, 24, 50, 90])
def test_a_twentieth_is_held_out_by_count_and_never_nothing(tmp_path: Path, kind: str, count: int) -> None:
    spec: dict[str, Any] = dict(kind="text", path=tmp_path, by="line")
    if kind == "lines":
        lines(tmp_path, count)
    elif kind == "files":
        spec["by"] = "file"
        for i in range(count):
            lines(tmp_path, 2, str(i))
            (tmp_path / f"{i}.txt").write_text(f"file {i}")
    elif kind == "rows":
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(count)))
    else:
        captions(tmp_path, count)
        path = tmp_path / "captions.jsonl" if kind == "jsonl" else tmp_path
        spec = dict(kind=kind, path=path)
    train, held_out, whole = (texts(spec, split) for split in ("[:95%]", "[95%:]", None))
    assert sorted(train + held_out) == sorted(whole) and not set(train) & set(held_out)
    each = 2 if kind in ("folder", "jsonl") else 1  # the number of rows in a group
    assert len(held_out) == each * max(1, count - int(0.95 * count + 0.5))
    assert held_out == texts(spec, "[95%:]") and held_out == texts(spec, "train[95%:]")


def test_one_group_stays_whole_on_the_larger_side(tmp_path: Path) -> None:
    captions(tmp_path, 1)
    spec = dict(kind="folder", path=tmp_path)
    assert len(texts(spec, "[:95%]")) == len(texts(spec, "[5%:]")) == 2
    for split in ("[95%:]", "[:5%]", "train[95%:]"):
        with pytest.raises(EmptySplit, match="all rows share one image or text"):
            texts(spec, split)
    lines(tmp_path, 1)
    with pytest.raises(EmptySplit, match="all texts share one"):
        texts(dict(kind="text", path=tmp_path, files=("*.txt",), by="line"), "[95%:]")
    with pytest.raises(UserError, match="no row is in split 'dev\\[95%:\\]'; the rows' splits are: train") as caught:
        texts(spec, "dev[95%:]")
    assert not isinstance(caught.value, EmptySplit)


def test_sources_of_one_folder_have_one_border(tmp_path: Path) -> None:
    """With different borders, an image could be in the training part of one source and held out of the other."""
    captions(tmp_path, 200)
    captions(tmp_path, 200, "vqa", first=120)

    def images(file: str, split: str) -> set[str]:
        found = texts(dict(kind="folder", path=tmp_path, files=(file,)), split)
        return {text.split()[1] for text in found}

    assert not images("captions", "[:80%]") & images("vqa", "[80%:]")
    assert not images("vqa", "[:80%]") & images("captions", "[80%:]")
    assert images("vqa", "[:80%]") | images("vqa", "[80%:]") == {str(i) for i in range(120, 200)}
    captions(tmp_path, 122, "vqa", first=120)
    both = images("vqa", "[:99%]"), images("vqa", "[99%:]")
    assert [len(side) for side in both] == [1, 1], "its own groups decide where the common border leaves it nothing"


def test_the_fingerprint_follows_the_border(tmp_path: Path) -> None:
    def source(split: str | None) -> Source:
        return open_source(dict(kind="folder", path=tmp_path, files=("captions",), split=split))

    captions(tmp_path, 40)
    parts, whole = [dict(source(split).fingerprint) for split in ("[:90%]", "[90%:]")], source(None).fingerprint
    captions(tmp_path, 400, "vqa")  # more images move the border
    assert all(a != dict(source(b).fingerprint) for a, b in zip(parts, ("[:90%]", "[90%:]"), strict=True))
    assert source(None).fingerprint == whole and source("train").fingerprint.keys() == whole.keys()


def test_of_very_many_groups_only_so_many_hashes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "_MANY", 1000)
    split = Split("[:90%]")
    rows = [{"id": str(i)} for i in range(20_000)]
    assert all(split.has(row, b"") for row in rows)
    split.settle()
    assert len(split._own.settled()) <= 2000
    assert sum(split.has(row, b"") for row in rows) == pytest.approx(18_000, abs=200)
