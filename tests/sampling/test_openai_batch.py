"""OpenAI batch files: what a line requests, what is refused and why, and answers in OpenAI's own format."""

from __future__ import annotations

import base64
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ar_unified.language.document import TextPart
from ar_unified.sampling.requests import PromptImage, read_requests
from tests.sampling.test_formats import png
from tests.sampling.test_job import engine, run, write_requests  # noqa: F401

CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"
URL = "data:image/png;base64," + base64.b64encode(png(5)).decode()


def line(id, body, url=CHAT, **more):
    return {"custom_id": id, "method": "POST", "url": url, "body": {"model": "m", **body}, **more}


def chat(id, content="abc", **settings):
    return line(id, {"messages": [{"role": "user", "content": content}], **settings})


def read(folder, rows):
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = SimpleNamespace(factor=4, codes_per_position=1)
    return read_requests(path, cells=cells, defaults={"context": "empty_prompt"}, warn=lambda line: None)


def said(line):
    """Id, settings and content of a line, images by their grey."""

    def shown(parts):
        return [int(part.load()[0, 0, 0]) if isinstance(part, PromptImage) else part for part in parts]

    history = [(turn.speaker, shown(turn.parts)) for turn in line.history]
    return line.id, line.request, shown(line.content), history


def test_a_conversation_is_its_turns(tmp_path):
    (tmp_path / "a b.png").write_bytes(png(9))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "name": "ann", "content": [
            {"type": "text", "text": "Which?"},
            {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
            {"type": "image_url", "image_url": {"url": (tmp_path / "a b.png").as_uri()}},
        ]},
        {"role": "assistant", "content": "Grey.", "refusal": None, "tool_calls": []},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    body = {"messages": messages, "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": "x", "seed": 3}
    ours = {"id": "q-1", "max_tokens": 7, "text": {"temperature": 0.5, "top_p": 0.9}, "stop": ["x"], "seed": 3}
    which = [{"type": "text", "text": "Which?"}, {"type": "image", "image": URL}, {"type": "image", "image": "a b.png"}]
    ours |= {"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": which},
        {"role": "assistant", "content": "Grey."}, {"role": "user", "content": "Sure?"},
    ]}  # fmt: skip
    theirs, mine = read(tmp_path, [line("q-1", body), ours])[0], read(tmp_path, [ours])[0]
    assert said(theirs) == said(mine)
    assert said(theirs)[2:] == (
        [TextPart("Sure?")],
        [("system", [TextPart("Be brief.")]), ("user", [TextPart("Which?"), 5, 9]), ("assistant", [TextPart("Grey.")])],
    )


def test_what_asks_for_nothing_is_taken_and_settings_are_used(tmp_path):
    neutral = dict(
        frequency_penalty=0, presence_penalty=0.0, logit_bias={}, logprobs=False, top_logprobs=None, stream=False,
        tool_choice="none", response_format={"type": "text"}, user="u", store=True, service_tier="auto", n=2, seed=-1,
        tools=[], metadata={"of": "x"}, modalities=["text"], top_k=5, repetition_penalty=1.2, reasoning_effort=None,
    )  # fmt: skip
    first, second, third = read(tmp_path, [
        chat("a", **neutral), chat("b", modalities=["text", "image"], guidance=2) | {"batch": "my own"},
        line("c", dict(prompt="a cat", n=3, size="12x8", response_format="b64_json", quality="auto"), IMAGES),
    ])  # fmt: skip
    request = first.request
    assert (request.n, request.seed, request.mode, request.text.top_k) == (2, 2**32 - 1, "text", 5)
    assert request.repetition_penalty == 1.2 and request.meta == {"of": "x"}
    assert second.request.mode == "free" and second.request.guidance == 2
    assert second.request.meta == {"batch": "my own"}
    assert (third.request.mode, third.request.n, third.request.image_size) == ("image", 3, (2, 3))
    assert third.content == (TextPart("a cat"),)


