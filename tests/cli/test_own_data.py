"""A user's own folder on the command line: links, encodings, and languages named after files."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ar_unified.cli.main import main
from ar_unified.data.images import to_png
from ar_unified.data.sources import BadItem, open_source
from ar_unified.experiment import config
from tests.data import copies

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder where the images are a link to another place, and the captions begin with a byte order mark."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").mkdir()
    for i in range(4):
        (tmp_path / "disk" / f"{i}.png").write_bytes(to_png(np.full((16, 16, 3), 60 * i, np.uint8)))
    (tmp_path / "set" / "images").symlink_to(tmp_path / "disk")
    rows = "".join(json.dumps(dict(image=f"images/{i}.png", text=f"grey {i}")) + "\n" for i in range(4))
    (tmp_path / "set" / "captions.jsonl").write_text(rows, encoding="utf-8-sig")
    return tmp_path / "set"


def test_validate_says_how_links_are_allowed(linked, capsys):
    assert main(["validate", str(linked)]) == 1
    assert f"images is a link to {linked.parent / 'disk'}, outside {linked}" in capsys.readouterr().out
    assert main(["validate", str(linked), "--links"]) == 0
    assert "4 items, 4 good" in capsys.readouterr().out


def test_the_folder_experiment_can_follow_links(linked):
    path = f"{ROOT}/experiments/folder.py:path={linked}"
    for arg, good in ((path, False), (f"{path},links=yes", True)):
        (spec,) = config.load(arg).data.train
        source = open_source({**config.plain(spec), "split": None})
        if good:
            assert source[0].parts[1].pixels.shape == (16, 16, 3)
        else:
            with pytest.raises(BadItem, match="path_escapes"):
                source[0]


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert main(["validate", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder or file" in capsys.readouterr().err
    shutil.copytree(ROOT / "docs", tmp_path / "set")
    (tmp_path / "set" / "Captions.JSONL").write_text("{}")
    assert main(["validate", str(tmp_path / "set")]) == 2
    assert "Captions.JSONL: expected a name in lower case" in capsys.readouterr().err


def test_files_that_differ_in_their_ending_are_rows_of_their_own(tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / ".git").mkdir(parents=True)
    (corpus / ".git" / "note.txt").write_text("not this")
    (corpus / "en.txt").write_text("a red circle\n" * 40, encoding="utf-8-sig")
    (corpus / "en.md").write_text("a blue star\n" * 30)
    (corpus / "NL.TXT").write_text("een rode cirkel\n" * 30)
    experiment = ["--config", f"{ROOT}/experiments/text_tokenizer.py:path={corpus}"]
    assert (
        main(["tokenizer", "--workdir", str(tmp_path / "w"), *experiment, "--config.text_tokenizer.vocab_size=300"])
        == 0
    )
    texts = json.loads((tmp_path / "w" / "text_tokenizer" / "report.json").read_text())["texts"]
    assert {name: row["texts"] for name, row in texts.items()} == {"NL": 30, "en.md": 30, "en.txt": 40}
    assert texts["en.txt"]["bytes"] == 40 * len("a red circle"), "the mark is no text"


def test_tables_and_tars_are_taken_as_a_folder_is(tmp_path, capsys):
    examples = [dict(image=to_png(np.full((16, 16, 3), i, np.uint8)), text=f"grey {i}") for i in range(40)]
    copies.parquet(tmp_path / "tables", examples)
    tars = copies.webdataset(tmp_path / "tars", examples)["path"]
    copies.jsonl(tmp_path / "own.jsonl", examples)
    (tmp_path / "own.jsonl.gz").write_bytes(gzip.compress((tmp_path / "own.jsonl").read_bytes()))
    one = sorted((tmp_path / "tables" / "data").iterdir())[0]
    for path, items in ((tmp_path / "tables", 40), (one, 14), (tars, 40), (tmp_path / "own.jsonl.gz", 40)):
        assert main(["validate", str(path)]) == 0
        assert f"{items} items, {items} good ({items} text_to_image)" in capsys.readouterr().out, path
        loaded = config.load(f"{ROOT}/experiments/folder.py:path={path}").data
        train, held_out = (open_source(config.plain(spec)) for spec in (*loaded.train, *loaded.validation))
        assert len(train) + len(held_out) == items and len(held_out) <= 2
    assert main(["validate", str(tmp_path / "{0..1}.tar")]) == 2
    assert "0.tar: no such file" in capsys.readouterr().err
