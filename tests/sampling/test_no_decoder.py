"""If a model's image tokenizer has no decoder, the model reads images and answers in words, and a request for an image
gets a clear error."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import ar_unified
from ar_unified.cli import train
from ar_unified.errors import UserError
from ar_unified.evaluation.generation import evaluate
from ar_unified.evaluation.right_answers import PROTOCOLS
from ar_unified.experiment import tokenizer_evaluation
from ar_unified.sampling.job import run_job
from ar_unified.sampling.request import RequestError
from tests.bundles import grey, write_without_decoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    return ar_unified.load(write_without_decoder(folder).folder, batch_size=2)


@pytest.fixture(scope="module")
def why(model):
    assert "vqgan.ckpt" in model.image_tokenizer.no_decoder
    return re.escape(model.image_tokenizer.no_decoder)


def test_it_reads_and_answers(model):
    assert isinstance(model.ask(grey(), "A star?", max_tokens=4), str)
    answer = model.chat([{"role": "user", "content": [{"type": "image", "image": grey()}]}], max_tokens=4)
    assert isinstance(answer["content"], str), "a chat keeps to words"
    assert np.asarray(model.tokenize_image(grey())).shape == (2, 2)


def test_what_it_cannot_draw_is_said_before_anything_is_sampled(model, why, monkeypatch):
    with pytest.raises(UserError, match=why):
        model.detokenize_image(np.zeros((2, 2), np.int32))
    monkeypatch.setattr(model.engine, "generate", None)
    with pytest.raises(RequestError, match=why):
        model.draw("A star.")


def test_a_job_answers_in_words_and_refuses_the_lines_that_ask_for_images(model, why, tmp_path):
    Image.fromarray(grey()).save(tmp_path / "grey.png")
    rows = [
        {"id": "cat", "prompt": "A star."},
        {"id": "free", "prompt": "A star.", "mode": "free"},
        {"id": "ask", "content": [{"type": "image", "image": "grey.png"}], "mode": "text", "max_tokens": 3},
    ]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    report = run_job(model.engine, model.image_tokenizer, requests, out, resize=model.resize, show_progress=False)
    assert (report.samples, report.errors, report.complete) == (1, 2, True)
    assert re.search(f"""mode: expected "text", found 'image': {why}""", report.first_error)
    assert (out / "index.html").exists()


def test_no_images_of_it_are_evaluated_and_a_training_shows_none(model, why):
    metrics, _ = evaluate(model.engine, model.image_tokenizer, model.grammar, PROTOCOLS["exact"], [])
    assert re.search(why, metrics["note"])
    experiment = SimpleNamespace(image_tokenizer=model.image_tokenizer)
    with pytest.raises(UserError, match=why):
        tokenizer_evaluation._tokenizer(experiment)
    assert train._preview(experiment) is None
