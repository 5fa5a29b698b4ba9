"""Prompts are UTF-8, with or without a byte order mark, and may only name images and files in their folder."""

from __future__ import annotations

import codecs
import io
import json
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ar_unified.errors import UserError
from ar_unified.language.document import TextPart
from ar_unified.sampling.formats import fingerprint
from ar_unified.sampling.request import RequestError
from ar_unified.sampling.requests import PromptImageError, read_requests

PROMPTS = ["ein Hünd", "a cat"]
MARK = codecs.BOM_UTF8
SUFFIXES = [".txt", ".jsonl", ".json", ".csv", ".tsv", ".tar", ".prompts", ""]


def lines(path, **options):
    cells = SimpleNamespace(factor=4, codes_per_position=1)
    options.setdefault("warn", lambda line: None)
    return read_requests(path, cells=cells, defaults={"context": "empty_prompt"}, **options)


def written(path, data):
    """A file of prompts in the format of its name; `encode` converts a text to bytes."""
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in PROMPTS]
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as file:
            for name, text in {"0.txt": PROMPTS[0], "1.json": rows[1]}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data(text))
                file.addfile(info, io.BytesIO(data(text)))
    elif path.suffix == "":
        path.mkdir()
        for i, prompt in enumerate(PROMPTS):
            (path / f"{i}.txt").write_bytes(data(prompt))
    else:
        table = [["prompt", "number"], *([prompt, str(i)] for i, prompt in enumerate(PROMPTS))]
        text = {
            ".json": "[" + ",".join(rows) + "]",
            ".jsonl": "\r\n".join(rows),
            ".csv": "\r\n".join(map(",".join, table)),
            ".tsv": "\n".join(map("\t".join, table)),
        }.get(path.suffix, "\r\n".join(PROMPTS))
        path.write_bytes(data(text))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_mark_is_no_part_of_a_prompt(tmp_path, suffix):
    found = lines(written(tmp_path / f"a{suffix}", lambda text: MARK + text.encode()))
    assert [line.error for line in found] == ["", ""]
    assert [line.content for line in found] == [(TextPart(prompt),) for prompt in PROMPTS]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-32-be"])
def test_another_encoding_is_refused_by_name_and_nothing_is_drawn(tmp_path, suffix, codec):
    path = written(tmp_path / f"a{suffix}", lambda text: text.encode(codec))
    name = "UTF-32 .big endian" if "32" in codec else "UTF-16 .little endian"
    if suffix in (".tar", ""):  # each prompt is a file
        found = lines(path)
        assert len(found) == 2 and all(line.error and line.request is None for line in found)
        # In a short text without a mark, only the zero bytes show the encoding.
        assert all("found UTF-" in line.error or "zero byte" in line.error for line in found)
    else:
        with pytest.raises(RequestError, match=rf"a{suffix}: expected text in UTF-8, found {name}"):
            lines(path)


def test_single_bytes_are_an_error_of_their_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("a dog\nein Hünd\na cat\n".encode("cp1252"))
    found = lines(tmp_path / "a.txt")
    assert [bool(line.error) for line in found] == [False, True, False]
    assert "found 0xfc at byte 5; in Windows-1252 this place would read 'ein Hünd" in found[1].error
    (tmp_path / "a.csv").write_bytes("prompt\na dog\nein Hünd\n".encode("cp1252"))
    with pytest.raises(RequestError, match="a.csv, line 3: expected UTF-8, found 0xfc"):
        lines(tmp_path / "a.csv")


def test_links_of_prompts_and_their_images(tmp_path):
    far = tmp_path / "far"
    (tmp_path / "in").mkdir()
    far.mkdir()
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(far / "a.png")
    (far / "p.txt").write_text("a far prompt")
    (tmp_path / "in" / "images").symlink_to(far)
    (tmp_path / "in" / "1.txt").symlink_to(far / "p.txt")
    (tmp_path / "in" / "0.TXT").write_text("a near prompt")
    os.mkfifo(tmp_path / "in" / "2.txt")
    content = [{"type": "image", "image": "images/a.png"}]
    (tmp_path / "in" / "asked.jsonl").write_text(json.dumps({"content": content, "mode": "text"}))
    assert fingerprint([tmp_path / "in"]) == fingerprint([tmp_path / "in"]), "and does not wait for a pipe"
    with pytest.raises(UserError, match="2.txt: expected a file, found a pipe"):
        lines(tmp_path / "in" / "2.txt")
    for links in (False, True):
        near, linked, pipe = lines(tmp_path / "in", links=links)
        assert near.content == (TextPart("a near prompt"),) and "found a pipe" in pipe.error
        (line,) = lines(tmp_path / "in" / "asked.jsonl", links=links)
        if links:
            assert linked.content == (TextPart("a far prompt"),)
            assert (line.content[0].load() == 7).all()
        else:
            assert f"1.txt is a link to {far}/p.txt, outside" in linked.error
            with pytest.raises(PromptImageError, match=f"images is a link to {far}, outside .* --links"):
                line.content[0].load()


@pytest.mark.parametrize("suffix", ["png", "jfif", "JPE", "pgm"])
def test_a_shard_knows_the_images_that_a_folder_knows(tmp_path, suffix):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 9, np.uint8)).save(file, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, data in {f"0.{suffix}": file.getvalue(), "0.txt": b"what?", "0.json": b'{"mode": "text"}'}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    (line,) = lines(tmp_path / "a.tar")
    assert not line.error and line.content[0].load()[0, 0, 0] == 9
