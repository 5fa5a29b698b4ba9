"""Requests to a real server: objects are complete or absent, one of many creations wins, and transient failures are
retried."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ar_unified.storage import Opened, Remote, open_binary, path, size_of, stores
from tests.stores import Disturbed, Store, using


def test_objects_are_written_listed_read_and_removed(url: str, tmp_path: Path) -> None:
    assert stores.facts(f"{url}/a") is None and stores.listed(url) == ({}, []) and not stores.found_under(url)
    stores.write(f"{url}/a", b"first")
    stores.write(f"{url}/a", b"second")
    stores.write(f"{url}/b/c d", b"x" * 10)
    stores.write(f"{url}2/a", b"of a folder whose name begins alike")
    assert stores.read(f"{url}/a") == b"second" and stores.read(f"{url}/a", 1, 3) == b"ec"
    found = stores.facts(f"{url}/b/c d")
    assert found is not None and found.size == 10 and stores.is_md5(found.tag)
    files, folders = stores.listed(url)
    assert list(files) == ["a"] and folders == ["b"] and set(stores.found_under(url)) == {"a", "b/c d"}
    stores.copy(f"{url}/a", f"{url}/e")
    (tmp_path / "up").write_bytes(b"12" * 1000)
    assert stores.upload(tmp_path / "up", f"{url}/up") == stores.download(f"{url}/up", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"12" * 1000 and stores.read(f"{url}/e") == b"second"
    stores.delete(f"{url}/a")
    stores.delete(f"{url}/a")
    for gone in (lambda: stores.read(f"{url}/a"), lambda: stores.download(f"{url}/a", tmp_path / "none")):
        with pytest.raises(FileNotFoundError):
            gone()
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_listings_go_on_behind_their_first_page(url: str) -> None:
    names = [f"{i:04d}" for i in range(1010)]  # a page of a listing has 1,000 names
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: stores.write(f"{url}/{name}", b"1"), names))
    assert list(stores.found_under(url)) == names == sorted(stores.listed(url)[0])


def test_of_many_who_create_one_does(url: str) -> None:
    for round in range(5):
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda i: stores.create(f"{url}/claim{round}", b"%d" % i), range(8)))  # noqa: B023
        assert sum(made) == 1 and stores.read(f"{url}/claim{round}") == b"%d" % made.index(True)


def in_turn(*faults: int | str) -> Callable[[str, str, int], int | str | None]:
    """Each request fails once in each of these ways before it is served."""
    seen: dict[tuple[str, str], int] = {}

    def fault(method: str, path: str, number: int) -> int | str | None:
        count = seen[method, path] = seen.get((method, path), 0) + 1
        return faults[count - 1] if count <= len(faults) else None

    return fault


def test_what_fails_in_passing_is_asked_again(
    url: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_pauses", lambda: iter([0.01] * 8 + [None]))
    data = random.Random(0).randbytes(300_000)
    stores.write(f"{url}/there", data)
    between = Disturbed(store, in_turn(503, 429, 500, "torn", "cut"))
    try:
        with using(store.variables(between.port)):
            assert stores.read(f"{url}/there") == data and stores.read(f"{url}/there", 5, 200_000) == data[5:200_000]
            stores.download(f"{url}/there", tmp_path / "there")
            assert (tmp_path / "there").read_bytes() == data
            stores.write(f"{url}/new", data)
            # The faults "torn" and "cut" came after the claim was created, and it is recognised as our own.
            assert stores.create(f"{url}/claim", b"mine") and not stores.create(f"{url}/claim", b"yours")
            assert set(stores.found_under(url)) == {"there", "new", "claim"}
            stores.delete(f"{url}/claim")
    finally:
        between.close()
    assert stores.read(f"{url}/new") == data and stores.facts(f"{url}/claim") is None and between.faults > 20


def test_fewer_or_other_bytes_are_seen_where_the_client_sees_nothing(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3's client compares checksums that the server sends; not every server sends them."""
    stores.write(f"{url}/a", b"12345678")
    client, answers = stores._system(url), [b"1234", b"1234567"]

    class Torn:
        info = staticmethod(client.info)

        def cat_file(self, name: str, **where: int) -> bytes:
            return answers.pop(0) if answers else client.cat_file(name, **where)

    monkeypatch.setattr(stores, "_system", lambda _: Torn())
    assert stores.read(f"{url}/a", 0, 8) == b"12345678" and not answers
    answers += [b"", b"1234567x"]
    assert stores.read(f"{url}/a") == b"12345678" and not answers
    answers += [b"1", b"1234567x"]
    stores.download(f"{url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"12345678" and not answers


@pytest.mark.parametrize(
    "fault, error, words",
    [
        (503, stores.StoreFailed, r"all \d+ requests to read this failed.*same command continues"),
        ("torn", stores.StoreFailed, r"s3://.*all \d+ requests to read"),
        (403, stores.StoreRefused, "the store does not let us read this"),
    ],
)
def test_what_goes_on_failing_is_named(
    url: str, store: Store, monkeypatch: pytest.MonkeyPatch, fault: int | str, error: type, words: str
) -> None:
    monkeypatch.setenv("AR_UNIFIED_STORE_PATIENCE", "1")
    stores.write(f"{url}/a", b"12345678")
    between = Disturbed(store, lambda method, path, number: fault if method == "GET" else None)
    began = time.monotonic()
    try:
        with using(store.variables(between.port)), pytest.raises(error, match=words):
            stores.read(f"{url}/a", 0, 8)
    finally:
        between.close()
    assert time.monotonic() < began + 10


def test_without_credentials_or_package_it_says_what_to_do(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    stores._open.cache_clear()
    with pytest.raises(stores.StoreRefused, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        stores.read(f"{url}/a")
    monkeypatch.setitem(stores.SCHEMES, "s3", "package_that_is_not_here")
    stores._open.cache_clear()
    with pytest.raises(stores.StoreRefused, match=re.escape("pip install 'ar_unified[storage]'")):
        stores.read(f"{url}/a")
    monkeypatch.setenv("AR_UNIFIED_STORE_PATIENCE", "long")
    with pytest.raises(ValueError, match="AR_UNIFIED_STORE_PATIENCE: expected seconds"):
        stores.patience()


def test_a_path_is_an_objects_or_a_files(url: str, tmp_path: Path) -> None:
    there = path(f"{url}/sub/a.b.txt")
    assert isinstance(there, Remote) and isinstance(path(tmp_path), Path) and path(there) is there
    assert (there.name, there.stem, there.suffix, str(there.parent)) == ("a.b.txt", "a.b", ".txt", f"{url}/sub")
    assert str(there.with_suffix("")) == f"{url}/sub/a.b" and there.parent / "a.b.txt" == there
    assert str(there.parent / "/x//y") == f"{url}/sub/x/y" and not there.exists()
    stores.write(str(there), b"12")
    assert there.is_file() and there.parent.is_dir() and not there.is_dir() and not there.parent.is_file()
    assert size_of(there) == 2 and there.read_bytes() == b"12"
    with pytest.raises(FileNotFoundError, match="no such object"):
        size_of(there.parent / "other")


def test_ranges_are_the_files_bytes_in_any_order(url: str, store: Store, tmp_path: Path) -> None:
    rng = random.Random(1)
    data = rng.randbytes(9_000_000)
    (tmp_path / "a").write_bytes(data)
    stores.write(f"{url}/a", data)
    between = Disturbed(store, lambda *_: None)
    try:
        with using(store.variables(between.port)):
            opened = Opened(path(f"{url}/a"))
            for _ in range(40):
                at, size = rng.randrange(len(data)), rng.choice([1, 512, 70_000, 5_000_000])
                assert opened.read(at, size) == data[at : at + size]
            assert opened.read(len(data) - 3, 10) == data[-3:] and opened.read(len(data), 5) == b""
            before = len(between.asked)
            with open_binary(path(f"{url}/a")) as stream:
                assert b"".join(iter(lambda: stream.read(10_000), b"")) == data
            assert len(between.asked) - before < 10, "reading on takes few requests, and larger ones"
            with open_binary(path(f"{url}/a")) as stream, open(tmp_path / "a", "rb") as file:
                for at, whence in ((100, 0), (-50, 2), (20, 1)):
                    assert stream.seek(at, whence) == file.seek(at, whence) and stream.read(9) == file.read(9)
    finally:
        between.close()
