"""Items that filters leave out. Each kind is counted, the order of reading does not matter, and no filter is on by
default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified.data.filters import Filters, filtered
from ar_unified.data.images import resize, to_png
from ar_unified.data.prepare import prepare
from ar_unified.data.sources import BadItem, Source, open_source, read
from ar_unified.data.sources.augmentation import Augmented
from tests.data.pictures import picture


@pytest.fixture
def root(tmp_path: Path, kit: Any) -> Path:
    """Captions of numbered images. Image 3 is also there scaled, 4 cropped, 5 twice, 6 often; 7 is held out, 8 has much
    text, and 9 a German text."""
    images, rows = {f"{i}.png": picture(i) for i in range(12)}, []
    images |= {"3 small.png": resize(images["3.png"], 48, 48), "4 cut.png": images["4.png"][2:-2, 1:-2]}
    images |= {"wide.png": picture(20, 24, 96), "tiny.png": picture(21, 16, 16)}
    (tmp_path / "images").mkdir()
    for name, pixels in images.items():
        (tmp_path / "images" / name).write_bytes(to_png(pixels))
        rows.append(dict(image=f"images/{name}", text=f"number {name.split(' ')[0].removesuffix('.png')}"))
    rows += [dict(image="images/5.png", text="Number 5!"), dict(image="images/10.png", text="something else")]
    rows += [dict(image="images/6.png", text=f"logo {i}") for i in range(4)]
    rows[8]["text"] *= 20
    rows[9]["language"] = "de"
    kit.write(tmp_path / "captions.jsonl", rows)
    kit.write(tmp_path / "test.jsonl", [dict(image="images/7.png", question="which?", answer="seven")])
    return tmp_path


def opened(root: Path) -> tuple[list[Source], list[Source]]:
    return [open_source(dict(kind="folder", path=root))], [open_source(dict(kind="jsonl", path=root / "test.jsonl"))]


def left_out(sources: list[Source]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for source in sources:
        for i, item in read(source, range(len(source))):
            if isinstance(item, BadItem):
                found.setdefault(item.kind, []).append(i)
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), {}),
        (dict(min_side=20), {"filtered_size": [15]}),
        (dict(max_side=90), {"filtered_size": [14]}),
        (dict(max_aspect=2.0), {"filtered_aspect": [14]}),
        (dict(max_characters=30), {"filtered_length": [8]}),
        (dict(min_characters=7), {"filtered_length": [18, 19, 20, 21]}),
        (dict(languages=("en",)), {"filtered_language": [9]}),
        (dict(duplicates="documents"), {"filtered_duplicate": [12, 13, 16]}),
        (dict(duplicates="images"), {"filtered_duplicate": [12, 13, 16, 17, 18, 19, 20, 21]}),
        (dict(max_repeats=3), {"filtered_repeated": [6, 18, 19, 20, 21]}),
        (dict(held_out=True), {"filtered_held_out": [7]}),
    ],
    ids=str,
)
def test_each_filter_leaves_out_what_it_says(root: Path, settings: Any, expected: Any) -> None:
    sources, held_out = opened(root)
    assert left_out(filtered(sources, held_out, Filters(**settings), root / "f.json", show_progress=False)) == expected
    compares = {"duplicates", "max_repeats", "held_out"} & settings.keys()
    assert (root / "f.json").exists() == bool(compares), "only what compares items takes a pass over them"


def test_the_report_counts_each_kind_with_an_example(root: Path, kit: Any, grammar: Any, tmp_path: Path) -> None:
    sources, held_out = opened(root)
    chosen = Filters(min_side=20, duplicates="documents", held_out=True)
    sources = filtered(sources, held_out, chosen, root / "f.json", show_progress=False)
    report = prepare(sources, grammar, kit.Tokenizer(), tmp_path / "out", max_tokens=512, show_progress=False)
    found = report.sources[sources[0].name]
    assert found.skipped == {"filtered_duplicate": 3, "filtered_held_out": 1, "filtered_size": 1}
    assert found.documents == len(sources[0]) - 5
    said = str(report)
    assert "captions.jsonl:13: filtered_duplicate: " in said and f"found a copy of {root}/captions.jsonl:4" in said
    assert found.first["filtered_held_out"].endswith(f"found content of {root}/test.jsonl:1")


def test_verdicts_are_read_again_and_do_not_depend_on_who_reads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, held_out = opened(root)
    chosen = Filters(duplicates="images", held_out=True)
    whole = left_out(filtered(sources, held_out, chosen, root / "f.json", workers=1, show_progress=False))
    other = filtered(*opened(root), chosen, root / "g.json", workers=4, show_progress=False)
    assert (root / "f.json").read_bytes() == (root / "g.json").read_bytes()
    parts = [i for part in (range(11, len(other[0])), range(11)) for i, item in read(other[0], part)
             if isinstance(item, BadItem)]  # fmt: skip
    assert sorted(parts) == sorted(i for found in whole.values() for i in found)
    monkeypatch.setattr("ar_unified.data.filters.Search", None)
    assert left_out(filtered(*opened(root), chosen, root / "f.json", show_progress=False)) == whole
    with pytest.raises(TypeError):  # other filters need a new search, and `Search` is None here
        filtered(*opened(root), Filters(duplicates="documents"), root / "f.json", show_progress=False)


def test_versions_of_an_item_are_no_duplicates_of_it(root: Path) -> None:
    sources, held_out = opened(root)
    versions = [Augmented(sources[0], count=2, shift=0.02)]
    left = filtered(versions, held_out, Filters(duplicates="documents"), root / "f.json", show_progress=False)
    assert len(left[0]) == 2 * len(sources[0])
    assert left_out(left) == {"filtered_duplicate": [24, 25, 26, 27, 32, 33]}


def test_what_a_filter_leaves_out_decides_the_fingerprint(root: Path) -> None:
    sources, held_out = opened(root)
    prints = [
        dict(filtered(sources, held_out, chosen, root / "f.json", show_progress=False)[0].fingerprint)
        for chosen in (Filters(), Filters(min_side=8), Filters(min_side=9))
    ]
    assert prints[0] == sources[0].fingerprint and prints[1] != prints[2]


def test_settings_that_leave_nothing_are_refused() -> None:
    for settings, said in (
        (dict(min_side=9, max_side=8), "max_side: expected at least min_side"),
        (dict(duplicates="all"), "duplicates: expected one of keep, documents, images"),
        (dict(max_aspect=0.5), "max_aspect"),
        (dict(max_repeats=-1), "max_repeats"),
    ):
        with pytest.raises(ValueError, match=said):
            Filters(**settings)


def test_texts_alone_are_compared_by_their_words(tmp_path: Path, kit: Any) -> None:
    words = [f"word{i}" for i in np.random.default_rng(0).integers(0, 500, 120)]
    changed = [*words[:60], "another", *words[60:]]
    texts = [" ".join(words), "A short text.", " ".join(changed), "a  SHORT text", " ".join(reversed(words)), "a text"]
    kit.write(tmp_path / "t.jsonl", [dict(text=text) for text in texts])
    kit.write(tmp_path / "v.jsonl", [dict(text="A text!")])
    specs = [dict(kind="text", path=tmp_path / name) for name in ("t.jsonl", "v.jsonl")]
    sources = [open_source(spec) for spec in specs]
    chosen = Filters(duplicates="documents", held_out=True)
    left = filtered(sources[:1], sources[1:], chosen, tmp_path / "f.json", show_progress=False)
    assert left_out(left) == {"filtered_duplicate": [2, 3], "filtered_held_out": [5]}
