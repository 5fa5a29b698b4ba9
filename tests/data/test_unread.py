"""Whatever a person gives in place of a dataset gets a sentence that says what to do, and what it says works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ar_unified.data.checks.validate import validate
from ar_unified.data.sources import kind_of, open_source
from ar_unified.errors import UserError
from ar_unified.language.document import ImagePart


def lay(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Writes files below a folder; an image's content is its number, which becomes its grey value."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.lower().endswith((".png", ".jpg")):
            Image.fromarray(np.full((32, 32, 3), int(content), np.uint8)).save(path)
        else:
            path.write_text(content, encoding="utf-8")
    return root


def said_of(path: Path) -> str:
    """What `validate` says about a path, as an error or as a remark."""
    try:
        return validate(path, show_progress=False).note
    except UserError as error:
        return str(error)


PICTURES = {"a.png": "10", "b.png": "20"}
LAID = {"Images/a.png": "10", "Images/b.png": "20"}
WANTED = {10: "A red, round ball.", 20: 'A "blue" hut; ü.'}
CSV = 'image,caption\na.png,"A red, round ball."\nb.png,"A ""blue"" hut; ü."\n'
ROWS = [dict(file_name="a.png", width="32", text=WANTED[10]), dict(file_name="b.png", width="32", text=WANTED[20])]
IN_ANOTHER_FORM: dict[str, dict[str, str]] = {
    "csv": {**PICTURES, "captions.csv": CSV},
    "a byte order mark, as Excel writes it": {**PICTURES, "captions.csv": "\ufeff" + CSV},
    "images elsewhere, as in Flickr8k": {**LAID, "captions.txt": CSV},
    "no header, tabs": {**PICTURES, "some.tsv": f"a.png\t{WANTED[10]}\nb.png\t{WANTED[20]}\n"},
    "semicolons": {**PICTURES, "it.csv": f'id;text;image\n7;{WANTED[10]};a.png\n8;"A ""blue"" hut; ü.";b.png\n'},
    "a .txt beside each image": {"x/a.png": "10", "x/a.txt": WANTED[10], "b.png": "20", "b.txt": WANTED[20] + "\n"},
    "metadata.jsonl of Hugging Face": {**PICTURES, "metadata.jsonl": "\n".join(map(json.dumps, ROWS))},
    "below the folder": {
        **{f"train/{name}": grey for name, grey in PICTURES.items()},
        "train/metadata.jsonl": "\n".join(map(json.dumps, ROWS)),
    },
    "a list in JSON": {**PICTURES, "captions.json": json.dumps(ROWS, indent=1)},
    "a name for the shell": {"it's/a.png": "10", "it's/b.png": "20", "it's/captions.csv": CSV},
}


@pytest.mark.parametrize("form", IN_ANOTHER_FORM)
def test_the_command_in_the_message_makes_captions_of_another_form(form: str, tmp_path: Path) -> None:
    said = said_of(lay(tmp_path / "a b's", IN_ANOTHER_FORM[form]))
    command = re.search("python3 (-c .*)", said)
    assert command, said
    subprocess.run(f"{sys.executable} {command[1]}", shell=True, check=True, cwd="/")
    (made,) = (tmp_path / "a b's").rglob("captions.jsonl")
    source = open_source(dict(kind="folder", path=made.parent))
    found = {}
    for document in map(source.__getitem__, range(len(source))):
        (image,) = (part.pixels for part in document.parts if isinstance(part, ImagePart))
        found[int(image[0, 0, 0])] = source.texts(len(found))[0]
    assert found == WANTED
    assert kind_of(made.parent) == "folder"


@pytest.mark.parametrize(
    ("files", "given", "words"),
    [
        (PICTURES, "", ["2 images and no captions", "--config photos:path={root} ", '"kind": "images"']),
        (PICTURES, "a.png", ["found one image; give the folder of the images, {root}"]),
        ({}, "", ["It has no files: put images and captions.jsonl there"]),
        ({"all.zip": b"PK"}, "", ["Unpack all.zip"]),
        ({"all.zip": b"PK"}, "all.zip", ["found an archive; unpack it"]),
        ({"a.mp4": b"0"}, "", ['"kind": "clips"']),
        ({"a.mp4": b"0"}, "a.mp4", ["found one video", '"kind": "clips"']),
        ({"a.docx": b"0", "b.docx": b"0"}, "", ["Nothing reads what it has: .docx (2)"]),
        ({"a.csv": "name,age\nx,1\n"}, "a.csv", ["found a table. a.csv names no images", "makes JSONL of its columns"]),
        ({**PICTURES, "a.csv": "image,text\na.png,été".encode("latin-1")}, "", ["a.csv: expected UTF-8, found 0xe9"]),
        ({"a.json": '{"text": "x"}\n{"text": "y"}\n'}, "a.json", ["a name that ends in .jsonl", "rename it"]),
        ({"a.json": "3"}, "a.json", ["expected JSONL, with one object in each line; found JSON."]),
        (
            {**PICTURES, "train.jsonl": '{"image": "a.png", "text": "x"}'},
            "",
            ["give the file, {root}/train.jsonl, or rename it to captions.jsonl"],
        ),
        (
            {"x/a.png": "1", "x/captions.jsonl": '{"image": "a.png", "text": "x"}'},
            "",
            ["x/captions.jsonl is below the folder: give {root}/x"],
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_what_is_no_dataset_is_told_what_to_do(
    files: Mapping[str, str | bytes], given: str, words: list[str], tmp_path: Path
) -> None:
    tmp_path.joinpath("set").mkdir()
    said = said_of(lay(tmp_path / "set", files) / given)
    for each in words:
        assert each.replace("{root}", str(tmp_path / "set")) in said, said


def test_a_text_with_commas_and_one_name_of_an_image_stays_a_text(tmp_path: Path) -> None:
    story = "She opened the drawer, and there lay photo.png\nNobody, not even he, had seen it.\nNo.\n"
    assert kind_of(lay(tmp_path, {"story.txt": story}) / "story.txt") == "text"


def test_the_kind_folder_says_the_same_where_its_rows_are_missing(tmp_path: Path) -> None:
    lay(tmp_path, IN_ANOTHER_FORM["a .txt beside each image"])
    with pytest.raises(UserError, match="no file of these names .* makes captions.jsonl of them: python3 -c"):
        open_source(dict(kind="folder", path=tmp_path, split="[:95%]"))
    with pytest.raises(UserError, match="found a file at"):
        open_source(dict(kind="folder", path=tmp_path / "b.txt"))


def test_the_specs_in_the_message_about_bare_images_are_read(tmp_path: Path) -> None:
    (spec,) = re.findall(r"{\"kind\": .*?}", said_of(lay(tmp_path, PICTURES)))
    assert len(open_source(json.loads(spec))) == 2
