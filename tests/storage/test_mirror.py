"""The local mirror of a store's folder: complete files are uploaded, files of others are downloaded, and one process
has a lock."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
from ar_tokenizers.files import UNFINISHED, write_bytes

from ar_unified import storage, workdir
from ar_unified.data.prepare.claims import Claims, Team
from ar_unified.errors import UserError
from ar_unified.storage import locks, stores
from ar_unified.storage.mirror import Mirror
from ar_unified.workdir import StageBusy, StageMismatch, Workdir, opened
from tests.stores import Disturbed, Store, objects, using

_LAZY, _KEPT = re.compile("big(/.*)?"), re.compile("own")


def mirror(url: str) -> Mirror:
    return Mirror(url, lazy=_LAZY, kept=_KEPT)


def test_what_becomes_whole_is_there_at_once_and_nothing_else(url: str) -> None:
    with storage.mirrored(url, lazy=_LAZY, kept=_KEPT) as here:
        write_bytes(here / "a" / "b.json", b"1")
        write_bytes(here / "own" / "c", b"stays here")
        with open(here / "log", "wb") as log:
            log.write(b"line 1\n")
        (here / f".log.here.7{UNFINISHED}").write_bytes(b"half a li")
        assert objects(url) == {"a/b.json": b"1"}
        storage.push(here)
        assert objects(url) == {"a/b.json": b"1", "log": b"line 1\n"}
        with open(here / "log", "ab") as log:
            log.write(b"line 2\n")
        storage.move(here / "a", here / "aside")
        storage.remove(here / "none")
    assert objects(url) == {"aside/b.json": b"1", "log": b"line 1\nline 2\n"}
    assert not storage.is_mirrored(here / "a") and storage.address(here / "a") == str(here / "a")


def test_the_store_has_the_truth(url: str) -> None:
    """One mirror is of a killed process, the other of a process on another machine."""
    first = mirror(url)
    write_bytes(first.root / "a", b"1")
    first.push(first.root / "a")
    write_bytes(first.root / "never put there", b"1")
    write_bytes(first.root / "big" / "shard", b"old")
    first.push(first.root / "big" / "shard")
    second = mirror(url)
    assert second.root != first.root and (second.root / "a").read_bytes() == b"1"
    assert not (second.root / "big" / "shard").exists(), "that one comes when it is opened"
    for path, data in (("a", b"2"), ("new", b"3"), ("big/shard", b"new")):
        write_bytes(second.root / path, data)
        second.push(second.root / path)
    first.pull()
    assert (first.root / "a").read_bytes() == b"2" and (first.root / "new").read_bytes() == b"3"
    assert (first.root / "never put there").exists(), "it may be about to be put there"
    assert first.exists(first.root / "big" / "shard") and first.names(first.root / "big") == {"shard"}
    place = first.root
    first._lock.close()  # killed
    again = mirror(url)
    assert again.root == place and not (place / "never put there").exists()
    assert again.fetch(place / "big" / "shard").read_bytes() == b"new", "what lay here was another"
    second.remove(second.root / "a")
    again.pull()
    assert not (place / "a").exists() and not again.fetch(place / "b").exists()


def test_names_that_lead_out_are_not_brought(url: str) -> None:
    stores.write(f"{url}/good", b"1")
    for name in ("..", "a/../../b"):
        stores.write(f"{url}/{name}", b"evil")
    found = mirror(url)
    assert [path.name for path in found.root.rglob("*")] == ["good"]
    with pytest.raises(UserError, match="expected a folder in a bucket"):
        mirror("s3://bucket")


def test_a_stage_has_one_maker_among_all_machines(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_UNIFIED_STORE_LEASE", "0.8")
    monkeypatch.setattr(locks, "_machine", lambda: os.urandom(8).hex())  # every read is from another machine
    with opened(url) as here:
        stage = Workdir(here).stage("data", {"a": 1})
        lock = next(iter(storage._locks.values()))
        with pytest.raises(locks.Held, match=f"process {os.getpid()} on "):
            locks.Lock(f"{url}/.locks/data")
        lock._stop.set()  # the lock's owner hangs
        lock._thread.join()
        other = locks.Lock(f"{url}/.locks/data")
        assert other.waited and other.number == lock.number + 1
        lock._stop.clear()
        lock._beat()  # the owner continues
        with pytest.raises(locks.LockLost, match="another process has taken over"):
            stage.finish({})
        assert "data/done.json" not in objects(url)
        storage._locks.clear()
        with pytest.raises(StageBusy, match=re.escape(f"{url}/data is being made by process")):
            Workdir(here).stage("data", {"a": 1})
        other.release()
        Workdir(here).stage("data", {"a": 1}).finish({"n": 1})
        assert not next(iter(storage._locks.values())).waited, "one that was given back is not waited for"
    assert json.loads(objects(url)["data/done.json"])["summary"] == {"n": 1}


def test_who_has_lost_the_lock_writes_nothing_more(url: str) -> None:
    with pytest.raises(locks.LockLost), opened(url) as here:
        stage = Workdir(here).stage("data", {"a": 1})
        (here / "data" / "log").write_text("more")
        next(iter(storage._locks.values())).lost = True
        storage.push(stage.folder)
    assert "data/log" not in objects(url) and "data/started.json" in objects(url)


def test_who_was_killed_here_is_not_waited_for(url: str) -> None:
    gone = {"who": "process 1", "host": locks._machine(), "pid": 2**22 - 1, "released": False}
    stores.write(f"{url}/.locks/data.000007", json.dumps(gone).encode())
    lock = locks.Lock(f"{url}/.locks/data")
    assert lock.number == 8 and not lock.waited and set(objects(url)) == {".locks/data.000008"}
    lock.release()


def test_a_reader_waits_for_what_the_writer_puts_there(url: str) -> None:
    writer = mirror(url)
    with opened(url) as here:
        reader = Workdir(here, reader=True)
        path = here / "data" / "started.json"
        with pytest.raises(workdir.NotShared):
            reader.await_file(path, patience=0.3)
        record = {"fingerprint": {"a": 1}, "cost": {}}
        workdir.write_json(writer.root / "data" / "started.json", record)
        writer.push(writer.root / "data" / "started.json")
        assert not reader.stage("data", {"a": 1}).done
        with pytest.raises(StageMismatch, match="begun"):
            reader.stage("data", {"a": 2})


def test_claims_are_the_stores(url: str) -> None:
    """Two teams that share only the store do every piece once."""
    first, second = mirror(url), mirror(url)
    storage._mirrors.extend((first, second))
    try:
        a = Claims(first.root / "c", Team(0, 2, lease=0.5))
        b = Claims(second.root / "c", Team(1, 2, lease=0.5))
        assert a._take("x/1") and not b._take("x/1") and objects(url).keys() == {"c/x+1"}
        assert b._take("x/2")
        b._release()
        time.sleep(0.3)
        assert a.renew() and not b._take("x/1"), "who goes on is left alone"
        time.sleep(0.6)
        assert b._take("x/1"), "who is not heard of is not waited for"
        b._release()
        b.clear()
        assert not objects(url)
    finally:
        del storage._mirrors[-2:]


def test_a_step_is_seen_when_all_of_it_is_there(url: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints are in a store that Orbax does not write to."""
    steps = storage.Steps(url, "whole.txt")
    for name in ("a", "sub/b", "whole.txt"):
        write_bytes(steps.here / "5" / name, name.encode())
    monkeypatch.setenv("AR_UNIFIED_STORE_PATIENCE", "0")
    between = Disturbed(store, lambda method, path, number: 503 if method == "PUT" and path.endswith("/b") else None)
    try:
        with using(store.variables(between.port)), pytest.raises(stores.StoreFailed):
            steps.put(5)
    finally:
        between.close()
    assert steps.steps() == [] and "5/a" in objects(url), "it was cut off in the middle"
    steps.put(5)
    assert objects(url).keys() == {"5/a", "5/sub/b", "5/whole.txt"} and steps.steps() == [5]
    other = storage.Steps(url, "whole.txt")
    assert (other.bring(5) / "sub" / "b").read_bytes() == b"sub/b"
    between = Disturbed(store, lambda method, path, number: 503 if method == "DELETE" and path.endswith("/a") else None)
    try:
        with using(store.variables(between.port)), pytest.raises(stores.StoreFailed):
            other.delete(5)
    finally:
        between.close()
    assert steps.steps() == [] and "5/a" in objects(url), "it was cut off in the middle"