@pytest.mark.parametrize(
    "row, words",
    [
        (
            chat("a", frequency_penalty=0.5),
            'body.frequency_penalty: expected 0, found 0.5: leave it out, or set "repetition',
        ),
        (chat("a", presence_penalty=1), "body.presence_penalty: expected 0"),
        (chat("a", tools=[{"type": "function"}]), "body.tools: expected [], found"),
        (chat("a", response_format={"type": "json_object"}), "ask for JSON in the prompt"),
        (chat("a", logprobs=True), "no log-probabilities"),
        (chat("a", modalities=["audio"]), "body.modalities"),
        (chat("a", temprature=1), "body: unknown key 'temprature': did you mean 'temperature'?"),
        (chat("a", size="12x8"), "body: unknown key 'size'"),
        (chat("a", max_tokens=3, max_completion_tokens=4), "expected one number, found 3 and 4"),
        (chat("a", temperature="hot"), "text.temperature: expected int or float"),
        (chat("a") | {"n": 2}, "unknown key 'n': put it into body"),
        (chat("a") | {"metod": "POST"}, "unknown key 'metod': did you mean 'method'?"),
        (chat("a") | {"method": "GET"}, 'method: expected "POST"'),
        (chat("") | {}, "custom_id: expected a text"),
        (line("a", {"messages": []}), "at least one message"),
        (line("a", {"messages": [{"role": "tool", "content": "x"}]}), "messages 0: expected one of the roles"),
        (line("a", {"messages": [{"role": "user"}]}), "messages 0: content: expected a text or a list of parts"),
        (line("a", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}), "tools and sound are not supported"),
        (chat("a", [{"type": "input_audio"}]), 'content 0: expected type "text"'),
        (chat("a", [{"type": "image_url", "image_url": {"url": 3}}]), "expected a reference to an image"),
        (line("a", {"input": "x"}, "/v1/embeddings"), "expected /v1/chat/completions or /v1/images/generations"),
        (line("a", {"prompt": "x", "size": "big"}, IMAGES), "body.size"),
        (line("a", {"prompt": "x", "size": "13x8"}, IMAGES), "multiples of 4"),
        (line("a", {"prompt": "x", "response_format": "url"}, IMAGES), "'b64_json'"),
        (line("a", {"prompt": "x", "background": "transparent"}, IMAGES), "images are opaque"),
        (line("a", {}, IMAGES), "body.prompt: expected a text"),
        ({"custom_id": "a", "body": 3}, "body: expected an object"),
    ],
)
def test_what_cannot_be_done_is_refused_line_by_line(tmp_path, row, words):
    refused, good = read(tmp_path, [row, chat("b")])
    assert words in refused.error and not good.error, refused.error
    assert refused.id == (row["custom_id"] or "000001")


BATCH = [
    chat("text", "abc", n=2, modalities=["text"], max_tokens=6, seed=1),
    chat("both/two", [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": URL}}],
         mode="interleaved", max_tokens=30, seed=2),
    line("draw", {"prompt": "de", "n": 2, "size": "12x8", "response_format": "b64_json"}, IMAGES),
    chat("no", frequency_penalty=1),
    b'{"custom_id": ',
    line("far", {"prompt": "de", "size": "16x16"}, IMAGES),
    {"id": "ours", "prompt": "abc"},
]  # fmt: skip


def pixels(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.rpartition(",")[2]))))


