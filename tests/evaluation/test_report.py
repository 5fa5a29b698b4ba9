"""The report is one self-contained file, shows the numbers, and escapes the text that it shows."""

from __future__ import annotations

import ast
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified.cli import evaluate
from ar_unified.evaluation import conversations, generation
from ar_unified.evaluation.charts import MAX_POINTS, line_chart, number
from ar_unified.evaluation.examples import Example
from ar_unified.evaluation.facts import summary
from ar_unified.evaluation.report import MEANINGS, NAMES, transformer_charts, wilson, write_report
from ar_unified.evaluation.sheets import section
from ar_unified.evaluation.tokenizer import evaluate_tokenizer
from ar_unified.language.document import Document, ImagePart, TextPart
from ar_unified.metrics import read_metrics
from tests.evaluation.test_tokenizer import SIZE, Album, Greys, exact, noisy
from tests.sources import tree
from tests.training import tiny

EVALUATION = {
    "text_to_image_exact": 0.93,
    "story_change_exact": 0.71,
    "image_to_text_exact": 0.95,
    "image_to_text_exact/colour": 0.9,
    "tokenizer_psnr": 31.4,
    "counts": {"text_to_image_exact": 100, "image_to_text_exact": 60, "image_to_text_exact/colour": 20},
    "skipped": {"does_not_fit": 3},
    "validation": {"loss": 0.612},
    "unseen_combinations": {"text_to_image_exact": 0.4321, "counts": {"text_to_image_exact": 50}},
}


class Page(HTMLParser):
    """Checks that every tag is closed; collects the links that would be loaded and the text."""

    VOID = {"meta", "img", "br", "input", "path"}

    def __init__(self, html):
        super().__init__()
        self.open, self.loaded, self.words = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)


def page(tmp_path, **options):
    path = tmp_path / "report.html"
    write_report(path, **({"title": "Test", "evaluation": EVALUATION} | options))
    html = path.read_text()
    return html, Page(html), " ".join(Page(html).words)


def example(kind="text_to_image", text="a red circle", **options):
    image = np.zeros((8, 8, 3), np.uint8)
    document = Document.of((TextPart(text), ImagePart(image)), 1)
    options = {"got": image, "reconstruction": image} | options
    return Example(kind, document, document.parts[:1], image, **options)


def test_numbers_stand_beside_their_thresholds(tmp_path):
    html, _, words = page(tmp_path, thresholds={"text_to_image_exact": 0.9, "story_change_exact": 0.8})
    assert 'class="meter met"' in html and 'class="meter missed"' in html
    for said in (
        "✓ threshold 90 %",
        "✗ threshold 80 %",
        "43.2 %",
        "unseen combinations",
        "31.4",
        "0.612",
        "n=60",
        "3 does not fit",
    ):
        assert said in words, said


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    rows = [{"step": s, "loss": 1 / s, "psnr": 20.0 + s, "mfu": None} for s in range(1, 9)]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo')  # cut off by a kill
    html, found, words = page(
        tmp_path,
        examples={
            "": [example(correct=True), example(got=None, correct=False)],
            "unseen": [example("story")],
        },
        telemetry={"transformer": log, "image_tokenizer": rows, "other": tmp_path / "missing.jsonl"},
        seconds={"train": 61.0, "sample": 5.0},
        config={"name": "test", "training": {"steps": 10, "batch_size": 4, "sequence_length": 8}},
        facts={"parameters": "2.2 M"},
    )
    assert all(re.match(r"#|data:image/", address) for address in found.loaded)
    assert not re.search(r"@import|url\(|fetch\(|https?:", html)
    for said in ("Loss", "PSNR", "1 min 06 s", "10 steps of 4 rows of 8 tokens: 320 in all", "2.2 M"):
        assert said in words, said
    assert "MFU" not in words  # without a series there is no chart


def test_text_of_data_and_models_is_only_text(tmp_path):
    nasty = '<script>alert("x")</script>'
    drawn = example(text=nasty)
    answered = Example("image_to_text", drawn.document, (TextPart(nasty),), nasty, nasty, None, False)
    examples = {"": [drawn, answered]}
    html, _, words = page(tmp_path, title=nasty, examples=examples, config={"name": nasty}, facts={nasty: nasty})
    assert nasty not in html and nasty in words


