from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ar_unified.data.prepare import image_codes
from ar_unified.data.prepare.image_codes import ImageCodes, digest_of


def images(first: int, count: int) -> dict[bytes, np.ndarray]:
    """Codes for `count` images of several sizes, by digest."""
    found = {}
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 256, (8, 8 + 8 * (i % 3), 3), np.uint8)
        found[digest_of(pixels)] = rng.integers(0, 70_000, (1, 1 + i % 3), np.int32)
    return found


@pytest.fixture(params=[4_000_000, 16], ids=["whole", "in parts"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_codes, "_PART", request.param)


@pytest.mark.usefixtures("part")
def test_what_was_put_is_found_by_the_next(tmp_path: Path) -> None:
    first = ImageCodes(tmp_path, "a", 70_000)
    known = images(0, 50)
    assert not any(first.get(digest) is not None for digest in known)
    first.put(known)
    second = ImageCodes(tmp_path, "a", 70_000)
    second.put(more := images(40, 60))  # ten of these are known already
    third = ImageCodes(tmp_path, "a", 70_000)
    for digest, codes in (known | more).items():
        found = third.get(digest)
        assert found is not None and found.dtype == np.int32 and np.array_equal(found, codes)
    assert not any(third.get(digest) is not None for digest in images(200, 30))
    assert ImageCodes(tmp_path, "another", 70_000).get(next(iter(known))) is None


def test_only_who_refreshes_makes_the_index_and_it_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = ImageCodes(tmp_path, "a", 512)
    known = {digest: codes % 512 for digest, codes in images(0, 5).items()}
    codes.put(known)
    assert ImageCodes(tmp_path, "a", 512, refresh=False).get(next(iter(known))) is None
    ImageCodes(tmp_path, "a", 512)
    monkeypatch.setattr(image_codes, "_part", None)  # not called, because the index exists
    for refresh in (True, False):
        found = ImageCodes(tmp_path, "a", 512, refresh=refresh).get(next(iter(known)))
        assert np.array_equal(found, next(iter(known.values())))


def test_digests_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    alike = {b"12345678" + bytes([i] * 8): np.full((1, 2), i, np.int32) for i in range(4)}
    ImageCodes(tmp_path, "a", 512).put(dict(list(alike.items())[:3]))
    found = ImageCodes(tmp_path, "a", 512)
    assert [None if (codes := found.get(digest)) is None else int(codes[0, 0]) for digest in alike] == [0, 1, 2, None]


def test_an_image_of_the_same_bytes_and_another_shape_is_another() -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    assert digest_of(pixels) != digest_of(pixels.reshape(16, 8, 3))


def test_an_index_of_which_a_half_is_gone_is_not_read(tmp_path: Path) -> None:
    codes = ImageCodes(tmp_path, "a", 512)
    codes.put({digest: codes % 512 for digest, codes in images(0, 5).items()})
    ImageCodes(tmp_path, "a", 512)
    (places,) = tmp_path.rglob("index-*.places.npy")
    places.unlink()
    assert ImageCodes(tmp_path, "a", 512, refresh=False).get(next(iter(images(0, 1)))) is None
