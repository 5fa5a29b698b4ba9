from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ar_unified.data.checks.validate import validate
from ar_unified.errors import UserError
from ar_unified.language.grammar import Grammar


def test_every_bad_item_is_named_by_file_line_and_kind(folder: Path, kit: Any) -> None:
    expected = kit.spoil(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    validation = validate(folder, show_progress=False)
    assert {bad.origin.split("/")[-1]: bad.kind for bad in validation.bad} == expected
    captions = validation.sources[0]
    assert captions.items == 31 and sum(captions.tasks.values()) == 21 and captions.kinds["path_escapes"] == 2
    shown = str(validation)
    for where, kind in expected.items():
        assert f"{where}: {kind}: " in shown
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_shows_counts_lengths_and_documents_as_the_model_sees_them(
    folder: Path, grammar: Grammar, tokenizer: Any
) -> None:
    validation = validate(folder, grammar, tokenizer, max_tokens=64, show=1, show_progress=False)
    captions, docs, vqa = validation.sources
    assert captions.tasks == {"text_to_image": 20} and vqa.tasks == {"image_to_text": 10}
    assert captions.tokens[0] == 1 + len("picture 0") + 1 + 18 + 1 and captions.sides[0] == (16, 16)
    shown = str(validation)
    assert "<user>\n    | picture 0\n    | <assistant>\n    | <image 16 x 16>" in shown
    assert "30 tokens: <bos>|p|i|c|t|u|r|e| |0|<eot>|<boi>|<image code " in shown
    assert "tokens      least 30  50% 3" in shown
    assert not docs.bad, "documents without a turn are split, not left out"
    assert validate(folder, grammar, tokenizer, max_tokens=30, show_progress=False).sources[0].kinds == {"too_long": 10}


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one of captions.jsonl"):
        validate(tmp_path)
    with pytest.raises(ValueError, match="no such folder or file"):
        validate(tmp_path / "nowhere")


@pytest.mark.parametrize("below", ["", "things", "things/few"])
def test_a_dataset_of_tfds_is_not_read_as_the_names_of_its_classes(tmp_path, below):
    folder = tmp_path / "things" / "few" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "label.labels.txt").write_text("cat\ndog\n")
    assert validate(tmp_path / below, show_progress=False).sources[0].items == 1, "it is a text"
    (folder / "dataset_info.json").write_text(json.dumps(dict(name="things", configName="few", version="1.0.0")))
    assert validate(tmp_path / below, show_progress=False).sources[0].items == 1, (
        "other programs write such a file, too"
    )
    (folder / "features.json").write_text("{}")
    for path in (tmp_path / below, folder):
        with pytest.raises(UserError, match="found a dataset of TFDS") as said:
            validate(path, show_progress=False)
        (spec,) = re.findall("{.*?}", str(said.value))
        assert json.loads(spec) == dict(kind="tfds", name="things/few:1.0.0", data_dir=str(tmp_path.resolve()))
    (tmp_path / "captions.jsonl").write_text("")
    assert validate(tmp_path, show_progress=False).sources[0].name.endswith("captions"), "rows come first"


def test_images_beside_texts_that_nothing_names_are_told(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle")
    assert not validate(tmp_path, show_progress=False).note
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    said = str(validate(tmp_path, show_progress=False))
    assert "It also has 1 image that no row names" in said and '"kind"' not in said
    (tmp_path / "b.md").write_text("# a circle\n\n![](a.png)")
    (spec,) = re.findall(r"{\"kind\": .*?}", str(validate(tmp_path, show_progress=False)))
    (pages,) = validate([json.loads(spec)], show_progress=False).sources
    assert pages.tasks == {"interleaved": 1}, "the source that is named reads them"