def test_a_bare_evaluation_makes_a_report(tmp_path):
    assert "Evaluation" in page(tmp_path)[2]
    page(tmp_path, evaluation={})
    assert summary({}) == {}


def test_the_head_says_how_a_image_becomes_codes():
    tokenizer = {"quantizer": "rq", "depth": 3, "codes": 512, "factor": 16, "steps": 100}
    found = summary({"data": {"image_size": [64, 32]}, "image_tokenizer": tokenizer})
    assert found == {"images": "64 x 32 pixels as 4 x 6 codes of 512 (RQ)"}


def test_the_head_says_nothing_of_what_was_not_made_here():
    text, image = {"vocab_size": 512, "model_type": "bpe"}, {"factor": 16, "steps": 100}
    config = {"data": {"image_size": [64, 64]}, "image_tokenizer": image, "text_tokenizer": text}
    assert [*summary(config)] == ["images", "text"] and [*summary(config, ("images",))] == ["images"]
    assert [*summary(config | {"image_tokenizer": image | {"steps": 0}})] == ["text"], "an experiment of text alone"
    assert [*summary(config | {"image_tokenizer": image | {"steps": 0, "model": "brought"}})] == ["images", "text"]
    assert [*summary(config | {"text_tokenizer": text | {"model": "llama.model"}})] == ["images"]
    assert [*summary(config | {"init": "bundle"})] == ["images"]


def test_the_head_says_which_batches_a_training_has():
    train: dict[str, Any] = {"steps": 100, "batch_size": 8, "sequence_length": 64}
    assert summary({"training": train})["training"] == "100 steps of 8 rows of 64 tokens: 51.2k in all"
    longer = {"begin": 0.255, "sequence_length": 128, "batch_size": 2}
    train["phases"] = [{"begin": 0.1, "flip_pairs": 0.5}, longer, {"begin": 0.9, "batch_size": 4}]
    said = (
        "26 steps of 8 rows of 64 tokens, then 64 steps of 2 rows of 128 tokens, then 10 steps of 4 rows of 128 tokens"
    )
    assert summary({"training": train})["training"] == f"{said}: 34.8k in all"


def test_charts_keep_their_ends_and_survive_odd_series():
    assert line_chart("none", {"a": [], "b": [(1, float("nan"))]}) == ""
    assert "checkbox" not in line_chart("with a zero", {"a": [(0, 0.0), (1, 2.0)]})
    assert "<path" in line_chart("a point", {"a": [(5, 3.0)]}, log=True)
    assert "<path" in line_chart("flat", {"a": [(0, 1.0), (9, 1.0)]})
    chart = line_chart("long", {"a": [(s, 1 + 1 / (s + 1)) for s in range(5000)]})
    series = json.loads(re.search(r'data-series="([^"]*)"', chart).group(1).replace("&quot;", '"'))
    points = series[0][1]
    assert len(points) == MAX_POINTS and (points[0][0], points[-1][0]) == (0, 4999)


def test_numbers_are_short():
    values = (0, 0.5, 0.00012, 1e-3, 12.345, 1234, 12345, 2.5e6, 3e9)
    assert [number(v) for v in values] == [
        "0",
        "0.5",
        "1.2e-4",
        "1e-3",
        "12.3",
        "1234",
        "12.3k",
        "2.5M",
        "3e9",
    ]


def test_wilson_interval():
    z2 = 1.96**2  # at the ends the interval has a closed form: n / (n + z^2) and z^2 / (n + z^2)
    assert wilson(1.0, 100) == pytest.approx((100 / (100 + z2), 1.0))
    assert wilson(0.0, 10) == pytest.approx((0.0, z2 / (10 + z2)), abs=1e-9)
    low, high = wilson(0.5, 100)
    assert low + high == pytest.approx(1) and 0.40 < low < 0.41


