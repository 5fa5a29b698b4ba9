"""Every format of requests gives the same requests."""

from __future__ import annotations

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ar_unified.language.document import TextPart, TokensPart
from ar_unified.sampling.request import RequestError
from ar_unified.sampling.requests import PromptImage, read_requests

DEFAULTS = {"context": "empty_prompt"}


def png(grey):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


def lines(paths, codes_per_position=1):
    cells = SimpleNamespace(factor=4, codes_per_position=codes_per_position)
    return read_requests(paths, cells=cells, defaults=DEFAULTS)


def said(line):
    """The id, settings and content of a line, with images as their grey."""
    content = [int(part.load()[0, 0, 0]) if isinstance(part, PromptImage) else part for part in line.content]
    return line.id, line.request, content


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_prompts_in_every_format(tmp_path):
    prompts = ["a cat", "ein Hünd"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n\n" for p in prompts))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(prompts).encode())
    (tmp_path / "c").write_text("\n".join(prompts))
    (tmp_path / "d.json").write_text(json.dumps([{"prompt": p} for p in prompts]))
    tar(tmp_path / "e.tar", {f"{i}.txt": p.encode() for i, p in enumerate(prompts)})
    for name in ("a.jsonl", "b.txt", "c", "d.json", "e.tar"):
        found = lines(tmp_path / name)
        assert [line.content for line in found] == [(TextPart(p),) for p in prompts], name
        assert all(line.request.mode == "image" and not line.error for line in found), name
    several = lines([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    assert [line.number for line in several] == [1, 3, 4, 5] and len({line.id for line in several}) == 4


def test_a_webdataset_shard(tmp_path):
    content = [{"type": "tokens", "ids": [3]}, {"type": "image", "image": "d/2.png"}]
    path = tar(tmp_path / "shard.tar", {
        "d/0.txt": b"a cat\n",
        "d/1.0.png": png(1), "d/1.1.jpg": png(2), "d/1.txt": b"Which?", "d/1.json": b'{"mode": "text", "seed": 4}',
        "d/2.json": json.dumps({"content": content}).encode(), "d/2.png": png(3),
        "d/3.cls": b"7", "d/3.txt": b"a dog",  # a label is not a prompt
        "d/4.txt": b"a", "d/4.json": b'{"prompt": "b"}',
        "d/5.txt": b"a bird",
    })  # fmt: skip
    with pytest.warns(UserWarning, match=r"members \.cls"):
        found = lines(path)
    assert [line.id for line in found] == [f"d-{i}" for i in range(6)]
    assert said(found[0])[2] == [TextPart("a cat")] and found[0].request.mode == "image"
    assert said(found[1])[2] == [1, 2, TextPart("Which?")]
    assert (found[1].request.mode, found[1].request.seed) == ("text", 4)
    assert said(found[2])[2] == [TokensPart((3,)), 3]
    assert said(found[3])[2] == [TextPart("a dog")] and "found both" in found[4].error
    assert said(found[5])[2] == [TextPart("a bird")]
    path.write_bytes(path.read_bytes()[:3000])  # an interrupted copy
    with pytest.raises(RequestError, match="expected a whole, uncompressed tar"):
        lines(path)


def test_the_prompt_files_of_benchmarks(tmp_path):
    geneval = {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "two benches"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(geneval) + "\n")
    (tmp_path / "meta_data.json").write_text(json.dumps({"f0a1": {"category": "art", "prompt": "a vase"}}))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/partiprompts9.txt").write_text("a red door\n")
    (first,), (second,), (third,) = map(
        lines, (tmp_path / n for n in ("evaluation_metadata.jsonl", "meta_data.json", "prompts"))
    )
    assert first.request.meta == geneval and first.content == (TextPart("two benches"),)
    assert (second.id, second.request.meta, second.content) == ("f0a1", {"category": "art"}, (TextPart("a vase"),))
    assert (third.id, third.content) == ("partiprompts9", (TextPart("a red door"),))


def test_requests_without_a_seed_draw_apart_from_each_other_and_alike_in_every_run(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps({"id": id, "prompt": "a cat"}) + "\n" for id in "abc"))
    seeds = [line.request.seed for line in lines(file)]
    assert len(set(seeds)) == 3 and seeds == [line.request.seed for line in lines(file)]
    file.write_text(json.dumps({"id": "c", "prompt": "a cat"}))  # a seed does not depend on earlier rows
    assert [line.request.seed for line in lines(file)] == seeds[2:]


def test_image_sizes_are_asked_in_pixels(tmp_path):
    """Two codes side by side for each 4 x 4 pixels make the grid twice as wide."""
    (tmp_path / "requests.jsonl").write_text(json.dumps({"prompt": "a cat", "image_size": [8, 12]}))
    for codes_per_position, size in ((1, (2, 3)), (2, (2, 6))):
        (line,) = lines(tmp_path / "requests.jsonl", codes_per_position)
        assert line.request.image_size == size