def test_the_answers_are_in_openai_s_format(engine, tmp_path):  # noqa: F811
    requests = write_requests(tmp_path / "in", BATCH)
    out = tmp_path / "out"
    report = run(engine, requests, out)
    assert (report.samples, report.errors) == (6, 3)
    answers = [json.loads(line) for line in (out / "batch_output.jsonl").read_text().splitlines()]
    errors = [json.loads(line) for line in (out / "batch_errors.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    by = {(row["id"], row["sample"]): row for row in samples}
    for row in answers + errors:
        assert set(row) == {"id", "custom_id", "response", "error"} and row["error"] is None
        assert set(row["response"]) == {"status_code", "request_id", "body"}
    assert len({row["id"] for row in answers + errors}) == 6

    text, both, draw = (row["response"]["body"] for row in answers)
    assert [row["custom_id"] for row in answers] == ["text", "both/two", "draw"]
    assert text["object"] == "chat.completion" and (text["model"], text["system_fingerprint"]) == ("m", "w")
    assert [choice["index"] for choice in text["choices"]] == [0, 1]
    for i, choice in enumerate(text["choices"]):
        said = by["text", i]
        assert choice["message"] == {
            "role": "assistant", "content": "".join(part["text"] for part in said["segments"]), "refusal": None
        }  # fmt: skip
        assert choice["finish_reason"] == {"eos": "stop", "length": "length"}[said["finish_reason"]]
    drawn = sum(len(by["text", i]["tokens"]) for i in range(2))
    prompt = by["text", 0]["prompt_tokens"]
    assert prompt == 5  # <bos> a b c <eot>
    assert text["usage"] == {"prompt_tokens": 5, "completion_tokens": drawn, "total_tokens": 5 + drawn}

    parts, said = both["choices"][0]["message"]["content"], by["both/two", 0]
    assert [part["type"].removesuffix("_url") for part in parts] == [part["type"] for part in said["segments"]]
    for part, segment in zip(parts, said["segments"], strict=True):
        if "text" in part:
            assert part["text"] == segment["text"]
        else:
            image = np.asarray(Image.open(out / segment["image"]))
            np.testing.assert_array_equal(pixels(part["image_url"]["url"]), image)
    images = [segment["image"] for segment in said["segments"] if "image" in segment]
    assert images and all(re.fullmatch(r"images/both-two-\w{16}/00_\d\d\.png", name) for name in images)
    assert said["name"] == images[0].split("/")[1]

    assert draw["size"] == "12x8" and draw["output_format"] == "png" and len(draw["data"]) == 2
    for i, image in enumerate(draw["data"]):
        shown = np.asarray(Image.open(out / by["draw", i]["segments"][0]["image"]))
        np.testing.assert_array_equal(pixels(image["b64_json"]), shown)

    assert [(row["custom_id"], row["response"]["status_code"]) for row in errors] == [
        ("no", 400),
        (None, 400),
        ("far", 400),
    ]
    for row, words in zip(errors, ["frequency_penalty", "JSON object", "exactly 2 x 3"], strict=True):
        error = row["response"]["body"]["error"]
        assert words in error["message"] and error["type"] == "invalid_request_error"

    # An answer may be part of a later conversation, unchanged.
    later = [{"role": "assistant", "content": parts}, {"role": "user", "content": "h"}]
    (again,) = read(tmp_path, [line("later", {"messages": later})])
    assert not again.error and sum(
        isinstance(part, PromptImage) for turn in again.history for part in turn.parts
    ) == len(images)


def test_the_answers_are_the_same_after_a_kill_and_on_more_processes(engine, tmp_path):  # noqa: F811
    requests = write_requests(tmp_path / "in", BATCH)
    run(engine, requests, tmp_path / "whole")
    names = ("batch_output.jsonl", "batch_errors.jsonl")
    whole = [(tmp_path / "whole" / name).read_bytes() for name in names]
    out = tmp_path / "out"
    run(engine, requests, out, process=(1, 2))
    assert not any((out / name).exists() for name in names)  # process 0 has not done its half
    run(engine, requests, out, process=(0, 2))
    assert [(out / name).read_bytes() for name in names] == whole
    (out / names[0]).unlink()  # killed between the last sample and the answers
    run(engine, requests, out)
    assert [(out / name).read_bytes() for name in names] == whole

    run(engine, write_requests(tmp_path / "ours", BATCH[-1:]), tmp_path / "plain")
    assert not (tmp_path / "plain" / names[0]).exists()


def test_a_line_whose_sample_failed_is_an_error_of_ours(engine, tmp_path, monkeypatch):  # noqa: F811
    from ar_unified.sampling import job

    entry = job._entry

    def broken(line, prompt, sample, cells):
        made = entry(line, prompt, sample, cells)
        return type(made)({**made.row, "error": "NaN"}) if sample.index == 1 else made

    monkeypatch.setattr(job, "_entry", broken)
    run(engine, write_requests(tmp_path / "in", BATCH[:2]), tmp_path / "out")
    (failed,) = [json.loads(line) for line in (tmp_path / "out/batch_errors.jsonl").read_text().splitlines()]
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("text", 500)
    assert failed["response"]["body"]["error"]["message"].startswith("sample 1 of 2: NaN")
