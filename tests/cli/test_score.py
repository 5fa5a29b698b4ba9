"""`ar-unified score`: the likelihoods of documents and pairs, and lines for items that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ar_unified
from ar_unified.cli.main import main
from ar_unified.evaluation import scoring
from ar_unified.language.document import Document, ImagePart, TextPart, Turn
from tests import bundles
from tests.cli.conftest import refused

SAID = "A small red star in the top left."
ROWS: list[dict[str, Any]] = [
    {"prompt": "A small star.", "answer": "red", "id": "text"},
    {"prompt": "A small star.", "answer": [{"type": "text", "text": "red"}, {"type": "image", "image": "a.png"}]},
    {"image": "a.png", "text": SAID},
    {"segments": [{"type": "text", "text": SAID}]},
    {"prompt": "A small star.", "chosen": "red", "rejected": [{"type": "image", "image": "a.png"}]},
    {"prompt": "A small star.", "answer": " "},
    {"prompt": "x", "answer": [{"type": "image", "image": "none.png"}]},
    {"prompt": SAID * 20, "answer": "red"},
    {"answer": "red"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("score")
    bundles.write(root / "bundle")
    Image.fromarray(bundles.grey()).save(root / "a.png")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[dict[str, Any]]:
    arguments = ["--from", str(folder / "bundle"), "--data", str(folder / "rows.jsonl"), "--batch-size", "8"]
    assert main(["score", *arguments, "--output", str(folder / "scores.jsonl")]) == 0
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_every_item_has_a_line_in_order(lines: list[dict[str, Any]]) -> None:
    assert [line["line"] for line in lines] == list(range(1, len(ROWS) + 1)) and lines[0]["id"] == "text"
    assert lines[2]["origin"].endswith("rows.jsonl:3")
    errors = [line.get("error", "").partition(":")[0] for line in lines]
    assert errors == [""] * 5 + ["empty_text", "missing_image", "not_scored", "no_prompt"]


def test_numbers_are_those_of_the_model(folder: Path, lines: list[dict[str, Any]]) -> None:
    model = ar_unified.load(folder / "bundle", batch_size=8)
    pixels = ImagePart(np.asarray(Image.open(folder / "a.png").convert("RGB")))
    asked, red = Turn("user", (TextPart("A small star."),)), TextPart("red")
    answers = [(red,), (red, pixels), (pixels,)]
    documents = [Document((asked, Turn("assistant", answer))) for answer in answers]
    text, both, image = model.score(documents)
    assert (
        lines[0]["log_likelihood"] == pytest.approx(text.log_likelihood, rel=1e-5) and lines[0]["tokens"] == text.tokens
    )
    assert lines[1]["text"]["log_likelihood"] == pytest.approx(both.parts[0].log_likelihood, rel=1e-5)
    assert lines[1]["image"] == {
        "log_likelihood": pytest.approx(both.parts[1].log_likelihood, rel=1e-5),
        "tokens": both.parts[1].tokens,
    }
    assert lines[1]["log_likelihood"] == pytest.approx(both.log_likelihood, rel=1e-5)
    assert [part["type"] for part in lines[1]["parts"]] == ["text", "image"]
    assert lines[0]["eos"]["tokens"] == 1 and lines[0]["greedy"] == all(part.greedy for part in text.parts)
    pair = lines[4]
    assert pair["chosen"] == {key: lines[0][key] for key in pair["chosen"]}
    assert pair["rejected"]["log_likelihood"] == pytest.approx(image.log_likelihood, rel=1e-5)
    assert pair["margin"] == pytest.approx(text.log_likelihood - image.log_likelihood, rel=1e-4)
    assert lines[3]["tokens"] == lines[3]["text"]["tokens"] > 5  # the document has no turns, so all its tokens count


def test_nothing_is_written_over_and_nothing_half(folder: Path, lines: list[dict[str, Any]], tmp_path: Path) -> None:
    of_bundle = ["score", "--from", str(folder / "bundle")]
    refused(
        [*of_bundle, "--data", str(folder / "rows.jsonl"), "--output", str(folder / "scores.jsonl")],
        "exists and is not overwritten",
    )
    refused(
        [*of_bundle, "--data", str(tmp_path / "no.jsonl"), "--output", str(tmp_path / "s")], r"--data .*no such file"
    )
    refused(["score", "--data", str(folder / "rows.jsonl"), "--output", str(tmp_path / "s")], "expected --workdir DIR")
    many = ["--batch-size", "0", "--data", str(folder / "rows.jsonl"), "--output", str(tmp_path / "s")]
    refused([*of_bundle, *many], "--batch-size: expected at least 1, found 0")
    assert not (tmp_path / "s").exists()


def test_a_killed_one_goes_on_where_it_was_to_the_same_bytes(folder, lines, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(scoring, "_AT_ONCE", 3)
    of_bundle = ["score", "--from", str(folder / "bundle"), "--batch-size", "8", "--data"]
    ask = [*of_bundle, str(folder / "rows.jsonl"), "--output"]
    assert main([*ask, str(tmp_path / "whole.jsonl")]) == 0
    told = capsys.readouterr().out.partition(": ")[2]
    rows, parts = scoring._rows, []

    class Killed(BaseException):
        pass

    def killed(model, source, chunk):
        parts.append([number for number, _ in chunk])
        if len(parts) == 3:
            raise Killed
        return rows(model, source, chunk)

    monkeypatch.setattr(scoring, "_rows", killed)
    with pytest.raises(Killed):
        main([*ask, str(tmp_path / "parts.jsonl")])
    assert not (tmp_path / "parts.jsonl").exists()
    (tmp_path / "other.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    refused(
        [*of_bundle, str(tmp_path / "other.jsonl"), "--output", str(tmp_path / "parts.jsonl")], "it was started with"
    )
    assert main([*ask, str(tmp_path / "parts.jsonl")]) == 0
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8]], "what was done is not done again"
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    again = capsys.readouterr().out.splitlines()[-2:]
    assert " (6 items were scored before)" in "\n".join(again)
    assert "\n".join(again).replace(" (6 items were scored before)", "").partition(": ")[2] == told.strip()
