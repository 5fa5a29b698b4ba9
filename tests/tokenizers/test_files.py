"""Folders that appear completely or not at all, and unfinished folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from ar_tokenizers.files import UNFINISHED, whole_folder

WRITER = """
import os, signal, sys
from ar_tokenizers.files import whole_folder
with whole_folder(sys.argv[1]) as here:
    (here / "part").write_bytes(b"x" * 1000)
    print("written", flush=True)
    sys.stdin.read()
"""

MANY = """
import sys
from ar_tokenizers.files import whole_folder
for _ in range(200):
    try:
        with whole_folder(sys.argv[1]) as here:
            raise KeyError
    except KeyError:
        pass
"""


def left_in(folder):
    return {path for path in folder.iterdir() if path.name.endswith(UNFINISHED)}


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "model[1]"  # a name that would also be a glob pattern
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"written\n"
    other = tmp_path / f".model[1]x.host.1{UNFINISHED}"
    other.mkdir()
    before = left_in(tmp_path)
    assert len(before) == 3
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()
    with pytest.raises(KeyError), whole_folder(path):
        during = left_in(tmp_path)
        raise KeyError
    assert (
        len(during) == 3 and len(during - before) == 1
    )  # the dead process' folder is gone, this process' folder is new
    assert left_in(tmp_path) == during & before and other in during
    writers[1].communicate()
    assert path.joinpath("part").stat().st_size == 1000 and left_in(tmp_path) == {other}
    with pytest.raises(FileExistsError), whole_folder(path):
        pass


@pytest.mark.parametrize("opened", [False, True], ids=["before it is opened", "before it is locked"])
def test_a_folder_that_another_process_takes_for_a_remnant_is_made_again(tmp_path, monkeypatch, opened):
    open_, removed = os.open, []

    def open_and_remove(path, flags, *args, **kwargs):
        if str(path).endswith(UNFINISHED) and not removed:
            removed.append(path)
            handle = open_(path, flags) if opened else None
            os.rmdir(path)
            return open_(path, flags) if handle is None else handle
        return open_(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_and_remove)
    with whole_folder(tmp_path / "model") as here:
        (here / "part").write_bytes(b"x")
    assert removed and (tmp_path / "model" / "part").read_bytes() == b"x" and not left_in(tmp_path)


def test_many_processes_may_write_one_folder(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", MANY, str(tmp_path / "model")]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert not left_in(tmp_path)
