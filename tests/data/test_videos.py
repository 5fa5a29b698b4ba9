"""Videos as clips. Tests that need the package `av` are marked interop, because only that environment has it."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_unified.data import videos
from ar_unified.data.images import ImageError, Limits
from ar_unified.data.sources import BadItem, open_source, read
from ar_unified.errors import UserError
from ar_unified.language.document import ImagePart, TextPart

TURNED = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000 00000000 00000000 40000000")
ASIDE = bytes.fromhex("00000000 00010000 00000000 ffff0000 00000000 00000000 00000000 00000000 40000000")


def test_without_av_a_folder_with_videos_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else known(name))
    (tmp_path / "a.MP4").write_bytes(b"?")
    with pytest.raises(UserError, match=r"a\.MP4: videos need the package av.*pip install 'ar_unified\[video\]'"):
        open_source(dict(kind="clips", path=tmp_path))


def film(codec: str = "libx264", kind: str = "mp4", count: int = 40, every: int = 12, size: Any = (64, 48)) -> bytes:
    """Frame i has the grey 6 i and a white upper left corner. Every `every`-th frame is a key frame."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=kind) as made:
        stream = made.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", every, 4_000_000
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), 6 * i, np.uint8)
            pixels[:16, :16] = 255
            made.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        made.mux(stream.encode())
    return file.getvalue()


def greys(shown: list[np.ndarray]) -> list[int]:
    return [round(float(pixels[-8:, -8:].mean()) / 6) for pixels in shown]


@pytest.mark.interop
@pytest.mark.parametrize("codec, kind", [("libx264", "mp4"), ("mpeg4", "avi"), ("libvpx-vp9", "webm")])
@pytest.mark.parametrize("every", [1, 12, 100])
def test_the_frames_are_those_of_the_numbers(codec: str, kind: str, every: int) -> None:
    data = film(codec, kind, every=every)
    assert greys(videos.frames(data, 4)) == [0, 13, 26, 39]
    assert greys(videos.frames(data, 99)) == list(range(40)) and greys(videos.frames(data, 1)) == [0]


@pytest.mark.interop
def test_only_what_is_wanted_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    data, decoded = film(count=41, every=10), []

    class Watched:
        def __init__(self, file: Any):
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.close()

        def decode(self, stream: Any) -> Any:
            for frame in self._file.decode(stream):
                decoded.append(frame.pts)
                yield frame

    opened = av.open
    monkeypatch.setattr(av, "open", lambda file: Watched(opened(file)))
    assert greys(videos.frames(data, 3)) == [0, 20, 40] and len(decoded) == 3


@pytest.mark.interop
def test_a_video_is_upright_and_within_limits() -> None:
    data = film()
    assert data.count(TURNED) == 2, "of the file and of its track, which stands last"
    aside = ASIDE.join(data.rsplit(TURNED, 1))
    (plain,), (turned,) = videos.frames(data, 1), videos.frames(aside, 1)
    assert plain.shape == (48, 64, 3) and turned.shape == (64, 48, 3) and not turned.flags.writeable
    assert np.array_equal(turned, np.rot90(plain, -1)) and turned[:8, -8:].min() > 240, "a quarter clockwise"
    with pytest.raises(ImageError, match="expected 1 to 100 pixels"):
        videos.frames(data, 1, Limits(pixels=100))


@pytest.mark.interop
def test_videos_are_clips(tmp_path: Path) -> None:
    data = film()
    (tmp_path / "a.mp4").write_bytes(data)
    (tmp_path / "a.txt").write_text("it gets brighter\n")
    (tmp_path / "b.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "c.mov").write_bytes(b"")
    (tmp_path / "d.webm").write_bytes(film("libvpx-vp9", "webm"))
    (tmp_path / "e.mkv").write_bytes(b"no video" * 100)
    source = open_source(dict(kind="clips", path=tmp_path, frames=3))
    found = [item for _, item in read(source, range(len(source)))]
    assert found[0].parts[0] == TextPart("it gets brighter") and source.texts(0) == ["it gets brighter"]
    for item in (found[0], found[3]):
        assert greys([part.pixels for part in item.parts if isinstance(part, ImagePart)]) == [0, 20, 39]
    kinds = {i: item.kind for i, item in enumerate(found) if isinstance(item, BadItem)}
    assert kinds == {1: "unreadable_image", 2: "empty_file", 4: "unreadable_image"}
