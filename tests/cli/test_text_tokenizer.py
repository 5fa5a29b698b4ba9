"""The stage text_tokenizer: a trained tokenizer, a given one, and the report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from ar_tokenizers.text import TextTokenizer

from ar_unified.cli.main import main
from ar_unified.cli.plan import run_of
from ar_unified.experiment import config as configs
from ar_unified.experiment.experiment import Experiment
from ar_unified.workdir import Workdir
from tests.cli.conftest import ROOT, refused


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    (root / "eng.txt").write_bytes(b"a red circle\na blue star\n" * 40 + b"caf\xe9\n")
    (root / "ell.txt").write_text(
        "\u03ba\u03cc\u03ba\u03ba\u03b9\u03bd\u03bf  \u03b1\u03c3\u03c4\u03ad\u03c1\u03b9\n" * 4
    )
    rows = [dict(text="een rode cirkel", language="nld"), dict(text="en r\u00f8d sirkel", language="nob")]
    (root / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(corpus: Path, **changes: object) -> list[str]:
    changes = {"vocab_size": 400} | changes
    overrides = [f"--config.text_tokenizer.{key}={value}" for key, value in changes.items()]
    return ["--config", f"{ROOT}/experiments/text_tokenizer.py:path={corpus}", *overrides]


def test_the_stage_leaves_a_model_and_a_report_by_source_and_language(corpus, tmp_path, capsys):
    command = ["tokenizer", "--workdir", str(tmp_path), *arguments(corpus, temperature=2.0)]
    assert main(command) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "text_tokenizer" / "report.json").read_text())
    rows = report["texts"]
    assert list(rows) == ["ell", "eng", "more/nld", "more/nob"]
    assert rows["eng"]["texts"] == 80 and rows["eng"]["bytes"] == 40 * 23
    assert rows["eng"]["bytes_per_token"] > 3 and rows["ell"]["tokens_per_character"] < 0.5
    assert all(row["failed"] == 0 for row in rows.values())
    assert report["left_out"]["bad_utf8"]["count"] == 1
    assert "eng.txt:81: bad_utf8: expected UTF-8, found 0xe9 at byte 1003 of the file" in out
    assert 1 == report["passes"]["eng"] < report["passes"]["ell"]
    assert "instead of 400: this corpus is too small for more" in out and "bytes/token" in out
    assert not (tmp_path / "image_tokenizer").exists()
    assert main(command) == 0 and "done already" in capsys.readouterr().out


def test_what_is_not_text_beside_the_texts_is_passed_over_and_two_of_one_name_are_two(tmp_path):
    for name in ("en.txt", "en.md", "nl.txt"):
        (tmp_path / name).write_text(f"{name} a red circle\n" * 9)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "de.txt").write_text("ein roter Kreis\n" * 9)
    for name in (".git/a.txt", "images/a.png", "notes/.cache/a.txt", ".hidden.txt", "empty/x.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x89PNG")
    assert main(["tokenizer", "--workdir", str(tmp_path / "w"), *arguments(tmp_path)]) == 0
    report = json.loads((tmp_path / "w" / "text_tokenizer" / "report.json").read_text())
    assert sorted(report["texts"]) == ["deep", "en.md", "en.txt", "nl"] and not report["left_out"]


def test_a_reserved_character_cuts_no_text_out_of_training_and_is_told(tmp_path, capsys):
    (tmp_path / "bars").mkdir()
    lines = [f"sparkline zebra {i} \u2585 quantises" if i % 2 else f"the quick fox {i}" for i in range(40)]
    (tmp_path / "bars" / "log.txt").write_text("\n".join(lines), encoding="utf-8")
    assert main(["tokenizer", "--workdir", str(tmp_path / "w"), *arguments(tmp_path)]) == 0
    report = json.loads((tmp_path / "w" / "text_tokenizer" / "report.json").read_text())
    assert report["cut_at"] == {"U+2585": 20} and "U+2585 is in 20 of the texts" in capsys.readouterr().out
    tokenizer = TextTokenizer.load(tmp_path / "w" / "text_tokenizer" / "text.model")
    assert len(tokenizer.encode("sparkline zebra")) < 6


def test_a_model_from_elsewhere_is_used_or_refused(corpus, tmp_path, capsys):
    TextTokenizer.train(["a red circle", "a blue star"] * 9, 300).save(tmp_path / "own.model")
    command = ["tokenizer", "--workdir", str(tmp_path / "own")]
    assert main([*command, *arguments(corpus, model=tmp_path / "own.model")]) == 0
    used = (tmp_path / "own" / "text_tokenizer" / "text.model").read_bytes()
    assert used == (tmp_path / "own.model").read_bytes()
    size = TextTokenizer(used).size
    config = configs.load(*_file_and_overrides(corpus, model=tmp_path / "own.model"))
    assert run_of(config).vocabulary.text_size == size < 400
    TextTokenizer.train(["other words"] * 9, 300).save(tmp_path / "own.model")
    refused([*command, *arguments(corpus, model=tmp_path / "own.model")], "model_sha256")

    lossy = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle", "a blue star"] * 9), model_writer=lossy, vocab_size=290,
        model_type="bpe", hard_vocab_limit=False, byte_fallback=True, add_dummy_prefix=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "lossy.model").write_bytes(lossy.getvalue())
    command = ["tokenizer", "--workdir", str(tmp_path / "lossy")]
    lost = "lossy.model: this text tokenizer loses text(?s:.*)nmt_nfkc(?s:.*)extra_whitespaces"
    refused([*command, *arguments(corpus, model=tmp_path / "lossy.model")], lost)
    refused([*command, *arguments(corpus, model=tmp_path / "nowhere.model")], "nowhere.model: no such file")
    capsys.readouterr()
    warned = dict(model=tmp_path / "lossy.model", lossy="warn")
    assert main([*command, *arguments(corpus, **warned)]) == 0
    report = json.loads((tmp_path / "lossy" / "text_tokenizer" / "report.json").read_text())
    assert report["texts"]["ell"]["failed"] == 4 and len(report["losses"]) == 2
    assert report["texts"]["ell"]["first_failure"]["origin"].endswith("ell.txt:1")
    out = capsys.readouterr().out
    assert "0 of 4" in out and "this text tokenizer loses text: normalizer_spec.name = 'nmt_nfkc'" in out
    experiment = Experiment(configs.load(*_file_and_overrides(corpus, **warned)), Workdir(tmp_path / "lossy"))
    assert experiment.text_tokenizer.losses


def _file_and_overrides(corpus: Path, **changes: object) -> tuple[str, list[str]]:
    _, file, *overrides = arguments(corpus, **changes)
    return file, overrides


def test_a_corpus_without_text_names_what_was_left_out(tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "latin.txt").write_bytes(b"\xe9\n")
    words = "text tokenizer of bad: there is no text .* Left out: 1 bad_utf8, first .*latin.txt:1"
    command = ["tokenizer", "--workdir", str(tmp_path / "w"), *arguments(tmp_path)]
    refused(command, words)
    assert not (tmp_path / "w" / "text_tokenizer").exists(), "a stage that made nothing leaves nothing"
    (tmp_path / "bad" / "latin.txt").write_text("a red circle\n" * 20)
    assert main(command) == 0
