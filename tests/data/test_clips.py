from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ar_unified.data.images import evenly
from ar_unified.data.sources import BadItem, open_source, read
from ar_unified.errors import UserError
from ar_unified.language.document import ImagePart, TextPart


def greys(parts: tuple) -> list[int]:
    return [int(part.pixels[0, 0, 0]) for part in parts if isinstance(part, ImagePart)]


def test_clips_are_documents_of_several_images(tmp_path: Path) -> None:
    shown = [Image.fromarray(np.full((8, 8), 10 * i, np.uint8)) for i in range(11)]
    for name, options in (("b.gif", {}), ("c.webp", {"lossless": True})):
        shown[0].save(tmp_path / name, save_all=True, append_images=shown[1:], **options)
    (tmp_path / "a").mkdir()
    for i, image in enumerate(shown):
        image.save(tmp_path / "a" / f"f{i}.png")
    (tmp_path / "b.txt").write_text("it gets brighter\n")
    (tmp_path / "d.gif").write_bytes((tmp_path / "b.gif").read_bytes()[:60])
    (tmp_path / "e.webp").symlink_to("/etc/passwd")
    source = open_source(dict(kind="clips", path=tmp_path, frames=3))
    found = [item for _, item in read(source, range(len(source)))]
    assert [greys(item.parts) for item in found[:3]] == [[0, 50, 100]] * 3, "10.png comes after 9.png"
    assert found[1].parts[0] == TextPart("it gets brighter") == TextPart(*source.texts(1)) and found[1].asks
    assert not found[0].asks and source.texts(0) == [] and found[0].task == "interleaved"
    assert [item.kind for item in found[3:] if isinstance(item, BadItem)] == ["unreadable_image", "path_escapes"]
    assert greys(open_source(dict(kind="clips", path=tmp_path, frames=99))[2].parts) == list(range(0, 101, 10))
    assert source.origin(0) == str(tmp_path / "a")
    wrong: tuple[tuple[dict, str], ...] = ((dict(frames=0), "at least 1"), (dict(path=tmp_path / "a"), "found none"))
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            open_source(dict(kind="clips", path=tmp_path) | options)


def test_frames_are_evenly_apart() -> None:
    assert evenly(1, 8) == [0] and evenly(5, 1) == [0] and evenly(9, 3) == [0, 4, 8] and evenly(3, 8) == [0, 1, 2]
