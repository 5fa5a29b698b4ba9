"""A job's folder: what is in it, what a kill leaves, and what bad requests cost."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ar_unified.document import CodesPart, TextPart
from ar_unified.sampling import engine as engine_module
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.job import JobMismatch, run_job
from ar_unified.sampling.request import RequestError
from tests.sampling.tiny import CONFIG, GRAMMARS

DEFAULTS = {"text": {"temperature": 0.9}, "image": {"top_k": 12}}


class Tiles:
    """A stand-in image tokenizer: a code is a 4 x 4 tile of one grey."""

    factor = 4

    def encode(self, images):
        return (images[:, ::4, ::4, 0] // 10).clip(0, 23).astype(np.int32)

    def decode(self, codes):
        return np.repeat(np.repeat(codes.astype(np.uint8) * 10, 4, 1), 4, 2)[..., None].repeat(3, -1)


@pytest.fixture(scope="module")
def engine(params):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_SMALLEST", 64)  # fewer programs to compile
        yield Engine(CONFIG, params, GRAMMARS["grid"], batch_size=3, max_length=64)


def write_requests(folder, rows):
    folder.mkdir(exist_ok=True)
    path = folder / "requests.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(folder / "grey.png")
    return path


GOOD = [
    {"id": "cat", "prompt": "abc", "n": 4, "guidance": 3, "seed": 11},
    {"id": "dog", "prompt": "de", "image_size": [8, 12]},
    {"prompt": "ponm"},
    {"id": "ask", "content": [{"type": "image", "image": "grey.png"}, {"type": "text", "text": "h"}],
     "mode": "text", "max_tokens": 6, "n": 2, "meta": {"of": "grey"}},
    {"id": "tale", "content": [{"type": "text", "text": "a"}], "turn": False, "min_images": 2, "max_tokens": 40},
]  # fmt: skip


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def run(engine, requests, output, **changes):
    return run_job(
        engine, Tiles(), requests, output, **(dict(defaults=DEFAULTS, weights="w", show_progress=False) | changes)
    )


def test_everything_asked_for_is_there(engine, tmp_path):
    requests = write_requests(tmp_path / "in", GOOD)
    report = run(engine, requests, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert {(r["id"], r["sample"]) for r in rows} == {
        *(("cat", i) for i in range(4)), ("dog", 0), ("000003", 0), ("ask", 0), ("ask", 1), ("tale", 0)
    }  # fmt: skip
    assert (report.samples, report.errors) == (9, 0)
    for row in rows:
        for segment in row["prompt"] + row["segments"]:
            if segment["type"] == "image":
                with Image.open(tmp_path / "out" / segment["image"]) as picture:
                    assert picture.size == (segment["width"], segment["height"]) == (12, 8)
    by_id = {row["id"]: row for row in rows}
    assert by_id["ask"]["meta"] == {"of": "grey"} and by_id["ask"]["prompt"][0]["type"] == "image"
    # the pictures are those of the tokens
    tokens = np.array([*GRAMMARS["grid"].prompt_tokens([TextPart("de")], turn=True), *by_id["dog"]["tokens"]])
    (codes,) = [p.codes for p in GRAMMARS["grid"].parse(tokens).parts if isinstance(p, CodesPart)]
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "out/images/dog/00_00.png")), Tiles().decode(codes[None])[0]
    )
    page = (tmp_path / "out/index.html").read_text()
    assert all(segment["image"] in page for row in rows for segment in row["segments"] if "image" in segment)
    assert "http" not in page


def test_killed_anywhere_the_job_ends_with_the_same_bytes(engine, tmp_path, monkeypatch):
    """DESIGN §3.8: a cut at any byte of samples.jsonl, and pictures half done."""
    monkeypatch.setattr("ar_unified.sampling.job._WINDOW", 1)
    requests = write_requests(tmp_path / "in", [*GOOD, b'{"prompt": ', {"id": "no", "prompt": "abc", "guidance": "x"}])
    run(engine, requests, tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    data = whole["samples.jsonl"]
    for cut in np.linspace(0, len(data), 8).astype(int):
        output = tmp_path / f"cut{cut}"
        for name, content in whole.items():
            if name != "index.html":
                (output / name).parent.mkdir(parents=True, exist_ok=True)
                (output / name).write_bytes(content)
        (output / "samples.jsonl").write_bytes(data[:cut])
        (output / "images/cat/.02_00.png.1.unfinished~").write_bytes(b"half")
        if cut < len(data) // 2:
            (output / "images/tale/00_00.png").unlink()
        run(engine, requests, output)
        assert tree(output) == whole


def test_a_finished_job_does_nothing(engine, tmp_path):
    requests = write_requests(tmp_path / "in", GOOD[1:3])
    run(engine, requests, tmp_path / "out")
    before = tree(tmp_path / "out")
    report = run(engine, requests, tmp_path / "out")
    assert (report.samples, report.errors, report.found) == (0, 0, 2) and tree(tmp_path / "out") == before


def test_another_job_is_refused(engine, tmp_path):
    requests = write_requests(tmp_path / "in", GOOD[1:2])
    run(engine, requests, tmp_path / "out")
    with pytest.raises(JobMismatch, match="weights = 'w', this one has 'v'"):
        run(engine, requests, tmp_path / "out", weights="v")
    with pytest.raises(JobMismatch, match="defaults.image.top_k"):
        run(engine, requests, tmp_path / "out", defaults={**DEFAULTS, "image": {"top_k": 3}})
    write_requests(tmp_path / "in", GOOD[1:3])
    with pytest.raises(JobMismatch, match="requests"):
        run(engine, requests, tmp_path / "out")
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(JobMismatch, match="manifest.json"):
        run(engine, requests, tmp_path / "out")


def test_bad_requests_are_one_line_each_and_the_rest_is_served(engine, tmp_path):
    bad = [
        (b'{"prompt": "a', "JSON object"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"[1]", "list"),
        ({"prompt": "a", "temprature": 1}, "unknown key 'temprature'; known: id, prompt"),
        ({"prompt": "a", "image": {"temp": 1}}, "unknown key 'temp'; known: temperature"),
        ({"prompt": ""}, "expected a text"),
        ({}, "either"),
        ({"prompt": "a", "n": 0}, "n: expected"),
        ({"prompt": "a", "n": True}, "n: expected int"),
        (b'{"prompt": "a", "image": {"temperature": NaN}}', "image.temperature"),
        ({"prompt": "a", "image_size": [8, 13]}, "multiples of 4"),
        ({"prompt": "a", "image_size": [16, 16]}, "exactly 2 x 3"),
        ({"id": "../x", "prompt": "a"}, "id: expected letters"),
        ({"id": "good", "prompt": "b"}, "line 1 already"),
        ({"prompt": "a" * 80}, "max_length is 64"),
        ({"content": [{"type": "image", "image": "../requests.jsonl"}]}, "inside the folder"),
        ({"content": [{"type": "image", "image": "none.png"}]}, "cannot be read"),
        ({"content": [{"type": "image", "image": "requests.jsonl"}]}, "requests.jsonl"),
        ({"content": [{"type": "sound"}]}, "content 0"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
    ]
    rows = [{"id": "good", "prompt": "abc"}, *[row for row, _ in bad], {"id": "last", "prompt": "cba"}]
    requests = write_requests(tmp_path / "in", rows)
    report = run(engine, requests, tmp_path / "out")
    assert (report.samples, report.errors) == (2, len(bad))
    found = {row["line"]: row for row in map(json.loads, (tmp_path / "out/samples.jsonl").read_text().splitlines())}
    assert set(found) == set(range(1, len(rows) + 1))
    for number, (_, words) in enumerate(bad, 2):
        assert words in found[number]["error"], (number, found[number]["error"])
    assert "segments" in found[1] and "segments" in found[len(rows)]
    again = run(engine, requests, tmp_path / "out")
    assert (again.samples, again.errors) == (0, 0)


def test_wrong_defaults_stop_the_job(engine, tmp_path):
    requests = write_requests(tmp_path / "in", GOOD)
    with pytest.raises(RequestError, match="defaults: unknown key 'colour'"):
        run(engine, requests, tmp_path / "out", defaults={"colour": 1})
