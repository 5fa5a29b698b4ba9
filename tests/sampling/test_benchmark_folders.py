"""Exports of a job, read like the benchmarks' evaluators read them."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from ar_unified.data.images import to_png
from ar_unified.sampling.benchmark_folders import ExportError, export
from ar_unified.workdir import write_bytes

GENEVAL = {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}


def shade(line, sample):
    return 40 * line + sample


@pytest.fixture
def job(tmp_path):
    """Lines of two processes: three requests with four samples, of which one is missing; an error; a text."""
    folder = tmp_path / "job"
    rows = []
    for line in range(1, 4):
        prompt = f"a photo of {line} benches"
        for sample in range(4 if line < 3 else 3):
            image = f"images/r{line}/{sample:02d}_00.png"
            write_bytes(folder / image, to_png(np.full((8, 8, 3), shade(line, sample), np.uint8)))
            rows.append({"id": f"r{line}", "sample": sample, "n": 4, "line": line, "seed": 1,
                         "meta": GENEVAL | {"prompt": prompt, "category": "art"},
                         "prompt": [{"type": "text", "text": prompt}],
                         "segments": [{"type": "image", "image": image, "height": 8, "width": 8}]})  # fmt: skip
    said = [{"type": "text", "text": "no"}]
    rows.append({"id": "r4", "sample": 0, "n": 1, "line": 4, "seed": 1, "prompt": said, "segments": said})
    rows.append({"id": "r5", "sample": None, "n": 1, "line": 5, "prompt": [], "error": "unknown key 'x'"})
    for process in range(2):
        lines = [json.dumps(row) + "\n" for row in rows[process::2]]
        (folder / f"samples-{process:05d}-of-00002.jsonl").write_text("".join(lines) + '{"id": "torn')
    return folder


def value(path):
    return int(np.asarray(Image.open(path))[0, 0, 0])


def test_geneval_reads_what_is_written(job, tmp_path):
    for _ in range(2):  # a repeated line counts once
        report = export(job, "geneval", tmp_path / "out")
        assert report.images == 11 and set(report.left_out) == {"r4", "r5"}
        # Its evaluator needs folders with numbers as names, one JSON value in metadata.jsonl, and numbered PNGs in
        # samples/.
        found = {}
        for name in os.listdir(tmp_path / "out"):
            assert name.isdigit() and len(name) == 5
            metadata = json.load(open(tmp_path / "out" / name / "metadata.jsonl"))
            for image in os.listdir(tmp_path / "out" / name / "samples"):
                assert re.match(r"\d+\.png", image)
                assert metadata["tag"] == "single_object" and metadata["include"][0]["count"] == 1
                line = int(name) + 1
                assert metadata["prompt"] == f"a photo of {line} benches"
                found[line, int(image[:4])] = value(tmp_path / "out" / name / "samples" / image)
        assert found == {(n, i): shade(n, i) for n in (1, 2, 3) for i in range(4) if (n, i) != (3, 3)}


def test_dpg_crops_the_tiles_it_means(job, tmp_path):
    report = export(job, "dpg", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["r1.png", "r2.png"]
    assert "3 of 4" in report.left_out["r3"]
    for name in os.listdir(tmp_path / "out"):
        key, side = name.split(".")[0], 8
        grid = Image.open(tmp_path / "out" / name)
        boxes = [(0, 0), (side, 0), (0, side), (side, side)]
        tiles = [np.asarray(grid.crop((x, y, x + side, y + side))) for x, y in boxes]
        assert [int(tile.min()) for tile in tiles] == [int(tile.max()) for tile in tiles]
        assert [int(tile.max()) for tile in tiles] == [shade(int(key[1:]), i) for i in range(4)]


def test_t2i_compbench_finds_prompt_and_order_in_the_names(job, tmp_path):
    export(job, "t2i_compbench", tmp_path / "out")
    names = os.listdir(tmp_path / "out/samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == [
        f"a photo of {n} benches" for n in (1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    ]
    assert [value(tmp_path / "out/samples" / name) for name in names[3:5]] == [shade(1, 3), shade(2, 0)]


def test_mjhq_and_folder(job, tmp_path):
    export(job, "mjhq", tmp_path / "mjhq")
    assert sorted(os.listdir(tmp_path / "mjhq/art")) == ["r1.png", "r2.png", "r3.png"]
    export(job, "folder", tmp_path / "folder")
    rows = [json.loads(line) for line in open(tmp_path / "folder/metadata.jsonl")]
    assert [row["file_name"] for row in rows][:5] == [*(f"r1_{i:02d}_00.png" for i in range(4)), "r2_00_00.png"]
    assert rows[4]["text"] == "a photo of 2 benches" and value(tmp_path / "folder" / rows[4]["file_name"]) == 80
    assert len(rows) + 1 == len(os.listdir(tmp_path / "folder"))


def test_files_are_named_by_the_name_that_an_id_has(tmp_path):
    """If an id has a slash, files are named like the request's folder of images, and metadata.jsonl keeps the id."""
    image = {"type": "image", "image": "images/a-b-12/00_00.png", "height": 8, "width": 8}
    row = {"id": "a/b", "name": "a-b-12", "sample": 0, "n": 1, "line": 1, "seed": 0, "meta": {"category": "art"}}
    row |= {"prompt": [{"type": "text", "text": "a"}], "segments": [image]}
    (tmp_path / "job/images/a-b-12").mkdir(parents=True)
    (tmp_path / "job" / image["image"]).write_bytes(to_png(np.zeros((8, 8, 3), np.uint8)))
    (tmp_path / "job/samples.jsonl").write_text(json.dumps(row) + "\n")
    for layout in ("dpg", "mjhq", "folder"):
        assert export(tmp_path / "job", layout, tmp_path / layout).images == 1
    assert (tmp_path / "dpg/a-b-12.png").exists() and (tmp_path / "mjhq/art/a-b-12.png").exists()
    (facts,) = [json.loads(line) for line in open(tmp_path / "folder/metadata.jsonl")]
    assert (facts["file_name"], facts["id"]) == ("a-b-12_00_00.png", "a/b")


def test_requests_that_say_too_little_are_named(job, tmp_path):
    for path in job.glob("samples*.jsonl"):
        path.write_text(path.read_text().replace('"include"', '"exclude"'))
    with pytest.raises(ExportError, match="request r1: geneval needs include"):
        export(job, "geneval", tmp_path / "out")
    with pytest.raises(ExportError, match="expected one of geneval, dpg"):
        export(job, "wise", tmp_path / "out")
