"""Best of n chooses the best sample and makes the right pairs."""

from __future__ import annotations

import json

import numpy as np

from ar_unified.language.document import ImagePart, TextPart
from ar_unified.language.rows import read_parts
from ar_unified.rewards.best import NAMES, keep_best
from ar_unified.rewards.functions import guarded
from ar_unified.sampling.results import write_image


def line(number, sample, segments, prompt=None, **more):
    prompt = prompt or [{"type": "text", "text": f"prompt {number}"}]
    row = {"id": f"r{number}", "sample": sample, "n": 3, "line": number, "prompt": prompt}
    return row | ({"segments": segments} if segments else {}) | more


def text(words):
    return [{"type": "text", "text": words}]


def grey(folder, number, sample, value):
    name = f"images/r{number}/{sample:02d}_00.png"
    write_image(folder / name, np.full((4, 4, 3), value, np.uint8))
    return [{"type": "image", "image": name, "height": 4, "width": 4}]


def bright(prompt, answer):
    """Rewards longer texts and brighter images. For a text "raise" it raises an error."""
    (part,) = answer.parts
    if isinstance(part, ImagePart):
        assert prompt.meta == {"colour": "grey"}
        return float(part.pixels.mean())
    if part.text == "raise":
        raise ValueError("no")
    return float(len(part.text))


def test_the_best_is_chosen_and_pairs_are_of_best_and_worst(tmp_path):
    asked = [{"type": "text", "text": "Be short", "role": "system"}, {"type": "text", "text": "Hi", "role": "user"}]
    meta = dict(meta={"colour": "grey"})
    rows = [
        line(2, 0, text("ab")),  # lines come in any order
        line(1, 2, grey(tmp_path, 1, 2, 90), **meta),
        line(1, 0, grey(tmp_path, 1, 0, 10), **meta),
        line(1, 1, grey(tmp_path, 1, 1, 200), **meta),
        line(2, 1, text("raise")),
        line(2, 2, text("ab")),
        line(3, 0, None, error="it did not parse", prompt=asked),
        line(3, 1, text("abc"), prompt=asked),
        line(3, 2, text("a"), prompt=asked),
        line(4, 0, text("raise")),
        {"id": "r5", "sample": None, "n": 3, "line": 5, "error": "a bad request", "prompt": []},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = keep_best(tmp_path, guarded(bright, 5.0))
    best, pairs, lost = (list(map(json.loads, (tmp_path / name).read_text().splitlines())) for name in NAMES)

    assert [(row["id"], row["sample"], row["reward"]) for row in best] == [("r1", 1, 200), ("r2", 0, 2), ("r3", 1, 3)]
    assert best[0]["rewards"] == {"0": 10, "1": 200, "2": 90} and best[0]["segments"][0]["image"].endswith("01_00.png")
    assert [row["id"] for row in pairs] == ["r1", "r3"]  # both samples of r2 that have a reward have the same one
    assert pairs[0]["prompt"] == "prompt 1"
    assert pairs[1]["messages"] == [{"role": "system", "content": "Be short"}, {"role": "user", "content": "Hi"}]
    assert (pairs[1]["chosen"], pairs[1]["rejected"]) == ("abc", "a")
    images = [read_parts(pairs[0][key], lambda name, where: tmp_path / name, key) for key in ("chosen", "rejected")]
    assert [path.name for (path,) in images] == ["01_00.png", "00_00.png"] and all(path.exists() for (path,) in images)
    assert read_parts(pairs[1]["chosen"], lambda *_: None, "chosen") == [TextPart("abc")]
    reasons = {(row["id"], row["sample"]): row["reason"] for row in lost}
    assert reasons == {
        ("r2", 1): "ValueError: no", ("r3", 0): "it did not parse", ("r4", 0): "ValueError: no",
    }  # fmt: skip
    assert (report.requests, report.pairs, report.unrewarded) == (3, 2, 3)
    assert "3 chosen" in str(report) and "3 samples have no reward, the first: sample 1 of 'r2'" in str(report)
