"""A job's folder: its content, its state after a kill, and the cost of bad requests."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ar_unified.language.document import CodesPart, TextPart, Turn
from ar_unified.sampling import gallery, plan
from ar_unified.sampling import prompts as prompts_module
from ar_unified.sampling.bandwidth import MemoryTime
from ar_unified.sampling.engine import Engine
from ar_unified.sampling.job import JobMismatch, run_job
from ar_unified.sampling.request import RequestError
from ar_unified.sampling.results import JobBusy, read
from tests.moments import random_moments
from tests.sampling.tiny import CONFIG, GRAMMARS

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {"text": {"temperature": 0.9}, "image": {"top_k": 12}, "context": "empty_prompt"}


class Tiles:
    """A stand-in for an image tokenizer: a code is a 4 x 4 tile of one grey."""

    factor, codes_per_position = 4, 1

    def encode(self, images):
        return (images[:, ::4, ::4, 0] // 10).clip(0, 23).astype(np.int32)

    def decode(self, codes):
        return np.repeat(np.repeat(codes.astype(np.uint8) * 10, 4, 1), 4, 2)[..., None].repeat(3, -1)


def few_programs(setattr):
    """One length of prompts and of caches, so that there is less to compile."""
    setattr(prompts_module, "_SMALLEST", 64)
    setattr(plan, "_length_class", lambda n, max_length: max_length)


@pytest.fixture(scope="module")
def engine(params):
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch.setattr)
        yield Engine(CONFIG, params, GRAMMARS["grid"], batch_size=3, max_length=64)


def write_requests(folder, rows):
    folder.mkdir(exist_ok=True)
    path = folder / "requests.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(folder / "grey.png")
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
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
    """Every file's bytes; the lines of all processes together, in the order of the requests."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    lines = [files.pop(name) for name in list(files) if name.startswith("samples")]
    rows = [json.loads(line) for data in lines for line in data.splitlines()]
    return files | {"samples": sorted(rows, key=lambda row: (row["line"], row["sample"] or 0))}


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
                with Image.open(tmp_path / "out" / segment["image"]) as image:
                    assert image.size == (segment["width"], segment["height"]) == (12, 8)
    by_id = {row["id"]: row for row in rows}
    assert by_id["ask"]["meta"] == {"of": "grey"} and by_id["ask"]["prompt"][0]["type"] == "image"
    # the images belong to the tokens
    tokens = np.array([*GRAMMARS["grid"].prompt([Turn("user", (TextPart("de"),))]), *by_id["dog"]["tokens"]])
    (codes,) = [p.codes for p in GRAMMARS["grid"].parse(tokens).parts if isinstance(p, CodesPart)]
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "out/images/dog/00_00.png")), Tiles().decode(codes[None])[0]
    )
    page = (tmp_path / "out/index.html").read_text()
    assert all(segment["image"] in page for row in rows for segment in row["segments"] if "image" in segment)
    assert "http" not in page