def test_a_tokenizer_alone_has_a_report(tmp_path):
    source = Album("<b>emoji</b>", noisy(9))
    networks = dict(distances={"LPIPS": lambda a, b: np.full(len(a), 0.25)}, weights={"LPIPS": "abcdef" + "0" * 58})
    numbers, sheet = evaluate_tokenizer(
        Greys(), [source], size=SIZE, probe=lambda ids: {"bits_per_id": 2.125, "budget": {"steps": 77}}, **networks
    )
    other, _ = evaluate_tokenizer(Greys(), [Album("a", exact(2)), Album("b", exact(2, seed=1))], size=SIZE)
    rows = [{"step": s, "loss": 1 / s, "codes/dead": 7 - s} for s in range(1, 5)]
    html, found, words = page(
        tmp_path,
        evaluation={"tokenizer": {"validation": numbers, "unseen_things": other}},
        sheets={"validation": sheet},
        telemetry={"image_tokenizer": rows},
    )
    for said in (
        f"{numbers['psnr']:.2f} dB",
        "MS-SSIM, 3 scales of 5",
        "LPIPS weights abcdef",
        "2.1250",
        "steps: 77",
        "Lanczos",
        "images of <b>emoji</b>, crops of 48 x 64",  # shown as text, not as markup
        "unseen things: a",
        "difference x 4",
        "An image tokenizer",
    ):
        assert said in " ".join(words.split()), said
    assert "<b>emoji" not in html and "Transformer" not in words
    images = [address for address in found.loaded if address.startswith("data:image/png")]
    assert len(images) == 3 * len(numbers["shown"]) == 24


def test_images_on_the_page_are_no_larger_than_needed(tmp_path):
    big = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    numbers = {"crop": [512, 512], "shown": [{"origin": "x", "psnr": 20.0, "worst": False}]}
    html = section({"a": whole(numbers)}, {"a": np.concatenate([big] * 3, 1)})
    assert 'width="256" height="256"' in html


def whole(numbers):
    """Adds the fields that every result has."""
    found, _ = evaluate_tokenizer(Greys(), [Album("a", exact(1))], size=SIZE)
    return found | numbers


def test_charts_of_modalities_read_what_a_training_writes(tmp_path):
    """The rows are of a real training of a tiny model, because a key that no training writes would draw nothing."""
    tiny.run(tmp_path / "run", task=tiny.task(attention_share=True), steps=4, validate_every=2, log_every=1)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    html, _, words = page(tmp_path, telemetry={"transformer": rows})
    for title, _, metrics, _ in transformer_charts(rows):
        assert metrics and set(metrics) <= {key for row in rows for key in row}, title
    for said in ("log Z by role", "Text and images, by layer", "Text and images, over time", "step 4"):
        assert said in words, said
    charts = {title: json.loads(unescape(data)) for data, title in _charts(html)}
    assert {name for name, _ in charts["log Z by role"]} == {"text", "image"}
    assert {name for name, _ in charts["Speed"]} == {"all", "text", "image"}
    layers = dict(charts["Text and images, by layer"])
    at = "validation/attention/text_to_image"
    last = [row for row in rows if f"{at}/uniform" in row][-1]
    assert layers["text at images"] == [[i, float(f"{last[f'{at}/layer_{i}']:.5g}")] for i in range(2)]
    assert [step for step, _ in dict(charts["Text and images, over time"])["images at text"]] == [2, 4]
    assert "memorises" not in words


def test_metrics_with_a_name_are_metrics_of_an_evaluation():
    written = [generation.__file__, conversations.__file__, evaluate.__file__]
    literals = {node.value for file in written for node in ast.walk(tree(Path(file))) if isinstance(node, ast.Constant)}
    assert MEANINGS.keys() <= NAMES.keys() <= literals


def _charts(html):
    return [
        (re.search(r'data-series="([^"]*)"', chart).group(1), unescape(re.search(r"<h4>(.*?) <small>", chart).group(1)))
        for chart in html.split('<figure class="chart">')[1:]
    ]


def test_a_training_that_turned_and_an_evaluation_without_questions_are_told(tmp_path):
    losses = zip((100, 200, 300, 400), (6.5, 6.1, 6.8, 7.05), strict=True)
    rows = [row for s, v in losses for row in ({"step": s, "loss": 100 / s}, {"step": s, "validation/loss": v})]
    said = page(tmp_path, telemetry={"transformer": rows})[2]
    assert "lowest at step 200 (6.1) and has risen since (7.05 at step 400" in said
    for evaluation in ({"counts": {}, "note": "looked for <b>"}, EVALUATION | {"note": "looked for <b>"}):
        assert "held out: looked for <b>." in page(tmp_path, evaluation=evaluation)[2]
