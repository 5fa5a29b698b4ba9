"""Files appear whole or not at all; a finished stage is skipped, another run's stage is refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ar_tokenizers.files import whole

from ar_unified.data.shards import ShardWriter
from ar_unified.errors import UserError
from ar_unified.workdir import (
    NotShared,
    StageBusy,
    StageMismatch,
    Workdir,
    clean,
    opened,
    read_json,
    write_bytes,
    write_json,
    write_text,
)

FINGERPRINT = {"sources": [{"kind": "folder", "weight": 1.0}], "layout": {"height": 4}, "levels": (8, 8)}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "deep" / "a.txt", "old\r\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"old\r\n"

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(tmp_path / "deep" / "a.txt", b"new")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "deep").iterdir()] == [("a.txt", b"old\r\n")]


@pytest.mark.parametrize("path", ["taken", "taken/below"])
def test_a_file_in_the_place_of_a_workdir_is_refused(tmp_path, path):
    (tmp_path / "taken").write_text("notes")
    with pytest.raises(UserError, match="expected a folder; found the file .*taken$"), opened(str(tmp_path / path)):
        pass
    assert (tmp_path / "taken").read_text() == "notes"


def test_json_takes_what_numpy_gives(tmp_path):
    value = {"mean": np.float32(0.5), "counts": np.arange(3), "path": Path("x")}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == {"mean": 0.5, "counts": [0, 1, 2], "path": "x"}
    with pytest.raises(TypeError, match="found set"):
        write_json(tmp_path / "a.json", {"x": {1}})


def test_a_stage_is_done_only_after_finish(tmp_path):
    stage = Workdir(tmp_path / "run").stage("data", FINGERPRINT)
    assert not stage.done and stage.folder == Workdir(tmp_path / "run").data
    again = Workdir(tmp_path / "run").stage("data", FINGERPRINT)
    assert not again.done
    again.finish({"documents": np.int64(3)})
    done = Workdir(tmp_path / "run").stage("data", dict(reversed(FINGERPRINT.items())))
    assert done.done and done.summary == {"documents": 3}


def test_a_stage_that_made_nothing_holds_nobody_back(tmp_path):
    stage = Workdir(tmp_path).stage("data", FINGERPRINT)
    (stage.folder / "train").mkdir()
    (stage.folder / ".a.json.123.unfinished~").write_bytes(b"killed at once")
    other = Workdir(tmp_path).stage("data", FINGERPRINT | {"layout": {"height": 8}})
    assert read_json(other.folder / "started.json")["fingerprint"]["layout"] == {"height": 8}
    other.abandon()
    assert not other.folder.exists()
    again = Workdir(tmp_path).stage("data", FINGERPRINT)
    write_text(again.folder / "train" / "shard", "made")
    again.abandon()
    with pytest.raises(StageMismatch):
        Workdir(tmp_path).stage("data", FINGERPRINT | {"layout": {"height": 8}})
    assert (again.folder / "train" / "shard").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_another_fingerprint_is_refused_with_the_field_and_the_way_out(tmp_path, finished):
    stage = Workdir(tmp_path).stage("data", FINGERPRINT)
    write_text(stage.folder / "shard", "made")
    if finished:
        stage.finish({})
    with pytest.raises(StageMismatch) as caught:
        Workdir(tmp_path).stage("data", FINGERPRINT | {"layout": {"height": 8}})
    assert caught.value.field == "layout.height"
    state = "was finished with" if finished else "was begun, not finished, with"
    for words in (state, "layout.height = 4, this run has 8", "--workdir", f"delete {tmp_path / 'data'}"):
        assert words in str(caught.value)
    with pytest.raises(StageMismatch, match="extra"):
        Workdir(tmp_path).stage("data", FINGERPRINT | {"extra": None})


def test_leftovers_of_a_killed_writer_go_when_the_stage_is_opened_again(tmp_path):
    folder = Workdir(tmp_path).stage("data", FINGERPRINT).folder
    (folder / "shards").mkdir()
    leftover, mine = folder / "shards" / ".a.array_record.123.unfinished~", folder / ".kept"
    leftover.write_bytes(b"half")
    mine.write_bytes(b"")
    Workdir(tmp_path).stage("data", FINGERPRINT)
    assert not leftover.exists() and mine.exists()
    assert clean(folder) == []


def test_processes_of_two_hosts_never_write_to_one_unfinished_file(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)  # as in containers, which number their own processes
    names = set()
    for host in ("a", "b"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        with pytest.raises(KeyboardInterrupt), whole(tmp_path / "image.png"), ShardWriter(tmp_path, 0):
            names |= (found := {path.name for path in tmp_path.iterdir()})
            assert len(found) == 2 and not any(path.name[0] != "." for path in tmp_path.iterdir())
            raise KeyboardInterrupt
    assert len(names) == 4
    (tmp_path / next(iter(names))).touch()
    assert len(clean(tmp_path)) == 1


def test_a_process_that_does_not_see_the_shared_folder_says_so(tmp_path):
    Workdir(tmp_path / "here").stage("data", {"size": 1})
    assert not Workdir(tmp_path / "here", reader=True).stage("data", {"size": 1}).done
    with pytest.raises(StageMismatch, match="size"):
        Workdir(tmp_path / "here", reader=True).stage("data", {"size": 2})
    elsewhere = Workdir(tmp_path / "elsewhere", reader=True)
    with pytest.raises(NotShared, match="is not there: --workdir must be on storage that all processes share"):
        elsewhere.await_file(elsewhere.config, patience=0)


def test_a_stage_that_another_process_makes_is_refused_until_that_process_ends(tmp_path):
    hold = (
        "import sys, time; from ar_unified.workdir import Workdir\n"
        "Workdir(sys.argv[1]).stage('model', {'a': 1}); print('held', flush=True); time.sleep(600)"
    )
    root = Path(__file__).resolve().parents[1]
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tokenizers'}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(
            StageBusy,
            match=f"model is being made by process {other.pid} on .*: wait until that process ends, or stop it",
        ):
            Workdir(tmp_path).stage("model", {"a": 1})
        assert not Workdir(tmp_path).stage("data", {"a": 1}).done  # another stage is not locked
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert not Workdir(tmp_path).stage("model", {"a": 1}).done


def test_a_finished_stage_is_opened_without_writing(tmp_path):
    Workdir(tmp_path / "run").stage("data", FINGERPRINT).finish({})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert Workdir(tmp_path / "run").stage("data", FINGERPRINT).done
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert not Workdir(tmp_path / "none").path.exists()