class Large(Tiles):
    """Tiles of 128 x 128 pixels: images of 256 x 384."""

    factor = 128

    def encode(self, images):
        return (images[:, ::128, ::128, 0] // 10).clip(0, 23).astype(np.int32)

    def decode(self, codes):
        return super().decode(codes).repeat(32, 1).repeat(32, 2)


def test_the_gallery_loads_thumbnails_of_large_images(engine, tmp_path):
    requests = write_requests(tmp_path / "in", [{"id": "dog", "prompt": "de"}, GOOD[3]])

    def run_large(output):
        run_job(engine, Large(), requests, output, defaults=DEFAULTS, weights="w", show_progress=False)
        return tree(output)

    def shown(output):
        """(image, thumbnail) of each image on the page."""
        page = (output / "index.html").read_text()
        data = json.loads(page.split('id="data">')[1].split("</script>")[0])
        parts = [part for card in data for s in card["samples"] for part in (*card["prompt"], *s["parts"])]
        return {(part["image"], part.get("thumbnail")) for part in parts if "image" in part}

    output = tmp_path / "out"
    whole = run_large(output)
    names = ["images/dog/00_00", "images/ask/prompt_00"]
    assert shown(output) == {(f"{name}.png", f"{name}.jpg") for name in names}
    for name in names:
        with Image.open(output / f"{name}.jpg") as small, Image.open(output / f"{name}.png") as large:
            assert (small.size, large.size) == ((256, 171), (384, 256))
            near = np.asarray(small, float) - np.asarray(large.resize(small.size), float)
            assert np.abs(near).mean() < 3

    # As after a kill between a thumbnail and its image, and inside a thumbnail.
    (output / "images/dog/00_00.png").unlink()
    (output / "images/ask/prompt_00.png").unlink()
    (output / "images/ask/prompt_00.jpg").rename(output / "images/ask/.prompt_00.jpg.host.1.unfinished~")
    (output / "samples.jsonl").write_bytes(b"")
    assert run_large(output) == whole

    (output / "images/dog/00_00.jpg").unlink()  # as in old jobs without thumbnails
    gallery.write(output)
    assert ("images/dog/00_00.png", None) in shown(output)
    run(engine, requests, tmp_path / "small")
    assert not list((tmp_path / "small").rglob("*.jpg"))


@pytest.mark.exact
def test_killed_anywhere_and_split_over_processes_the_job_ends_the_same(engine, tmp_path, monkeypatch):
    """DESIGN §3.8: samples.jsonl cut at any byte, incomplete images, and another number of processes."""
    monkeypatch.setattr("ar_unified.sampling.job._WINDOW", 1)
    requests = write_requests(tmp_path / "in", [*GOOD, b'{"prompt": ', {"id": "no", "prompt": "abc", "guidance": "x"}])
    run(engine, requests, tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    data = (tmp_path / "whole/samples.jsonl").read_bytes()
    last = [
        part["image"]
        for row in map(json.loads, data.splitlines())
        for part in row.get("segments", ())
        if "image" in part
    ][-1]
    for processes, cut in zip([1, 4, 2, 1, 2, 4], np.linspace(0, len(data), 6).astype(int), strict=True):
        output = tmp_path / f"cut{cut}"
        for name, content in whole.items():
            if name not in ("index.html", "samples"):
                (output / name).parent.mkdir(parents=True, exist_ok=True)
                (output / name).write_bytes(content)
        (output / "samples.jsonl").write_bytes(data[:cut])
        if cut < len(data):  # killed in the last image
            (output / last).rename((output / last).with_name(".00_00.png.host.1.unfinished~"))
        for k in reversed(range(processes)):
            run(engine, requests, output, process=(k, processes))
            assert (output / "index.html").exists() == (k == 0 or cut == len(data))
        assert tree(output) == whole


def test_a_finished_job_does_nothing(engine, tmp_path):
    requests = write_requests(tmp_path / "in", GOOD[1:3])
    run(engine, requests, tmp_path / "out")
    before = tree(tmp_path / "out")
    report = run(engine, requests, tmp_path / "out")
    assert (report.samples, report.errors, report.found) == (0, 0, 2) and tree(tmp_path / "out") == before


def test_a_job_goes_on_with_another_batch_size_and_no_other_length(engine, tmp_path, params):
    requests = write_requests(tmp_path / "in", GOOD[1:3])
    run(engine, requests, tmp_path / "out")
    smaller, shorter = (
        Engine(CONFIG, params, GRAMMARS["grid"], batch_size=2, max_length=length) for length in (64, 48)
    )
    assert run(smaller, requests, tmp_path / "out").found == 2
    with pytest.raises(JobMismatch, match="engine.max_length = 64, this one has 48"):
        run(shorter, requests, tmp_path / "out")


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
        ({"prompt": "a", "temprature": 1}, "unknown key 'temprature': did you mean"),
        ({"prompt": "a", "image": {"temp": 1}}, "unknown key 'temp'; known: temperature"),
        ({"prompt": ""}, "expected a text"),
        ({}, "either"),
        ({"prompt": "a", "n": 0}, "n: expected"),
        ({"prompt": "a", "n": True}, "n: expected int"),
        ({"prompt": "a", "image_guidance": float("nan")}, "image_guidance: expected a finite number"),
        ({"prompt": "a", "n": 10**9}, "n: expected less than 100000"),
        ({"prompt": "a", "image": {"top_k": 10**12}}, "image.top_k: expected less than"),
        ({"prompt": "a", "guidance": 10**400}, "guidance: expected less than"),
        ({"prompt": "a", "guidance": 3, "context": "none"}, "context: expected one of"),
        ({"prompt": "a", "guidance": 3, "context": "negative_prompt"}, "negative_prompt: expected a text"),
        (b'{"prompt": "a", "image": {"temperature": NaN}}', "image.temperature"),
        ({"prompt": "a", "image_size": [8, 13]}, "multiples of 4"),
        ({"prompt": "a", "image_size": [16, 16]}, "exactly 2 x 3"),
        ({"id": ["x"], "prompt": "a"}, "id: expected a text"),
        ({"id": "good", "prompt": "b"}, "line 1 already"),
        ({"prompt": "a" * 80}, "max_length is 64"),
        ({"content": [{"type": "image", "image": "../requests.jsonl"}]}, "expected a path inside"),
        ({"content": [{"type": "image", "image": "none.png"}]}, "no such file"),
        ({"content": [{"type": "image", "image": "requests.jsonl"}]}, "requests.jsonl"),
        ({"content": [{"type": "image", "image": "bomb.png"}]}, "9000 x 9000 pixels"),
        ({"content": [{"type": "image", "image": "https://a.b/c.png"}]}, "nothing is fetched"),
        ({"content": [{"type": "image", "image": "file:///etc/passwd"}]}, "expected a path inside"),
        ({"content": [{"type": "image", "image": "data:image/png;base64,AAAA"}]}, "begin with b'"),
        ({"content": []}, "at least one part"),
        ({"prompt": "a", "canvas": {"image": "grey.png", "top": 3}}, "canvas.top: expected a multiple of 4"),
        ({"content": [{"type": "sound"}]}, "content 0"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
    ]
    rows = [{"id": "good", "prompt": "abc"}, *[row for row, _ in bad], {"id": "last", "prompt": "cba"}]
    requests = write_requests(tmp_path / "in", rows)
    report = run(engine, requests, tmp_path / "out")
    assert (report.samples, report.errors) == (2, len(bad)) and "the first is in line 2: " in str(report)
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


def test_a_scale_needs_the_context_it_compares_with(engine, tmp_path):
    requests = write_requests(tmp_path / "in", [{"prompt": "a", "guidance": 3}, {"prompt": "a"}])
    report = run(engine, requests, tmp_path / "out", defaults={})
    assert (report.samples, report.errors) == (1, 1)
    (error,) = [row["error"] for row in read(tmp_path / "out") if "error" in row]
    assert "because guidance needs it; found none" in error


def test_a_image_put_in_order_is_tried_again(engine, tmp_path):
    requests = write_requests(tmp_path / "in", [GOOD[1], GOOD[3]])
    image = (tmp_path / "in/grey.png").read_bytes()
    (tmp_path / "in/grey.png").write_bytes(image[:60])
    for samples in (1, 0):  # the same error appears once
        report = run(engine, requests, tmp_path / "out")
        assert report.samples == samples
        rows = list(read(tmp_path / "out"))
        assert [row["id"] for row in rows if "error" in row] == ["ask"]
    (tmp_path / "in/grey.png").write_bytes(image)
    assert run(engine, requests, tmp_path / "out").samples == 2
    assert sorted((row["id"], row["sample"]) for row in read(tmp_path / "out")) == [("ask", 0), ("ask", 1), ("dog", 0)]


def test_a_full_disk_ends_the_job_and_it_goes_on_from_there(engine, tmp_path):
    requests = write_requests(tmp_path / "in", [{"id": f"r{i}", "prompt": "abc"} for i in range(12)])
    run(engine, requests, tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = (tmp_path / "whole/manifest.json").stat().st_size + 100
    assert most < (tmp_path / "whole/samples.jsonl").stat().st_size
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (most, hard)
    )  # the largest size of a file in bytes: enough for some lines
    try:
        with pytest.raises(OSError, match="File too large"):
            run(engine, requests, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = (tmp_path / "out/samples.jsonl").read_bytes()
    assert len(left) == most and not left.endswith(b"\n")  # the last line is torn
    report = run(engine, requests, tmp_path / "out")
    assert 0 < report.found < 12 and tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_one_file_has_one_writer(engine, tmp_path):
    requests = write_requests(tmp_path / "in", GOOD[1:2])
    run(engine, requests, tmp_path / "out")
    with open(tmp_path / "out/samples.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for process in [(0, 1), (1, 2)]:
            with pytest.raises(JobBusy, match=r"samples\.jsonl is being written"):
                run(engine, requests, tmp_path / "out", process=process)


def test_a_canvas_is_kept_where_its_mask_is_black(engine, tmp_path):
    hole = np.zeros((20, 30, 3), np.uint8)
    hole[:, 20:] = 255
    rows = [
        {"id": "mask", "prompt": "a", "canvas": {"image": "grey.png", "mask": "hole.png"}},
        {"id": "top", "prompt": "a", "canvas": {"image": "grey.png", "top": 4}},
    ]
    requests = write_requests(tmp_path / "in", rows)
    Image.fromarray(hole).save(tmp_path / "in/hole.png")
    prepared = {}

    class Asked(Engine):
        """Records the requests instead of serving them."""

        def __init__(self):
            self.__dict__.update(engine.__dict__)

        def draw(self, samples):
            prepared.update((plan.request.id, plan.request) for plan, _ in samples)
            return iter(())

    run(Asked(), requests, tmp_path / "out")
    np.testing.assert_array_equal(prepared["mask"].canvas, [[9, 9, -1], [9, 9, -1]])
    np.testing.assert_array_equal(prepared["top"].canvas, [[9, 9, 9], [-1, -1, -1]])


@pytest.mark.exact
@pytest.mark.slow
def test_killed_again_and_again_nothing_is_lost(tmp_path, kills=2, count=40):
    """SIGKILL at moments all over the job, in half of the cases with a second process."""
    rows = [
        {"id": f"r{i}", "prompt": "abcdefgh"[: 1 + i % 8], "guidance": 1 + i % 3, "n": 1 + (i % 5 == 0)}
        if i % 7 else {"content": [{"type": "image", "image": "grey.png"}], "mode": "text", "max_tokens": 5}
        for i in range(count)
    ]  # fmt: skip
    rows[count // 2] = {"id": "bad", "prompt": ""}
    requests = write_requests(tmp_path / "in", rows)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tokenizers'}",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(output, *process):
        program = [sys.executable, "-m", "tests.sampling.killed", str(requests), str(output), *process]
        return subprocess.Popen(program, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    assert start(tmp_path / "whole").wait() == 0
    total = len(tree(tmp_path / "whole")["samples"])
    output = tmp_path / "killed"

    def written():
        return sum(path.read_bytes().count(b"\n") for path in output.glob("samples*.jsonl"))

    random = random_moments()
    for kill in range(kills):
        target = written() + max(1, (total - written()) // (kills - kill + 1) - 2)
        processes = [start(output, f"{k}/{2}") for k in range(2)] if kill % 2 else [start(output)]
        while written() < target and any(process.poll() is None for process in processes):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.05))
        alive = [process for process in processes if process.poll() is None]
        for process in processes:
            process.kill()
            process.wait()
        assert alive, processes[0].stderr.read().decode()[-2000:]
    assert written() < total
    for k in range(2):
        process = start(output, f"{k}/2")
        assert process.wait() == 0, process.stderr.read().decode()[-2000:]
    assert tree(output) == tree(tmp_path / "whole")


def test_the_least_time_is_weights_and_cache_over_bandwidth(engine):
    least = MemoryTime(engine, rate=1e9)
    least.add(tokens=10, contexts=2)
    weights = sum(leaf.size for leaf in jax.tree.leaves(engine.params)) * 4 * 10 / 3  # three samples share each read
    cache = 2 * 55 * (2 * 2 * 2 * 8 * 4)  # positions seen, times keys and values of 2 layers, 2 heads, 8 float32
    np.testing.assert_allclose(least.seconds, (weights + cache) / 1e9)


def test_a_request_is_planned_once(engine, tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(engine, "plan", lambda request: planned.append(request.id) or Engine.plan(engine, request))
    rows = [{"id": f"r{i}", "prompt": "de", "image_size": [8, 12], "n": 2} for i in range(5)]
    path = write_requests(tmp_path / "in", rows)
    report = run_job(engine, Tiles(), path, tmp_path / "out", show_progress=False)
    assert report.samples == 10 and sorted(planned) == [row["id"] for row in rows]
